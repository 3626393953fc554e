//! How a result reaches the caller without the engine ever touching the interpreter.
//!
//! A [`Ring`] collects results for one event loop and wakes it through a descriptor, once for a whole batch. A
//! [`Parker`] wakes one blocked thread.

use crate::Outcome;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// A descriptor that can be made readable: an eventfd on Linux, a pipe elsewhere.
#[derive(Debug)]
struct Bell {
    read: OwnedFd,
    #[cfg(not(target_os = "linux"))]
    write: OwnedFd,
}

impl Bell {
    #[cfg(target_os = "linux")]
    fn new() -> std::io::Result<Self> {
        use rustix::event::{EventfdFlags, eventfd};
        let read = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        Ok(Self { read })
    }

    #[cfg(not(target_os = "linux"))]
    fn new() -> std::io::Result<Self> {
        let (read, write) = rustix::pipe::pipe()?;
        for end in [&read, &write] {
            rustix::io::ioctl_fionbio(end, true)?;
            rustix::io::fcntl_setfd(end, rustix::io::FdFlags::CLOEXEC)?;
        }
        Ok(Self { read, write })
    }

    fn ring(&self) {
        #[cfg(target_os = "linux")]
        let end = &self.read;
        #[cfg(not(target_os = "linux"))]
        let end = &self.write;
        // One wake-up at most is on its way, so neither a counter nor a pipe can be full; nothing else can fail.
        let _ = rustix::io::write(end, &1u64.to_ne_bytes());
    }

    fn silence(&self) {
        let mut word = [0u8; 8];
        // Nothing to read is no error: the loop may call without a wake-up.
        let _ = rustix::io::read(&self.read, &mut word);
    }
}

/// Results for one event loop.
#[derive(Debug)]
pub struct Ring {
    items: Mutex<Vec<(u64, Outcome)>>,
    signalled: AtomicBool,
    bell: Bell,
}

impl Ring {
    /// A ring with its own descriptor.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self {
            items: Mutex::default(),
            signalled: AtomicBool::new(false),
            bell: Bell::new()?,
        })
    }

    /// The descriptor that becomes readable when there is something to drain.
    pub fn fileno(&self) -> RawFd {
        self.bell.read.as_raw_fd()
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
    /// Nobody waits for it.
    Nobody,
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
            Self::Parker(parker) => parker.put(outcome),
            Self::Nobody => {}
        }
    }
}
