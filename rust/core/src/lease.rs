//! What a holder may believe about its lease, and for how long.
//!
//! A lease of length T is valid until `stamp + T − drift`, where the stamp is the client's own monotonic time at
//! which it sent the last heartbeat that the server is known to have processed before the grant, or that named the
//! lease afterwards. Never from the time of the request or of the answer: both may be late.

use crate::locks::Ask;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

/// Microseconds: monotonic time since an unspecified start, or a length of time.
pub type Micros = u64;

/// A grant out of the queue counts this long at most until a heartbeat has claimed it.
pub const CLAIM_WINDOW: Micros = 3_000_000;

/// How long a claim waits for others to go with it; a small part of the claim window.
pub const CLAIM_DELAY: Micros = 20_000;

/// The shortest lease: two heartbeats at their shortest interval still fit.
pub const SHORTEST: Micros = 100_000;

/// What is taken off a lease for the difference in speed between two clocks: 1 % and 2 ms.
pub fn drift(timeout: Micros) -> Micros {
    timeout / 100 + 2_000
}

/// Stamp of the last heartbeat of a session whose answer has come. All its confirmed leases count from it, so that
/// a renewal is one store, however many there are.
#[derive(Debug, Default)]
pub struct SessionClock(AtomicU64);

impl SessionClock {
    /// The stamp.
    pub fn confirmed(&self) -> Micros {
        self.0.load(Ordering::Acquire)
    }

    /// Moves the stamp forward; an older one changes nothing.
    pub fn confirm(&self, stamp: Micros) {
        self.0.fetch_max(stamp, Ordering::AcqRel);
    }
}

/// Why a lease ended before its holder gave it back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum LossReason {
    /// No heartbeat was confirmed in time.
    Deadline = 1,
    /// The server gave it to somebody else.
    Revoked = 2,
    /// The server no longer knows it (restart without its data, failover).
    Forgotten = 3,
    /// The server no longer knows the whole session.
    SessionEnded = 4,
    /// An operator took it away.
    Forced = 5,
    /// It was held for as long as its holder had allowed at most.
    HeldTooLong = 6,
}

impl LossReason {
    /// The sentence that the holder reads.
    pub fn text(self) -> &'static str {
        match self {
            Self::Deadline => "its lease ran out before a heartbeat was confirmed",
            Self::Revoked => "the server ended the lease",
            Self::Forgotten => "the server no longer knows the lease",
            Self::SessionEnded => "the server no longer knows this process's session",
            Self::Forced => "it was released by force",
            Self::HeldTooLong => "it was held for longer than max_hold",
        }
    }

    fn from_u8(value: u8) -> Option<Self> {
        [
            Self::Deadline,
            Self::Revoked,
            Self::Forgotten,
            Self::SessionEnded,
            Self::Forced,
            Self::HeldTooLong,
        ]
        .into_iter()
        .find(|reason| *reason as u8 == value)
    }
}

const HELD: u8 = 0;
const RELEASED: u8 = 255;

/// One lease, shared by the engine, which moves it, and the handle, which reads it without waiting for the engine.
#[derive(Debug)]
pub struct Lease {
    /// Number of the lease in this process.
    pub id: u64,
    /// Fencing token.
    pub fence: u64,
    /// What was asked for.
    pub ask: Arc<Ask>,
    /// Place in the queue that it came from, from 1 on; 0 if it was granted at once.
    pub place: u32,
    state: AtomicU8,
    base: AtomicU64,
    timeout: AtomicU64,
    /// The whole timeout counts, not only the claim window.
    whole: AtomicBool,
    /// The session's heartbeats extend it.
    renewed: AtomicBool,
    session: Arc<SessionClock>,
}

impl Lease {
    /// A lease as it was granted, counting from `base`. `claimed` is false for a grant out of the queue.
    pub fn new(
        (id, fence, place): (u64, u64, u32),
        ask: Arc<Ask>,
        base: Micros,
        claimed: bool,
        session: Arc<SessionClock>,
    ) -> Self {
        Self {
            id,
            fence,
            place,
            state: AtomicU8::new(HELD),
            base: AtomicU64::new(base),
            timeout: AtomicU64::new(ask.timeout),
            whole: AtomicBool::new(claimed),
            renewed: AtomicBool::new(claimed && !ask.fixed),
            session,
            ask,
        }
    }

    /// Name of the lock.
    pub fn name(&self) -> &Arc<str> {
        &self.ask.name
    }

    /// The lease has a deadline of its own and is not renewed.
    pub fn fixed(&self) -> bool {
        self.ask.fixed
    }

    /// Length of the lease.
    pub fn timeout(&self) -> Micros {
        self.timeout.load(Ordering::Acquire)
    }

    /// The monotonic time until which the holder may believe that it holds.
    pub fn valid_until(&self) -> Micros {
        let timeout = self.timeout();
        let length = if self.whole.load(Ordering::Acquire) {
            timeout
        } else {
            timeout.min(CLAIM_WINDOW)
        };
        let mut base = self.base.load(Ordering::Acquire);
        if self.renewed.load(Ordering::Acquire) {
            base = base.max(self.session.confirmed());
        }
        (base + length).saturating_sub(drift(length))
    }

    /// True while the lease is held and its local deadline is ahead.
    pub fn held_at(&self, now: Micros) -> bool {
        self.state.load(Ordering::Acquire) == HELD && now < self.valid_until()
    }

    /// True once the holder gave it back.
    pub fn released(&self) -> bool {
        self.state.load(Ordering::Acquire) == RELEASED
    }

    /// Why it was lost, if it was told.
    pub fn loss(&self) -> Option<LossReason> {
        LossReason::from_u8(self.state.load(Ordering::Acquire))
    }

    /// Ends it as given back; false if it had ended before.
    pub fn release(&self) -> bool {
        self.state
            .compare_exchange(HELD, RELEASED, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }

    /// Ends it as lost; false if it had ended before.
    pub fn lose(&self, reason: LossReason) -> bool {
        self.state
            .compare_exchange(HELD, reason as u8, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }

    /// True while the session's heartbeats extend it.
    pub fn renewed(&self) -> bool {
        self.renewed.load(Ordering::Acquire)
    }

    /// The whole timeout counts, not only the claim window.
    pub(crate) fn whole(&self) -> bool {
        self.whole.load(Ordering::Acquire)
    }

    /// A heartbeat sent at `stamp` named it and the server accepted: the whole timeout counts from there, except
    /// that a claim does not move the server's deadline of a fixed one.
    pub(crate) fn claimed(&self, stamp: Micros) {
        if !self.fixed() {
            self.base.fetch_max(stamp, Ordering::AcqRel);
        }
        self.whole.store(true, Ordering::Release);
        self.renewed.store(!self.fixed(), Ordering::Release);
    }

    /// Heartbeats no longer extend it until one has named it (after a reconnection).
    pub(crate) fn freeze(&self) {
        self.base
            .fetch_max(self.session.confirmed(), Ordering::AcqRel);
        self.renewed.store(false, Ordering::Release);
    }

    /// Another length, counted from `base` if that is later than what it counted from.
    pub(crate) fn resize(&self, timeout: Micros, base: Option<Micros>) {
        if let Some(base) = base {
            self.base.fetch_max(base, Ordering::AcqRel);
        }
        self.timeout.store(timeout, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(timeout: Micros, fixed: bool, claimed: bool) -> (Lease, Arc<SessionClock>) {
        let clock = Arc::new(SessionClock::default());
        clock.confirm(1_000_000);
        (
            Lease::new(
                (1, 7, 0),
                Arc::new(Ask {
                    name: "a".into(),
                    timeout,
                    fixed,
                    ..Ask::default()
                }),
                1_000_000,
                claimed,
                clock.clone(),
            ),
            clock,
        )
    }

    #[test]
    fn counts_from_the_stamp_and_moves_with_the_session() {
        let (lease, clock) = lease(10_000_000, false, true);
        assert_eq!(lease.valid_until(), 11_000_000 - drift(10_000_000));
        clock.confirm(5_000_000);
        assert_eq!(lease.valid_until(), 15_000_000 - drift(10_000_000));
        clock.confirm(4_000_000);
        assert_eq!(lease.valid_until(), 15_000_000 - drift(10_000_000));
    }

    #[test]
    fn out_of_the_queue_only_the_claim_window_counts_until_it_is_claimed() {
        let (lease, clock) = lease(10_000_000, false, false);
        clock.confirm(9_000_000);
        assert_eq!(
            lease.valid_until(),
            1_000_000 + CLAIM_WINDOW - drift(CLAIM_WINDOW)
        );
        lease.claimed(2_000_000);
        assert_eq!(lease.valid_until(), 19_000_000 - drift(10_000_000));
    }

    #[test]
    fn a_fixed_or_frozen_lease_is_not_extended() {
        let (fixed, clock) = lease(10_000_000, true, true);
        clock.confirm(9_000_000);
        fixed.claimed(9_000_000);
        assert_eq!(fixed.valid_until(), 11_000_000 - drift(10_000_000));
        let (frozen, clock) = lease(10_000_000, false, true);
        frozen.freeze();
        clock.confirm(9_000_000);
        assert_eq!(frozen.valid_until(), 11_000_000 - drift(10_000_000));
    }

    #[test]
    fn ends_once() {
        let (lease, _) = lease(10_000_000, false, true);
        assert!(lease.lose(LossReason::Revoked));
        assert!(!lease.release());
        assert_eq!(lease.loss(), Some(LossReason::Revoked));
        assert!(!lease.held_at(0));
    }
}
