//! What this process knows of one instance: calls in flight, and how long calls take.
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Latencies are forgotten with this time constant, in nanoseconds.
const DECAY: f64 = 10e9;
/// A call that failed counts as at least this long, so that an instance that fails fast does not look fast.
const FAILED: f64 = 1e9;
/// Cost of an instance that is in use but has not answered yet: worse than any that has.
const UNKNOWN: f64 = 1e15;

/// Counters of one instance; they outlive the snapshots in which it stands.
#[derive(Debug, Default)]
pub struct Load {
    in_flight: AtomicU32,
    finished: AtomicU64,
    failed: AtomicU64,
    latency: Mutex<Latency>,
}

#[derive(Debug, Default, Clone, Copy)]
struct Latency {
    /// Nanoseconds; zero until the first answer.
    value: f64,
    at: u64,
}

impl Latency {
    fn at(self, now: u64) -> f64 {
        self.value * (-(now.saturating_sub(self.at) as f64) / DECAY).exp()
    }
}

impl Load {
    /// Calls that have begun and not ended.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Calls that have ended, and those of them that failed.
    pub fn finished(&self) -> (u64, u64) {
        (
            self.finished.load(Ordering::Relaxed),
            self.failed.load(Ordering::Relaxed),
        )
    }

    /// A call begins.
    pub fn begin(&self) {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
    }

    /// A call that began is given up without an outcome.
    pub fn abandon(&self) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
    }

    /// A call that began at `began` ends; both times in nanoseconds.
    pub fn end(&self, began: u64, now: u64, ok: bool) {
        self.abandon();
        self.finished.fetch_add(1, Ordering::Relaxed);
        let mut took = now.saturating_sub(began) as f64;
        if !ok {
            self.failed.fetch_add(1, Ordering::Relaxed);
            took = took.max(FAILED);
        }
        let mut latency = self.latency.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = (-(now.saturating_sub(latency.at) as f64) / DECAY).exp();
        // A peak counts at once; what is better than expected is believed slowly.
        let value = if took > latency.value * kept {
            took
        } else {
            latency.value * kept + took * (1.0 - kept)
        };
        *latency = Latency {
            value,
            at: now.max(latency.at),
        };
    }

    /// Expected latency, nanoseconds; zero where nothing is known.
    pub fn latency(&self, now: u64) -> f64 {
        self.latency
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .at(now)
    }

    /// What one more call would cost: latency times calls in flight with it. An idle one of which nothing is
    /// known costs nothing, so that it is tried; until its first answer it then costs more than any other.
    pub fn cost(&self, now: u64) -> f64 {
        let (latency, in_flight) = (self.latency(now), f64::from(self.in_flight()));
        if latency == 0.0 && in_flight > 0.0 {
            UNKNOWN + in_flight
        } else {
            latency * (in_flight + 1.0)
        }
    }
}
