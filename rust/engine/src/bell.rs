//! What wakes an event loop.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};

/// A descriptor that can be made readable: an eventfd on Linux, a pipe elsewhere.
#[derive(Debug)]
pub struct Bell {
    read: OwnedFd,
    #[cfg(not(target_os = "linux"))]
    write: OwnedFd,
}

impl Bell {
    /// A silent one.
    #[cfg(target_os = "linux")]
    pub fn new() -> std::io::Result<Self> {
        use rustix::event::{EventfdFlags, eventfd};
        let read = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        Ok(Self { read })
    }

    /// A silent one.
    #[cfg(not(target_os = "linux"))]
    pub fn new() -> std::io::Result<Self> {
        let (read, write) = rustix::pipe::pipe()?;
        for end in [&read, &write] {
            rustix::io::ioctl_fionbio(end, true)?;
            rustix::io::fcntl_setfd(end, rustix::io::FdFlags::CLOEXEC)?;
        }
        Ok(Self { read, write })
    }

    /// What becomes readable.
    pub fn fileno(&self) -> RawFd {
        self.read.as_raw_fd()
    }

    /// Makes it readable.
    pub fn ring(&self) {
        #[cfg(target_os = "linux")]
        let end = &self.read;
        #[cfg(not(target_os = "linux"))]
        let end = &self.write;
        // Each thread has one wake-up at most on its way, so neither a counter nor a pipe can be full; nothing else can
        // fail.
        let _ = rustix::io::write(end, &1u64.to_ne_bytes());
    }

    /// Makes it unreadable.
    pub fn silence(&self) {
        let mut word = [0u8; 8];
        // Nothing to read is no error: the loop may call without a wake-up.
        let _ = rustix::io::read(&self.read, &mut word);
    }
}
