//! What goes in and out of the lock client: questions, commands for the server, answers, events for the callers.

use crate::lease::{Lease, Micros};
use std::sync::Arc;

/// What a caller asks for.
#[derive(Debug, Clone)]
pub struct Ask {
    /// Name of the lock.
    pub name: Arc<str>,
    /// Scope that will own it.
    pub owner: Arc<str>,
    /// Length of the lease.
    pub timeout: Micros,
    /// The lease is not renewed but ends after `timeout`.
    pub fixed: bool,
    /// Wait in the queue if it is not free.
    pub wait: bool,
    /// Time from now after which to give up waiting.
    pub patience: Option<Micros>,
    /// Wall-clock milliseconds, for people who look at the list of locks.
    pub since: u64,
}

/// What the driver has to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Keeps, opens or resumes the session.
    Heartbeat(Heartbeat),
    /// Asks for the lock of a request; `Client::request` has the rest.
    Acquire(u64),
    /// Gives a lease back.
    Release {
        /// Name of the lock.
        name: Arc<str>,
        /// Fencing token of the lease.
        fence: u64,
    },
    /// Takes a request out of the queue, or gives back what it was granted.
    Cancel {
        /// Number of the request.
        request: u64,
        /// Session under which it was made.
        sid: Arc<str>,
        /// Name of the lock.
        name: Arc<str>,
    },
    /// Changes the length of a lease.
    Extend(u64),
}

/// How a heartbeat is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Open a new session.
    Open,
    /// Take up a session on a new connection.
    Resume,
    /// Keep it.
    Keep,
}

/// What a heartbeat says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heartbeat {
    /// New, resumed or kept.
    pub mode: Mode,
    /// Session.
    pub sid: String,
    /// Generation of the connection.
    pub gen_: u64,
    /// Monotonic send time.
    pub stamp: Micros,
    /// How long the session shall live from here.
    pub longest: Micros,
    /// Revocations acknowledged.
    pub acknowledge: String,
    /// Leases that it claims: lock and fence.
    pub claims: Vec<(Arc<str>, u64)>,
}

/// The answer to a heartbeat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HeartbeatReply {
    /// The session lives.
    Alive {
        /// Epoch of the partition's data.
        epoch: String,
        /// Revocations not yet acknowledged: `fence reason;` …
        revoked: String,
        /// Fences of the accepted claims.
        accepted: Vec<u64>,
    },
    /// The server does not know the session.
    Gone,
}

/// The answer to an acquire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AcquireReply {
    /// Held.
    Granted {
        /// Fencing token.
        fence: u64,
        /// Stamp of the session's last heartbeat before the grant.
        stamp: Micros,
        /// False when it was granted out of the queue and must be claimed.
        claimed: bool,
    },
    /// In the queue.
    Waiting,
    /// Not free, and the request did not want to wait. Milliseconds that the holder's lease has left.
    NotFree(u64),
    /// Waiting would close this cycle of locks.
    Deadlock(Vec<String>),
    /// The session is not known.
    NoSession,
    /// A newer connection of this session took over.
    Superseded,
}

/// Why a request failed for a reason that is not the lock's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// No connection within the request's time; the text is the last error.
    Unavailable(String),
    /// Connected, but no answer within the request's time.
    NoAnswer,
    /// The server answered with an error.
    Refused(String),
    /// The server does not accept the credentials.
    Denied(String),
    /// The engine was closed.
    Closed,
}

/// What the driver has to tell a caller.
#[derive(Debug, Clone)]
pub enum Event {
    /// The lock is held.
    Granted(u64, Arc<Lease>),
    /// The lock is not free; milliseconds that the holder's lease has left.
    NotFree(u64, u64),
    /// Waiting would close this cycle.
    Deadlock(u64, Vec<String>),
    /// The patience of the request has ended.
    TimedOut(u64),
    /// The request was cancelled by its caller.
    Cancelled(u64),
    /// The release was answered: true if the lease was still held.
    Released(u64, bool),
    /// The extension was answered: true if the lease was still held.
    Extended(u64, bool),
    /// The call failed.
    Failed(u64, Failure),
    /// A lease was lost.
    Lost(Arc<Lease>),
    /// The session is open; true if it is a new one, so that what hangs on it has to be told again.
    Opened(bool),
}
