/* One lock, its server, and processes that ask for it: what they may believe, and when. See README.md.
 *
 * Time is relative: every moment is kept as its age in ticks, so that the states stay few and time has no end.
 * A rule is switched off by -D (the names stand in the README); the scenario is chosen by -D, too.
 */

#ifndef N
#define N 2               /* processes */
#endif
/* In ticks. */
#ifndef T
#define T 3               /* length of a lease */
#endif
#ifndef CW
#define CW 2              /* claim window */
#endif
#ifndef G
#define G 1               /* the longest gap that the logical clock advances over */
#endif
#ifdef SWEEP
#define SL (T + 1)        /* length of a session: longer than any lease */
#else
#define SL T              /* as long as sessions are not swept, an older age makes no difference */
#endif
#ifndef NO_DRIFT
#define DRIFT 1
#else
#define DRIFT 0
#endif
#ifndef REQS
#define REQS 2            /* requests of a process */
#endif
#ifndef ASKS
#define ASKS (N * REQS)   /* of all together */
#endif
#ifndef FENCES
#define FENCES 4          /* grants in all */
#endif
#ifndef DROPS
#define DROPS 0           /* connections lost, in all */
#endif
#ifndef STEPS
#define STEPS 0           /* steps of the server's clock */
#endif
#ifndef SLOW
#define SLOW 0            /* 1: each process's clock may lose a tick */
#endif
#ifndef CRASHES
#define CRASHES 0
#endif
#ifndef FORCES
#define FORCES 0          /* releases by force */
#endif
#ifdef CLOCK_WALL
#define GAP_MAX (SL + 1)
#else
#define GAP_MAX (G + 1)
#endif

#define UP 3              /* messages on their way to the server, per process */
#define DOWN 5            /* to the process */
#define QMAX (N * 2)

#define least(a, b) ((a) < (b) -> (a) : (b))
#define bit_of(n) (1 << (n))

/* ---- messages: commands, then answers and pushes */

#define OPEN 1            /* heartbeats: a = fence that is claimed or asserted, age = of the stamp */
#define RESUME 2          /* here a names the request, too, as fence + 8 * request */
#define KEEP 3
#define ACQUIRE 4         /* a = request */
#define RELEASE 5         /* a = fence */
#define CANCEL 6          /* a = request */

#define BEAT 1            /* a = fence named, b = request dropped, c = fence revoked, age = of the stamp */
#define BEAT_ACCEPTED 2   /* the same, and what was named is held */
#define NO_SESSION 3
#define GRANT 4           /* a = fence, b = request, c = claimed already, age = of the stamp */
#define RELEASED 5        /* a = fence */
#define CANCELLED 6       /* a = request */
#define REVOKED 7         /* a = fence */
#define DROPPED 8         /* a = request */
#define PUSHED 9          /* a grant out of the queue; the same as GRANT */

byte up_n[N], up_kind[N * UP], up_a[N * UP], up_age[N * UP];
byte down_n[N], down_kind[N * DOWN], down_a[N * DOWN], down_b[N * DOWN], down_c[N * DOWN], down_age[N * DOWN];
bit down_after[N * DOWN];       /* the answer was made after the server had changed behind the process's back */
/* The first command of a lost connection may still reach the server, at any later time. */
byte late_kind[N], late_a[N], late_age[N], late_gen[N];

/* ---- a process */

bit crashed[N], linked[N], open[N], known[N], need_open[N], need_acquire[N];
byte need_release[N], need_cancel[N];        /* sets, as bits */
byte gen[N], request[N], asked_n[N], resent[N];
bit asked[N];
byte held[N], base[N];                       /* fence; age of what the lease counts from */
bit whole[N], renewed[N], unclaimed[N];
byte giving[N], cancelling[N];               /* not answered yet, as bits */
byte early[N];                               /* a fence that was revoked before its grant was heard of */
byte beats[N];                               /* heartbeats in this tick */
bit slowed[N];
byte epoch_known[N];

/* ---- the server */

bit s_there[N];
byte s_gen[N], s_quiet[N], s_stamp[N], s_revoked[N], s_dropped[N];
byte holder, h_fence, h_request;             /* holder: 0 nobody, else process + 1 */
bit h_claimed;
byte q_n, q[QMAX];                           /* process * 8 + request */
byte fences;
byte gap;                                    /* of the wall clock, since the clock was judged */
byte grace, epoch, uptime;

#ifdef FAILOVER
/* What the replica knows. */
bit r_there[N]; byte r_gen[N], r_quiet[N], r_stamp[N], r_revoked[N], r_dropped[N];
byte r_holder, r_fence, r_request; bit r_claimed; byte r_q_n, r_q[QMAX], r_fences, r_gap;
byte replicated;
#endif

/* ---- faults left, and what only the properties look at */

byte drops = DROPS, steps = STEPS, crashes = CRASHES, forces = FORCES, losses = 1;
bit away[N];              /* the server changed behind its back, and no answer to a heartbeat has told it yet */
byte last_fence;          /* highest fence granted */
byte waited[N], held_for[N];
byte asks = ASKS;

#ifdef NO_CLAIM
#define length(i) T
#else
#define length(i) (whole[i] -> T : CW)
#endif
#ifdef NO_DEADLINE
#define believes(i) (held[i] && !crashed[i])
#else
#define believes(i) (held[i] && !crashed[i] && base[i] < length(i) - DRIFT)
#endif

byte i_, j_, k_, m_, n_; /* of d_steps, always zero between them */
hidden byte x_;

/* ---- properties */

inline check() {
	for (i_ : 0 .. N - 1) {
		/* No lease ends before its holder's own deadline, and so no two believe. */
		assert(!believes(i_) || away[i_] || (holder == i_ + 1 && h_fence == held[i_]));
		for (j_ : 0 .. N - 1) {
#ifdef RESTART
			assert(i_ == j_ || !(believes(i_) && believes(j_)));
#else
			assert(i_ == j_ || away[i_] || away[j_] || !(believes(i_) && believes(j_)));
#endif
		}
	}
	/* Nothing is held by a process that does not know and will not hear of it. */
	if
	:: holder && !crashed[holder - 1] ->
		i_ = holder - 1;
		assert(h_fence == held[i_] || (h_request && h_request == request[i_]) || (giving[i_] & bit_of(h_fence))
			|| (cancelling[i_] & bit_of(h_request)) || !open[i_] || up_n[i_] || down_n[i_]);
	:: else
	fi;
	i_ = 0; j_ = 0
}

/* ---- the network */

inline send(i, what, arg, old) {
	up_kind[i * UP + up_n[i]] = what;
	up_a[i * UP + up_n[i]] = arg;
	up_age[i * UP + up_n[i]] = old;
	up_n[i]++
}

inline tell(i, what, arg, arg2, arg3, old) {
	if
	:: linked[i] ->
		k_ = i * DOWN + down_n[i];
		assert(down_n[i] < DOWN);
		down_kind[k_] = what; down_a[k_] = arg; down_b[k_] = arg2; down_c[k_] = arg3; down_age[k_] = old;
		down_after[k_] = away[i];
		down_n[i]++; k_ = 0
	:: else
	fi
}

inline up_pop(i) {
	up_n[i]--;
	for (k_ : 0 .. UP - 2) {
		up_kind[i * UP + k_] = up_kind[i * UP + k_ + 1];
		up_a[i * UP + k_] = up_a[i * UP + k_ + 1];
		up_age[i * UP + k_] = up_age[i * UP + k_ + 1]
	}
	up_kind[i * UP + UP - 1] = 0; up_a[i * UP + UP - 1] = 0; up_age[i * UP + UP - 1] = 0; k_ = 0
}

inline down_pop(i) {
	down_n[i]--;
	for (k_ : 0 .. DOWN - 2) {
		down_kind[i * DOWN + k_] = down_kind[i * DOWN + k_ + 1];
		down_a[i * DOWN + k_] = down_a[i * DOWN + k_ + 1];
		down_b[i * DOWN + k_] = down_b[i * DOWN + k_ + 1];
		down_c[i * DOWN + k_] = down_c[i * DOWN + k_ + 1];
		down_age[i * DOWN + k_] = down_age[i * DOWN + k_ + 1];
		down_after[i * DOWN + k_] = down_after[i * DOWN + k_ + 1]
	}
	k_ = i * DOWN + DOWN - 1;
	down_kind[k_] = 0; down_a[k_] = 0; down_b[k_] = 0; down_c[k_] = 0; down_age[k_] = 0; down_after[k_] = 0; k_ = 0
}

inline hang_up(i) {
	do
	:: up_n[i] -> up_pop(i)
	:: else -> break
	od;
	do
	:: down_n[i] -> down_pop(i)
	:: else -> break
	od;
	linked[i] = 0; open[i] = 0; need_open[i] = 0; need_acquire[i] = 0; need_release[i] = 0; need_cancel[i] = 0;
	resent[i] = 0
}

inline calm() { /* a fault: waiting is counted anew from the last one */
	for (k_ : 0 .. N - 1) { waited[k_] = 0 }
	k_ = 0
}

#include "server.pml"
#include "process.pml"
#ifdef FAILOVER
#include "replica.pml"
#endif
#include "world.pml"

init {
	atomic {
		epoch = 1; uptime = 5;
		for (i_ : 0 .. N - 1) {
			linked[i_] = 1; open[i_] = 1; known[i_] = 1; s_there[i_] = 1;
#if defined(RESTART) || defined(FLUSH)
			/* The last one is new here, until its first heartbeat is answered. */
			epoch_known[i_] = (i_ < N - 1);
#endif
			run process(i_)
		}
		i_ = 0;
		run server(); run world()
	}
}
