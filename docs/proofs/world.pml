/* Time, the network's faults, the server's, and the end of processes. */

/* Nobody believes in what is older. */
#define OLD (T - DRIFT)

inline tick() {
	printf("---- a tick; clock that does not see it: %d\n", slow - 1);
	for (i_ : 0 .. N - 1) {
		if
		:: i_ + 1 != slow ->
			base[i_] = (held[i_] -> least(base[i_] + 1, OLD) : 0);
			s_stamp[i_] = (s_there[i_] -> least(s_stamp[i_] + 1, OLD) : 0);
#ifdef FAILOVER
			r_stamp[i_] = (r_there[i_] -> least(r_stamp[i_] + 1, OLD) : 0);
#endif
			for (j_ : 0 .. UP - 1) {
				k_ = i_ * UP + j_;
				up_age[k_] = (up_kind[k_] && up_kind[k_] <= KEEP -> least(up_age[k_] + 1, OLD) : 0)
			}
			for (j_ : 0 .. DOWN - 1) {
				k_ = i_ * DOWN + j_;
				down_age[k_] = (down_kind[k_] && (down_kind[k_] <= BEAT_ACCEPTED || down_kind[k_] == GRANT || down_kind[k_] == PUSHED)
					-> least(down_age[k_] + 1, OLD) : 0)
			}
			late_age[i_] = (late_kind[i_] && late_kind[i_] <= KEEP -> least(late_age[i_] + 1, OLD) : 0);
			j_ = 0; k_ = 0
		:: else -> slowed[i_] = 1
		fi;
		beats[i_] = 0;
#ifndef NO_DEADLINE
		if
		:: held[i_] && !crashed[i_] && !believes(i_) -> give_back(i_); flush(i_)
		:: else
		fi;
#endif
#ifdef PROMPT
		held_for[i_] = (held[i_] -> 1 : 0);
		waited[i_] = (request[i_] && !crashed[i_] -> waited[i_] + 1 : 0);
		assert(waited[i_] <= BOUND);
#endif
	}
	i_ = 0;
	gap = least(gap + 1, GAP_MAX);
#ifdef FAILOVER
	r_gap = (replicated == 1 -> least(r_gap + 1, GAP_MAX) : 0);
	if
	:: replicated == 1 && losses ->
		lag++;
		if
		:: lag > LAG -> forget_copy(); lag = 0; losses = 0
		:: else
		fi
	:: else
	fi;
#endif
	uptime = (epoch -> 5 : least(uptime + 1, 5));
	if
	:: grace -> grace--
	:: else
	fi
}

#ifdef PROMPT
/* Nobody lets time pass who has something to do: messages arrive, answers are given, heartbeats are sent, and no caller
 * holds for longer than a tick. */
#define still(i) (crashed[i] || (open[i] && beats[i] && !(unclaimed[i] && beats[i] < 2) && !up_n[i] && !down_n[i] && !sendable(i) && !held_for[i]))
#else
#define still(i) 1
#endif

#ifdef RESTART
/* What the grace is long enough for: whoever believes that it holds has come back before the grace ends. */
#define back(i) (grace != 1 || !away[i] || !believes(i))
#else
#define back(i) 1
#endif

#define all_of(what) (what(0) && what(1) && (N < 3 || what(N - 1)))

inline cut(i) {
	printf("connection of %d is lost\n", i);
	drops--;
	hang_up(i);
	calm()
}

inline cut_later(i) {
	printf("a command of %d is late\n", i);
	late_kind[i] = up_kind[i * UP]; late_a[i] = up_a[i * UP]; late_age[i] = up_age[i * UP]; late_gen[i] = gen[i];
	cut(i)
}

inline crash(i) {
	printf("process %d ends\n", i);
	crashes--;
	crashed[i] = 1;
	hang_up(i);
	end_of_lease(i);
	request[i] = 0; asked[i] = 0; giving[i] = 0; cancelling[i] = 0; asked_n[i] = 0; early[i] = 0;
	calm()
}

inline lose_data() {
	printf("server loses its data\n");
	for (j_ : 0 .. N - 1) {
		s_there[j_] = 0; s_gen[j_] = 0; s_quiet[j_] = 0; s_stamp[j_] = 0; s_revoked[j_] = 0; s_dropped[j_] = 0;
		away[j_] = 1;
	}
	j_ = 0;
	nobody();
	do
	:: q_n -> q_remove(0)
	:: else -> break
	od;
	gap = 0; grace = 0; epoch = 0;
	losses--;
	calm()
}

hidden byte slow;

proctype world() {
	do
	:: d_step { all_of(still) && all_of(back) -> slow = 0; tick(); check() }
#if SLOW > 0
	:: d_step { all_of(still) && all_of(back) && !slowed[0] -> slow = 1; tick(); slow = 0; check() }
	:: d_step { all_of(still) && all_of(back) && !slowed[1] -> slow = 2; tick(); slow = 0; check() }
#endif
#if DROPS > 0
	:: d_step { drops && linked[0] -> cut(0) }
	:: d_step { drops && linked[1] -> cut(1) }
	:: d_step { drops && linked[0] && up_n[0] && !late_kind[0] -> cut_later(0) }
	:: d_step { drops && linked[1] && up_n[1] && !late_kind[1] -> cut_later(1) }
#if N > 2
	:: d_step { drops && linked[2] -> cut(2) }
	:: d_step { drops && linked[2] && up_n[2] && !late_kind[2] -> cut_later(2) }
#endif
#endif
#if STEPS > 0
	:: d_step { steps -> steps--; gap = GAP_MAX; printf("clock steps forwards\n"); calm() }  /* forwards, or a pause of the machine */
	:: d_step { steps && gap -> steps--; gap = 0; printf("clock steps backwards\n"); calm() } /* backwards */
#ifdef SMALL_STEPS
	:: d_step { steps -> steps--; gap = least(gap + 1, GAP_MAX); printf("clock makes a small step forwards\n"); calm() }
#endif
#endif
#if CRASHES > 0
	:: d_step { crashes && !crashed[0] -> crash(0) }
	:: d_step { crashes && !crashed[1] -> crash(1) }
#if N > 2
	:: d_step { crashes && !crashed[2] -> crash(2) }
#endif
#endif
#ifdef RESTART
	:: d_step {
		losses ->
		lose_data();
		uptime = 0;
		for (i_ : 0 .. N - 1) { hang_up(i_); late_kind[i_] = 0; late_a[i_] = 0; late_age[i_] = 0; late_gen[i_] = 0 }
		i_ = 0;
		check()
	}
#endif
#ifdef FLUSH
	:: d_step { losses -> lose_data(); check() }
#endif
#ifdef FAILOVER
	:: d_step { !replicated -> replicated = 1; copy() }
	:: d_step { replicated && losses -> losses--; promote(); check() }
#endif
	od
}
