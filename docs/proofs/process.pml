/* A process: the engine's side of the protocol, and a caller who asks, gives back and changes its mind at any time. */

#define named(i) (held[i] * unclaimed[i]) /* what a heartbeat claims or asserts */
#define idle(i) (!held[i] && !request[i])

inline end_of_lease(i) { held[i] = 0; base[i] = 0; whole[i] = 0; renewed[i] = 0; unclaimed[i] = 0; held_for[i] = 0 }

inline withdraw_number(i, r) {
	cancelling[i] = cancelling[i] | bit_of(r);
	if
	:: open[i] -> need_cancel[i] = need_cancel[i] | bit_of(r)
	:: else
	fi
}

inline give_back(i) {
	giving[i] = giving[i] | bit_of(held[i]);
	if
	:: open[i] -> need_release[i] = need_release[i] | bit_of(held[i])
	:: else
	fi;
	forget(i)
}

inline lose(i) { forget(i) }

/* A number that was sent twice may be granted twice: the second time nobody would want it. */
inline forget(i) {
	end_of_lease(i);
	if
#ifndef NO_RESENT
	:: resent[i] -> withdraw_number(i, resent[i]); resent[i] = 0
#endif
	:: else
	fi
}

inline ask(i) {
	asked_n[i]++; asks--;
	request[i] = asked_n[i];
	asked[i] = 0;
	need_acquire[i] = open[i];
	waited[i] = 0
}

inline withdraw(i) {
	if
	:: asked[i] -> withdraw_number(i, request[i])
	:: else
	fi;
	request[i] = 0; need_acquire[i] = 0; asked[i] = 0; resent[i] = 0; early[i] = 0
}

inline ask_again(i) {
	n_ = waited[i];
	withdraw(i);
	if
	:: asks && asked_n[i] < REQS -> ask(i); waited[i] = n_
	:: else
	fi;
	n_ = 0
}

inline on_grant(i, f, r, taken, old) {
	x_ = old;
#ifdef BASE_ARRIVAL
	x_ = 0;
#endif
	if
#ifdef NO_DONE
	:: !request[i] ->
#else
	:: request[i] != r -> /* withdrawn, or held already */
#endif
		skip
	:: else ->
		if
#ifdef NO_CLAIM
		:: x_ >= T - DRIFT || early[i] == f -> ask_again(i)
#else
		:: x_ >= (taken -> T : CW) - DRIFT || early[i] == f -> ask_again(i)
#endif
		:: else ->
			held[i] = f; base[i] = x_;
			whole[i] = taken; renewed[i] = taken; unclaimed[i] = !taken;
			request[i] = 0; need_acquire[i] = 0; asked[i] = 0; waited[i] = 0; early[i] = 0
		fi
	fi;
	x_ = 0
}

inline on_revoked(i, f) {
#ifndef NO_REVOKED
	if
	:: f && held[i] == f -> lose(i)
	:: f && held[i] != f && request[i] -> early[i] = f
	:: else
	fi
#else
	skip
#endif
}

inline session_gone(i) {
	if
	:: known[i] ->
		known[i] = 0; open[i] = 0; need_open[i] = 1;
		need_acquire[i] = 0; need_release[i] = 0; need_cancel[i] = 0;
		late_kind[i] = 0; late_a[i] = 0; late_age[i] = 0; late_gen[i] = 0;
		/* What it holds it asserts to the new session, which says whether it was lost. */
		if
		:: held[i] -> renewed[i] = 0; unclaimed[i] = 1
		:: else
		fi
	:: else
	fi
}

inline on_beat(i, accepted, named, left, taken, old, later) {
	on_revoked(i, taken);
	if
	:: left && left == request[i] -> ask_again(i)
	:: else
	fi;
	if
	:: named && named == held[i] && accepted ->
		unclaimed[i] = 0; whole[i] = 1; renewed[i] = 1; base[i] = least(base[i], old)
	:: named && named == held[i] && !accepted -> lose(i)
	:: else ->
		if
		:: held[i] && renewed[i] -> base[i] = least(base[i], old)
		:: else
		fi
	fi;
	away[i] = (later -> 0 : away[i]);
#if defined(RESTART) || defined(FLUSH)
	epoch_known[i] = (later || epoch_known[i] == 2 -> 2 : 1);
#endif
	if
	:: !open[i] ->
		open[i] = 1; known[i] = 1;
		need_release[i] = giving[i]; need_cancel[i] = cancelling[i];
		need_acquire[i] = (request[i] -> 1 : 0);
#ifdef NO_RESEND
		need_acquire[i] = (request[i] && !asked[i] -> 1 : 0);
#endif
		resent[i] = (asked[i] -> request[i] : resent[i])
	:: else
	fi
}

inline receive(i) {
	d_kind = down_kind[i * DOWN]; d_a = down_a[i * DOWN]; d_b = down_b[i * DOWN]; d_c = down_c[i * DOWN];
	d_age = down_age[i * DOWN]; d_after = down_after[i * DOWN];
	down_pop(i);
	printf("process %d reads: %d %d %d %d, stamp %d old\n", i, d_kind, d_a, d_b, d_c, d_age);
	if
	:: d_kind == BEAT || d_kind == BEAT_ACCEPTED ->
		on_beat(i, (d_kind == BEAT_ACCEPTED), d_a, d_b, d_c, d_age, d_after)
	:: d_kind == NO_SESSION -> session_gone(i)
	:: d_kind == GRANT ->
		resent[i] = (resent[i] == d_b -> 0 : resent[i]);
		on_grant(i, d_a, d_b, d_c, d_age)
	:: d_kind == PUSHED -> on_grant(i, d_a, d_b, d_c, d_age)
	:: d_kind == RELEASED -> giving[i] = giving[i] & (255 - bit_of(d_a))
	:: d_kind == CANCELLED -> cancelling[i] = cancelling[i] & (255 - bit_of(d_a))
	:: d_kind == REVOKED -> on_revoked(i, d_a)
	:: d_kind == DROPPED ->
		if
		:: d_a == request[i] -> ask_again(i)
		:: else
		fi
	fi;
	d_kind = 0; d_a = 0; d_b = 0; d_c = 0; d_age = 0; d_after = 0
}

hidden byte d_kind, d_a, d_b, d_c, d_age, d_after;

inline lowest(set) {
	n_ = 0;
	do
	:: set & bit_of(n_) -> break
	:: else -> n_++
	od
}

inline connect(i) {
	linked[i] = 1; gen[i]++;
#ifndef NO_COVER
	/* What is held is named again: this server may have given it away. */
	if
	:: held[i] -> renewed[i] = 0; unclaimed[i] = 1
	:: else
	fi;
#endif
	send(i, (known[i] -> RESUME : OPEN), named(i) + 8 * request[i], 0)
}

#define can_send(i) (linked[i] && up_n[i] < UP)
#define sendable(i) (can_send(i) && (need_open[i] || (open[i] && (need_release[i] || need_cancel[i] || need_acquire[i]))))
#define beat(k) (k >= OPEN && k <= KEEP)
/* One heartbeat at most is under way: the answers of two would differ only in their age. */
#define beating(i) (beat(up_kind[i * UP]) || beat(up_kind[i * UP + 1]) || beat(up_kind[i * UP + 2]) \
	|| answer(down_kind[i * DOWN]) || answer(down_kind[i * DOWN + 1]) || answer(down_kind[i * DOWN + 2]) \
	|| answer(down_kind[i * DOWN + 3]) || answer(down_kind[i * DOWN + 4]))
#define answer(k) (k >= BEAT && k <= NO_SESSION)
#ifdef PROMPT
#define beat_due(i) (open[i] && (beats[i] == 0 || (beats[i] == 1 && unclaimed[i])) && !beating(i))
#define beaten(i) beats[i]++
#else
/* The heartbeats of a process that wants nothing are left out, but for one just before it asks: refresh(). */
#define beat_due(i) (open[i] && (!idle(i) || giving[i] || cancelling[i]) && !beating(i))
#define beaten(i) skip
#endif

/* What is due goes out in its order. */
inline send_due(i) {
	if
	:: need_open[i] -> need_open[i] = 0; send(i, OPEN, named(i), 0)
	:: !need_open[i] && need_release[i] ->
		lowest(need_release[i]);
		need_release[i] = need_release[i] & (255 - bit_of(n_));
		send(i, RELEASE, n_, 0)
	:: !need_open[i] && !need_release[i] && need_cancel[i] ->
		lowest(need_cancel[i]);
		need_cancel[i] = need_cancel[i] & (255 - bit_of(n_));
		send(i, CANCEL, n_, 0)
	:: else -> need_acquire[i] = 0; asked[i] = 1; send(i, ACQUIRE, request[i], 0)
	fi;
	n_ = 0
}

/* The engine writes at once. */
inline flush(i) {
	do
	:: sendable(i) -> send_due(i)
	:: else -> break
	od
}

/* The processes are alike: so the first is taken to be the first to ask. */
#define may_ask(i) (asks && asked_n[i] < REQS && (i == 0 || asked_n[i - 1] || crashed[i - 1]))

#define can_refresh(i) (!crashed[i] && idle(i) && open[i] && s_there[i] && s_gen[i] == gen[i] && !away[i] \
	&& (s_quiet[i] || s_stamp[i]) && !up_n[i])

proctype process(byte i) {
	do
	:: d_step { !crashed[i] && !linked[i] ->
		printf("process %d connects\n", i);
		connect(i); check() }
	:: d_step { sendable(i) ->
		flush(i); check() }
	:: d_step { can_send(i) && beat_due(i) ->
		printf("process %d sends a heartbeat, names %d\n", i, named(i));
		beaten(i); send(i, KEEP, named(i), 0); check() }
	:: d_step { linked[i] && down_n[i] ->
		receive(i); flush(i); check() }
	:: d_step { !crashed[i] && idle(i) && may_ask(i) ->
		printf("process %d asks\n", i);
		ask(i); flush(i); check() }
	:: d_step { can_refresh(i) && may_ask(i) && room ->
		printf("process %d sends a heartbeat, which arrives, and asks\n", i);
		judge(); s_quiet[i] = 0; s_stamp[i] = 0; look(); ask(i); flush(i); check() }
	:: d_step { held[i] && !crashed[i] ->
		printf("process %d gives %d back\n", i, held[i]);
		give_back(i); flush(i); check() }
	:: d_step { request[i] && !crashed[i] ->
		printf("process %d withdraws request %d\n", i, request[i]);
		withdraw(i); flush(i); check() }
	od
}
