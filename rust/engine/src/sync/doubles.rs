//! What stands for a descriptor, a socket and tokio's `Notify` where shuttle's scheduler runs the threads.

use super::{Condvar, Mutex, MutexGuard};
use std::io::{Error, ErrorKind};
use std::os::fd::RawFd;
use std::sync::PoisonError;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts as an eventfd does; a thread can wait for it.
#[derive(Debug)]
pub struct Bell {
    rung: Mutex<u64>,
    heard: Condvar,
}

impl Bell {
    /// A silent one.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self {
            rung: Mutex::new(0),
            heard: Condvar::new(),
        })
    }

    /// There is none.
    pub fn fileno(&self) -> RawFd {
        -1
    }

    /// Wakes whoever waits.
    pub fn ring(&self) {
        *lock(&self.rung) += 1;
        self.heard.notify_one();
    }

    /// Takes all rings back.
    pub fn silence(&self) {
        *lock(&self.rung) = 0;
    }

    /// Waits until it is rung; how often it was.
    pub fn wait(&self) -> u64 {
        let mut rung = lock(&self.rung);
        while *rung == 0 {
            rung = self
                .heard
                .wait(rung)
                .unwrap_or_else(PoisonError::into_inner);
        }
        *rung
    }
}

/// One permit, as tokio's keeps; beside it the one who waits may watch for anything else that `stir` follows.
#[derive(Debug)]
pub struct Notify {
    given: Mutex<bool>,
    /// Somebody waits.
    idle: Mutex<bool>,
    stirred: Condvar,
}

impl Default for Notify {
    fn default() -> Self {
        Self::new()
    }
}

impl Notify {
    /// Without a permit.
    pub fn new() -> Self {
        Self {
            given: Mutex::new(false),
            idle: Mutex::new(false),
            stirred: Condvar::new(),
        }
    }

    /// Gives the permit.
    pub fn notify_one(&self) {
        *lock(&self.given) = true;
        self.stirred.notify_all();
    }

    /// Something has changed that whoever waits may watch for.
    pub fn stir(&self) {
        drop(lock(&self.given));
        self.stirred.notify_all();
    }

    /// True while somebody waits for whom nothing has come.
    pub fn idle(&self) -> bool {
        !*lock(&self.given) && *lock(&self.idle)
    }

    /// Waits for the permit, and takes it, or for something else.
    pub fn wait(&self, mut other: impl FnMut() -> bool) {
        let mut given = lock(&self.given);
        while !*given {
            if other() {
                return;
            }
            *lock(&self.idle) = true;
            given = self
                .stirred
                .wait(given)
                .unwrap_or_else(PoisonError::into_inner);
            *lock(&self.idle) = false;
        }
        *given = false;
    }

    /// As tokio's.
    pub async fn notified(&self) {
        self.wait(|| false);
        std::future::ready(()).await;
    }
}

/// A socket that holds a few bytes until they are read.
#[derive(Debug)]
pub struct Socket {
    /// Bytes written, and whether the writing side is gone.
    held: Mutex<(Vec<u8>, bool)>,
    came: Condvar,
    capacity: usize,
}

impl Socket {
    /// An empty one.
    pub fn new(capacity: usize) -> Self {
        Self {
            held: Mutex::new((Vec::new(), false)),
            came: Condvar::new(),
            capacity,
        }
    }

    /// Takes as much as fits.
    pub fn try_write(&self, data: &[u8]) -> std::io::Result<usize> {
        let mut held = lock(&self.held);
        let n = data.len().min(self.capacity - held.0.len());
        if n == 0 {
            return Err(Error::from(ErrorKind::WouldBlock));
        }
        held.0.extend_from_slice(&data[..n]);
        self.came.notify_one();
        Ok(n)
    }

    /// True if it takes more.
    pub fn writable(&self) -> bool {
        lock(&self.held).0.len() < self.capacity
    }

    /// Nothing more is written.
    pub fn close(&self) {
        lock(&self.held).1 = true;
        self.came.notify_one();
    }

    /// What was written, once there is something; nothing at the end.
    pub fn read(&self) -> Option<Vec<u8>> {
        let mut held = lock(&self.held);
        loop {
            if !held.0.is_empty() {
                return Some(std::mem::take(&mut held.0));
            }
            if held.1 {
                return None;
            }
            held = self.came.wait(held).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Runs it under schedules that are the same each time: a defect that they show once is shown always.
#[cfg(test)]
pub fn seek(defect: impl Fn() + Send + Sync + 'static) {
    const SEED: u64 = 20_261_128;
    const SCHEDULES: usize = 20_000;
    let schedules = shuttle::scheduler::RandomScheduler::new_from_seed(SEED, SCHEDULES);
    shuttle::Runner::new(schedules, shuttle::Config::new()).run(defect);
}
