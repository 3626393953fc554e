//! How a result reaches the caller without the engine ever touching the interpreter.
//!
//! A [`Ring`] collects results for one event loop and wakes it through a descriptor, once for a whole batch. A
//! [`Parker`] wakes one blocked thread.

#[cfg(all(test, feature = "shuttle"))]
mod concurrency;

use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Bell, Condvar, Mutex};
use crate::{Outcome, clock};
use dotmac_core::lease::Lease;
use dotmac_core::locks::Failure;
use std::os::fd::RawFd;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc::UnboundedSender;

/// Results for one event loop.
#[derive(Debug)]
pub struct Ring {
    items: Mutex<Vec<(u64, Outcome)>>,
    signalled: AtomicBool,
    pub(crate) bell: Bell,
    /// Microseconds after which the loop counts as stuck; zero: never.
    limit: AtomicU64,
    /// When it last turned.
    turned: AtomicU64,
}

impl Ring {
    /// A ring with its own descriptor.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self {
            items: Mutex::default(),
            signalled: AtomicBool::new(false),
            bell: Bell::new()?,
            limit: AtomicU64::new(0),
            turned: AtomicU64::new(0),
        })
    }

    /// The descriptor that becomes readable when there is something to drain.
    pub fn fileno(&self) -> RawFd {
        self.bell.fileno()
    }

    /// From here on the loop has to turn within so many microseconds; zero ends that.
    pub fn guard(&self, limit: u64) {
        self.turned();
        self.limit.store(limit, Ordering::Release);
    }

    /// The loop has turned.
    pub fn turned(&self) {
        self.turned.store(clock::now(), Ordering::Release);
    }

    /// The loop has not turned for longer than its guard allows.
    pub fn stalled(&self, now: u64) -> bool {
        let limit = self.limit.load(Ordering::Acquire);
        limit > 0 && now.saturating_sub(self.turned.load(Ordering::Acquire)) > limit
    }

    /// Adds a result; `signal` has to follow.
    pub fn push(&self, slot: u64, outcome: Outcome) {
        self.items
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push((slot, outcome));
    }

    /// Wakes the loop, unless a wake-up is already on its way.
    pub fn signal(&self) {
        if !self.signalled.swap(true, Ordering::AcqRel) {
            self.bell.ring();
        }
    }

    /// Takes everything that has come since the last call.
    pub fn drain(&self) -> Vec<(u64, Outcome)> {
        self.bell.silence();
        self.signalled.store(false, Ordering::Release);
        self.take()
    }

    /// The same for somebody else than the loop, which is still woken.
    pub fn take(&self) -> Vec<(u64, Outcome)> {
        std::mem::take(&mut *self.items.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// One blocked thread's result.
#[derive(Debug, Default)]
pub struct Parker {
    outcome: Mutex<Option<Outcome>>,
    arrived: Condvar,
}

impl Parker {
    /// Waits for the result for `limit` at most.
    pub fn wait(&self, limit: Duration) -> Option<Outcome> {
        let outcome = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut outcome, _) = self
            .arrived
            .wait_timeout_while(outcome, limit, |outcome| outcome.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        outcome.take()
    }

    fn put(&self, outcome: Outcome) {
        *self.outcome.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
        self.arrived.notify_one();
    }
}

/// Where a result goes.
#[derive(Debug, Clone)]
pub enum Sink {
    /// To an event loop, under this slot.
    Ring(Arc<Ring>, u64),
    /// To a blocked thread.
    Parker(Arc<Parker>),
    /// Nobody waits for it, but somebody wants to know where a lease could not be given back.
    Unless(Arc<GivenBack>),
    /// To a task of the engine itself, under this number.
    Task(UnboundedSender<(usize, Outcome)>, usize),
    /// Nobody waits for it.
    Nobody,
}

/// A release that nobody waits for, and who is told if it fails.
#[derive(Debug)]
pub struct GivenBack {
    /// What is given back.
    pub lease: Arc<Lease>,
    /// Where a failure goes, under the number of the one who wants to know.
    pub told: (Arc<Ring>, u64),
    /// Counts the failures.
    pub failures: Arc<AtomicU64>,
}

impl Sink {
    /// Hands the result over. The ring that now needs a signal is added to `wake`.
    pub fn put(self, outcome: Outcome, wake: &mut Vec<Arc<Ring>>) {
        match self {
            Self::Ring(ring, slot) => {
                ring.push(slot, outcome);
                if !wake.iter().any(|known| Arc::ptr_eq(known, &ring)) {
                    wake.push(ring);
                }
            }
            // Whoever closes the engine waits until the server has heard of all releases.
            Self::Unless(_)
                if matches!(
                    outcome,
                    Outcome::Released(true) | Outcome::Failed(Failure::Closed)
                ) => {}
            Self::Unless(release) => {
                release.failures.fetch_add(1, Ordering::Relaxed);
                let (ring, whose) = release.told.clone();
                let failed = Outcome::NotGivenBack(release.lease.clone(), Box::new(outcome));
                Self::Ring(ring, whose).put(failed, wake);
            }
            Self::Parker(parker) => parker.put(outcome),
            // It may have stopped waiting.
            Self::Task(task, number) => drop(task.send((number, outcome))),
            Self::Nobody => {}
        }
    }
}
