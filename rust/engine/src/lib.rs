//! The engine: one thread per process that owns the connections and everything that is leased.
//!
//! It never touches the interpreter. Calls come in under a short lock, results go out through a [`ring::Ring`] or
//! a [`ring::Parker`].

#[cfg(not(feature = "shuttle"))]
mod bell;
mod chase;
pub mod clock;
mod cluster;
mod driver;
mod frame;
mod greeting;
mod guide;
pub mod node;
pub mod partitions;
pub mod process;
pub mod registry;
pub mod ring;
pub mod scripts;
mod sentinels;
pub mod sync;
pub mod transport;
pub mod wire;

use dotmac_core::lease::Lease;
use dotmac_core::locks::Failure;
use node::Node;
use partitions::{Partitions, Stats};
use ring::Ring;
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use sync::{Condvar, Mutex};
use transport::Target;
use wire::Value;

/// How a call ended, or what happened to a lease.
#[derive(Debug, Clone)]
pub enum Outcome {
    /// The lock is held.
    Granted(Arc<Lease>),
    /// It is not free; milliseconds that the holder's lease has left.
    NotFree(u64),
    /// Waiting would close this cycle: six texts per edge, see `locks::Event::Deadlock`.
    Deadlock(Vec<String>),
    /// The lock is in use as another kind, as the scripts write it.
    Mismatch(String),
    /// Nothing was offered under that fence.
    NotOffered,
    /// The patience of the request has ended.
    TimedOut,
    /// The request was withdrawn.
    Cancelled,
    /// Given back; true if it was still held.
    Released(bool),
    /// Extended; true if it was still held.
    Extended(bool),
    /// The call failed.
    Failed(Failure),
    /// The server is of another kind, or set up otherwise, than it was said to be.
    Misconfigured(String),
    /// A script's answer.
    Reply(Value),
    /// The echo of an echo.
    Echo,
    /// A lease was lost; the slot is the lease's number.
    Lost(Arc<Lease>),
    /// A release that nobody waited for ended in this way; the slot says who wants to know.
    NotGivenBack(Arc<Lease>, Box<Outcome>),
}

/// What an engine is made from.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where the server is.
    pub target: Target,
    /// First part of every key.
    pub namespace: String,
    /// Base of the session's name, unique among all processes.
    pub session: String,
    /// Who this process is, as JSON, for those who look.
    pub who: String,
    /// Seed of the jitter.
    pub chance: u64,
}

/// The thread is gone when this is true.
#[derive(Debug, Default)]
struct Done {
    flag: Mutex<bool>,
    changed: Condvar,
}

impl Done {
    fn set(&self) {
        *self.flag.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }

    fn wait(&self, limit: Duration) -> bool {
        let flag = self.flag.lock().unwrap_or_else(PoisonError::into_inner);
        let (flag, _) = self
            .changed
            .wait_timeout_while(flag, limit, |set| !*set)
            .unwrap_or_else(PoisonError::into_inner);
        *flag
    }
}

/// A running engine. Dropping it does not stop the thread; `close` does.
pub struct Engine {
    /// The process that it belongs to.
    pub pid: u32,
    partitions: Arc<Partitions>,
    done: Arc<Done>,
}

impl Engine {
    /// Starts the thread.
    pub fn start(settings: &Settings) -> std::io::Result<Self> {
        let (partitions, births) = Partitions::new(settings);
        let done = Arc::new(Done::default());
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let (theirs, ended) = (partitions.clone(), done.clone());
        std::thread::Builder::new()
            .name(String::from("dotmac-engine"))
            .spawn(move || {
                let work = std::panic::AssertUnwindSafe(|| runtime.block_on(theirs.drive(births)));
                if std::panic::catch_unwind(work).is_err() {
                    // A defect of ours must not leave anybody waiting.
                    theirs.failed();
                }
                ended.set();
            })?;
        Ok(Self {
            pid: process::id(),
            partitions,
            done,
        })
    }

    /// How many partitions there are: one, unless the target is a cluster.
    pub fn count(&self) -> usize {
        self.partitions.count()
    }

    /// The partition of a lock or a service.
    pub fn of(&self, name: &str) -> &Arc<Node> {
        self.partitions
            .node(dotmac_core::partition::of(name, self.count()))
    }

    /// The partition whose request has this number.
    pub fn of_request(&self, request: u64) -> &Arc<Node> {
        self.numbered((request >> node::REQUESTS) as usize)
    }

    /// A partition by its number; the last one, where that is too high.
    pub fn numbered(&self, partition: usize) -> &Arc<Node> {
        self.partitions.node(partition.min(self.count() - 1))
    }

    /// The partitions that are in use.
    pub fn nodes(&self) -> impl Iterator<Item = &Arc<Node>> {
        self.partitions.begun()
    }

    /// Results for this loop, and losses, go to `ring`.
    pub fn add_ring(&self, ring: &Arc<Ring>) {
        self.partitions.add_ring(ring);
    }

    /// Writes what was held back.
    pub fn flush(&self) {
        for node in self.nodes() {
            node.flush();
        }
    }

    /// What was counted since the start.
    pub fn stats(&self) -> Stats {
        let mut stats = Stats::default();
        for node in self.nodes() {
            stats.add(&node.lock());
        }
        stats
    }

    /// Gives every lease back, closes the sessions, ends the thread; waits for `limit` at most. True if all was said
    /// in time.
    pub fn close(&self, limit: Duration) -> bool {
        self.partitions.close();
        self.done.wait(limit)
    }
}
