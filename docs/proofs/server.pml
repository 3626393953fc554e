/* The scripts. A script is one step, as on the server. */

/* The logical clock does not go back, and not over gaps. */
inline judge() {
	if
#ifdef CLOCK_WALL
	:: gap > 0 ->
#else
	:: gap > 0 && gap <= G ->
#endif
		for (k_ : 0 .. N - 1) { s_quiet[k_] = (s_there[k_] -> least(s_quiet[k_] + gap, SL) : 0) }
		k_ = 0
#ifdef ADVANCE
	:: gap > G ->
		for (k_ : 0 .. N - 1) { s_quiet[k_] = (s_there[k_] -> least(s_quiet[k_] + G, SL) : 0) }
		k_ = 0
#endif
	:: else
	fi;
	gap = 0
}

#define ended() (!s_there[holder - 1] || s_quiet[holder - 1] >= (h_claimed -> T : CW))

inline nobody() { holder = 0; h_fence = 0; h_request = 0; h_claimed = 0 }

inline q_remove(at) {
	q_n--;
	for (k_ : at .. QMAX - 2) { q[k_] = q[k_ + 1] }
	q[QMAX - 1] = 0; k_ = 0
}

inline new_fence() {
	fences++;
	assert(fences > last_fence);
	last_fence = fences
}

/* The lock is free: the next live waiter holds it from here on, or nobody does. During the grace nobody does. */
inline grant_next() {
	nobody();
	do
	:: q_n == 0 || grace > 0 || fences == FENCES -> break
	:: else ->
		n_ = q[0] >> 3; m_ = q[0] & 7;
		q_remove(0);
		if
		:: s_there[n_] && s_quiet[n_] < CW ->
			new_fence();
			printf("server grants %d to %d out of the queue\n", fences, n_);
			holder = n_ + 1; h_fence = fences; h_request = m_; h_claimed = 0; s_revoked[n_] = 0;
			tell(n_, PUSHED, fences, m_, 0, s_stamp[n_]);
			break
		:: else ->
			if
			:: s_there[n_] -> s_dropped[n_] = m_; tell(n_, DROPPED, m_, 0, 0, 0)
			:: else
			fi
		fi
	od;
	n_ = 0; m_ = 0
}

inline revoke() {
	printf("server takes %d from %d\n", h_fence, holder - 1);
	n_ = holder - 1;
	if
	:: s_there[n_] -> s_revoked[n_] = h_fence; tell(n_, REVOKED, h_fence, 0, 0, 0)
	:: else
	fi;
	n_ = 0
}

/* Somebody may have been waiting for what has ended meanwhile, or for the end of the grace. */
inline look() {
	if
	:: holder && ended() && q_n -> revoke(); grant_next()
	:: !holder && q_n && !grace -> grant_next()
	:: else
	fi
}

inline forget_queued(i, but) {
	m_ = 0;
	do
	:: m_ >= q_n -> break
	:: else ->
		if
		:: (q[m_] >> 3) == i && (q[m_] & 7) != but -> q_remove(m_)
		:: else -> m_++
		fi
	od;
	m_ = 0
}

inline sweep() {
	for (j_ : 0 .. N - 1) {
		if
		:: s_there[j_] && s_quiet[j_] >= SL ->
			s_there[j_] = 0; s_quiet[j_] = 0; s_gen[j_] = 0; s_stamp[j_] = 0; s_revoked[j_] = 0; s_dropped[j_] = 0;
			forget_queued(j_, 0);
			if
			:: holder == j_ + 1 -> grant_next()
			:: else
			fi
		:: else
		fi
	}
	j_ = 0
}

/* A partition without its epoch has lost its data: what it gave may still be believed in. */
inline begin_epoch(i) {
	if
	:: epoch == 0 ->
		epoch = 2;
#ifndef NO_GRACE
		grace = (epoch_known[i] == 1 -> 3 : (uptime < 5 -> 1 : 0))
#endif
	:: else ->
		if
		:: grace && epoch_known[i] == 1 -> grace = 3
		:: else
		fi
	fi
}

inline on_heartbeat(i, how, fence, wanted, old, g, live) {
	judge();
	if
	:: (!s_there[i] && how != OPEN) ->
		if
		:: live -> tell(i, NO_SESSION, 0, 0, 0, 0)
		:: else
		fi
#ifndef NO_GEN
	:: (s_there[i] && s_gen[i] > g)
#endif
	:: else ->
		if
		:: how == OPEN -> begin_epoch(i)
		:: else
		fi;
		s_stamp[i] = (s_there[i] -> least(old, s_stamp[i]) : old);
		s_there[i] = 1; s_gen[i] = g; s_quiet[i] = 0;
		x_ = 0;
		if
		:: fence && holder == i + 1 && h_fence == fence -> h_claimed = 1; x_ = 1
		:: fence && holder == 0 && grace && live -> /* asserted with its old fence */
			holder = i + 1; h_fence = fence; h_claimed = 1; h_request = 0; x_ = 1;
#ifdef FIND_ASSERTED
			assert(0)
#endif
		:: else
		fi;
#ifndef NO_RECONCILE
		/* What the session neither held nor asked for when it took itself up is not its own any more. */
		if
		:: how == RESUME && live ->
			forget_queued(i, wanted);
			if
			:: holder == i + 1 && h_fence != fence && (h_request != wanted || !h_request) -> grant_next()
			:: else
			fi
		:: else
		fi;
#endif
		if
		:: live -> tell(i, BEAT + x_, fence, s_dropped[i], s_revoked[i], old)
		:: else
		fi;
		x_ = 0;
#ifdef SWEEP
		sweep();
#endif
		look()
	fi
}

inline on_acquire(i, r, g, live) {
	if
	:: !s_there[i] ->
		if
		:: live -> tell(i, NO_SESSION, 0, 0, 0, 0)
		:: else
		fi
#ifndef NO_GEN
	:: (s_there[i] && s_gen[i] != g)
#endif
	:: else ->
		if
		:: holder || q_n ->
			judge();
			if
			:: holder && ended() -> revoke(); grant_next()
			:: !holder && !grace -> grant_next()
			:: else
			fi
		:: else
		fi;
		/* It asks under another number, so it has heard that its place was lost. */
		s_dropped[i] = (s_dropped[i] != r -> 0 : r);
		x_ = 0;
		for (j_ : 0 .. QMAX - 1) { x_ = (j_ < q_n && q[j_] == i * 8 + r -> 1 : x_) }
		if
		:: holder == i + 1 && h_request == r ->
			/* The same request again: its first answer was lost. */
			if
			:: live -> tell(i, GRANT, h_fence, r, h_claimed, s_stamp[i])
			:: else
			fi
		:: else ->
			if
			:: !holder && !q_n && !grace && fences < FENCES ->
				new_fence();
				printf("server grants %d to %d\n", fences, i);
				holder = i + 1; h_fence = fences; h_request = r; h_claimed = 1; s_revoked[i] = 0;
				if
				:: live -> tell(i, GRANT, fences, r, 1, s_stamp[i])
				:: else
				fi
			:: else ->
				if
				:: !x_ && q_n < QMAX -> q[q_n] = i * 8 + r; q_n++
				:: else
				fi
			fi
		fi;
		x_ = 0; j_ = 0
	fi
}

#if DROPS > 0 || defined(FAILOVER) || defined(RESTART)
#define answer_release(i, f) tell(i, RELEASED, f, 0, 0, 0)
#define answer_cancel(i, r) tell(i, CANCELLED, r, 0, 0, 0)
#else /* no answer can be lost, and nothing depends on when it comes */
#define answer_release(i, f) giving[i] = giving[i] & (255 - bit_of(f))
#define answer_cancel(i, r) cancelling[i] = cancelling[i] & (255 - bit_of(r))
#endif

inline on_release(i, f, live) {
	if
	:: holder == i + 1 && h_fence == f ->
		if
		:: q_n -> judge()
		:: else
		fi;
		grant_next()
	:: else
	fi;
	if
	:: live -> answer_release(i, f)
	:: else
	fi
}

inline on_cancel(i, r, live) {
	s_dropped[i] = (s_dropped[i] == r -> 0 : s_dropped[i]);
	x_ = 0;
	for (j_ : 0 .. QMAX - 1) { x_ = (j_ < q_n && q[j_] == i * 8 + r -> j_ + 1 : x_) }
	j_ = 0;
	if
	:: x_ -> q_remove(x_ - 1)
	:: !x_ && holder == i + 1 && h_request == r -> judge(); grant_next()
	:: else
	fi;
	x_ = 0;
	if
	:: live -> answer_cancel(i, r)
	:: else
	fi
}

inline on_command(i, how, arg, old, g, live) {
	if
	:: how == OPEN || how == RESUME || how == KEEP -> on_heartbeat(i, how, (arg & 7), (arg >> 3), old, g, live)
	:: how == ACQUIRE -> on_acquire(i, arg, g, live)
	:: how == RELEASE -> on_release(i, arg, live)
	:: how == CANCEL -> on_cancel(i, arg, live)
	fi
}

#define room (down_n[0] <= DOWN - 3 && down_n[1] <= DOWN - 3 && (N < 3 || down_n[N - 1] <= DOWN - 3))

inline serve(i) {
	c_kind = up_kind[i * UP]; c_a = up_a[i * UP]; c_age = up_age[i * UP];
	up_pop(i);
	printf("server reads from %d: %d %d, stamp %d old\n", i, c_kind, c_a, c_age);
	on_command(i, c_kind, c_a, c_age, gen[i], 1);
	c_kind = 0; c_a = 0; c_age = 0;
	check()
}

inline serve_late(i) {
	c_kind = late_kind[i]; c_a = late_a[i]; c_age = late_age[i]; c_gen = late_gen[i];
	late_kind[i] = 0; late_a[i] = 0; late_age[i] = 0; late_gen[i] = 0;
	printf("server reads from an old connection of %d: %d %d, stamp %d old\n", i, c_kind, c_a, c_age);
	on_command(i, c_kind, c_a, c_age, c_gen, 0);
	c_kind = 0; c_a = 0; c_age = 0; c_gen = 0;
	check()
}

hidden byte c_kind, c_a, c_age, c_gen, c_i;

proctype server() {
	do
	:: d_step { up_n[0] && room -> c_i = 0; serve(c_i) }
	:: d_step { up_n[1] && room -> c_i = 1; serve(c_i) }
#if N > 2
	:: d_step { up_n[2] && room -> c_i = 2; serve(c_i) }
#endif
#if DROPS > 0
	:: d_step { late_kind[0] && room -> c_i = 0; serve_late(c_i) }
	:: d_step { late_kind[1] && room -> c_i = 1; serve_late(c_i) }
#if N > 2
	:: d_step { late_kind[2] && room -> c_i = 2; serve_late(c_i) }
#endif
#endif
#if FORCES > 0
	:: d_step {
		forces && holder && room ->
		forces--;
		printf("an operator takes it from %d\n", holder - 1);
		away[holder - 1] = 1;
		revoke(); grant_next();
		check()
	}
#endif
	od
}
