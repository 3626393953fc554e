/* The replica knows the primary as it was at one moment; from there the last writes are missing when it is promoted. */

#define LAG 1             /* ticks that are missing at most */
byte lag;

inline forget_copy() {
	for (j_ : 0 .. N - 1) {
		r_there[j_] = 0; r_gen[j_] = 0; r_quiet[j_] = 0; r_stamp[j_] = 0; r_revoked[j_] = 0; r_dropped[j_] = 0
	}
	for (j_ : 0 .. QMAX - 1) { r_q[j_] = 0 }
	j_ = 0;
	r_holder = 0; r_fence = 0; r_request = 0; r_claimed = 0; r_q_n = 0; r_fences = 0; r_gap = 0
}

inline copy() {
	printf("the replica knows what the server knows\n");
	for (i_ : 0 .. N - 1) {
		r_there[i_] = s_there[i_]; r_gen[i_] = s_gen[i_]; r_quiet[i_] = s_quiet[i_]; r_stamp[i_] = s_stamp[i_];
		r_revoked[i_] = s_revoked[i_]; r_dropped[i_] = s_dropped[i_]
	}
	for (i_ : 0 .. QMAX - 1) { r_q[i_] = q[i_] }
	i_ = 0;
	r_holder = holder; r_fence = h_fence; r_request = h_request; r_claimed = h_claimed; r_q_n = q_n;
	r_fences = fences; r_gap = gap
}

inline promote() {
	printf("the replica takes over\n");
	for (i_ : 0 .. N - 1) {
		s_there[i_] = r_there[i_]; s_gen[i_] = r_gen[i_]; s_quiet[i_] = r_quiet[i_]; s_stamp[i_] = r_stamp[i_];
		s_revoked[i_] = r_revoked[i_]; s_dropped[i_] = r_dropped[i_];
		hang_up(i_);
		late_kind[i_] = 0; late_a[i_] = 0; late_age[i_] = 0; late_gen[i_] = 0;
		away[i_] = 1
	}
	for (i_ : 0 .. QMAX - 1) { q[i_] = r_q[i_] }
	i_ = 0;
	holder = r_holder; h_fence = r_fence; h_request = r_request; h_claimed = r_claimed; q_n = r_q_n; gap = r_gap;
#ifdef FENCES_COUNT
	fences = r_fences;
#endif
	forget_copy(); lag = 0;
	calm()
}
