//! Which process this is. Every use of a handle asks, so that the system is not asked each time: a dozen calls of
//! getpid would be a tenth of what a lock costs.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// Zero until it is known.
static ID: AtomicU32 = AtomicU32::new(0);
static FORKS_ARE_SEEN: AtomicBool = AtomicBool::new(false);

/// The number of this process, in a forked child its own.
pub fn id() -> u32 {
    match ID.load(Ordering::Relaxed) {
        0 => look_up(),
        known => known,
    }
}

extern "C" fn in_child() {
    ID.store(0, Ordering::Relaxed);
}

#[cold]
fn look_up() -> u32 {
    let here = std::process::id();
    // Two threads may get here at once: a handler that runs twice does no harm, unlike a lock held across a fork.
    if !FORKS_ARE_SEEN.load(Ordering::Acquire) {
        // SAFETY: the handler only stores a number, which the child of a process with threads is allowed to do.
        if unsafe { libc::pthread_atfork(None, None, Some(in_child)) } != 0 {
            return here;
        }
        FORKS_ARE_SEEN.store(true, Ordering::Release);
    }
    ID.store(here, Ordering::Relaxed);
    here
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_forked_child_has_its_own_number() {
        assert_eq!(super::id(), std::process::id());
        assert_eq!(super::id(), std::process::id());
        // SAFETY: the child only looks at numbers and ends.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let told = super::id() == std::process::id() && super::id() == std::process::id();
            // SAFETY: ends the child at once, without what the parent's test harness has set up.
            unsafe { libc::_exit(i32::from(!told)) };
        }
        let mut status = -1;
        // SAFETY: the address is that of the number above.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert_eq!(status, 0);
    }
}
