//! The one place that reads a clock.

use dotmac_core::lease::Micros;
use rustix::time::{ClockId, clock_gettime};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Monotonic microseconds. On Linux they go on while the machine sleeps, as the server's clock does: a lease must
/// not outlive its time because the holder's laptop was closed.
pub fn now() -> Micros {
    #[cfg(test)]
    if let Some(time) = PRETENDED.get() {
        return time;
    }
    #[cfg(target_os = "linux")]
    let clock = ClockId::Boottime;
    #[cfg(not(target_os = "linux"))]
    let clock = ClockId::Monotonic;
    let t = clock_gettime(clock);
    t.tv_sec as u64 * 1_000_000 + t.tv_nsec as u64 / 1_000
}

/// Wall-clock milliseconds since 1970, for people to read only.
pub fn wall_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64)
}

/// From now until `at`; nothing if it has passed, a minute at most.
pub fn until(at: Micros) -> Duration {
    Duration::from_micros(at.saturating_sub(now()).min(60_000_000))
}

#[cfg(test)]
thread_local! {
    static PRETENDED: std::cell::Cell<Option<Micros>> = const { std::cell::Cell::new(None) };
}

/// From here on it is this time for the test on this thread.
#[cfg(test)]
pub fn pretend(time: Micros) {
    PRETENDED.set(Some(time));
}
