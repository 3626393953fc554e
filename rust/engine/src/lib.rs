//! The engine: one thread per process that owns the connections and everything that is leased.
//!
//! It never touches the interpreter. Calls come in under a short lock, results go out through a [`ring::Ring`] or
//! a [`ring::Parker`].

pub mod clock;
mod driver;
pub mod node;
pub mod registry;
pub mod ring;
pub mod scripts;
pub mod transport;
pub mod wire;

use dotmac_core::lease::Lease;
use dotmac_core::locks::Failure;
use node::Node;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;
use transport::Target;
use wire::Value;

/// How a call ended, or what happened to a lease.
#[derive(Debug, Clone)]
pub enum Outcome {
    /// The lock is held.
    Granted(Arc<Lease>),
    /// It is not free; milliseconds that the holder's lease has left.
    NotFree(u64),
    /// Waiting would close this cycle of locks.
    Deadlock(Vec<String>),
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
    /// A script's answer.
    Reply(Value),
    /// The echo of an echo.
    Echo,
    /// A lease was lost; the slot is the lease's number.
    Lost(Arc<Lease>),
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
    /// The one partition of a standalone server.
    pub node: Arc<Node>,
    /// The process that it belongs to.
    pub pid: u32,
    done: Arc<Done>,
}

impl Engine {
    /// Starts the thread.
    pub fn start(settings: &Settings) -> std::io::Result<Self> {
        let node = Arc::new(Node::new(settings));
        let done = Arc::new(Done::default());
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let (theirs, ended) = (node.clone(), done.clone());
        std::thread::Builder::new()
            .name(String::from("dotmac-engine"))
            .spawn(move || {
                let work = std::panic::AssertUnwindSafe(|| runtime.block_on(driver::run(&theirs)));
                if std::panic::catch_unwind(work).is_err() {
                    // A defect of ours must not leave anybody waiting.
                    let mut state = theirs.lock();
                    state.denied(
                        "the engine thread has failed; this is a defect of dotmac-platform",
                    );
                    state.close();
                    let wake = state.take_wake();
                    drop(state);
                    for ring in wake {
                        ring.signal();
                    }
                }
                ended.set();
            })?;
        Ok(Self {
            node,
            pid: std::process::id(),
            done,
        })
    }

    /// Gives every lease back, closes the session, ends the thread; waits for `limit` at most. True if all was said
    /// in time.
    pub fn close(&self, limit: Duration) -> bool {
        let mut state = self.node.lock();
        state.close();
        let _ = self.node.settle(state, true);
        self.node.notify.notify_one();
        self.done.wait(limit)
    }
}
