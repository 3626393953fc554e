//! What goes in and out of the lock client: questions, commands for the server, answers, events for the callers.

use crate::lease::{Lease, Micros};
use std::fmt;
use std::sync::Arc;

/// How many may hold a lock at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kind {
    /// One holder.
    #[default]
    Exclusive,
    /// Any number, but no exclusive one beside them.
    Shared,
    /// So many; everybody has to name the same number.
    Semaphore(u32),
}

/// As the scripts write it.
impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exclusive => f.write_str("x"),
            Self::Shared => f.write_str("s"),
            Self::Semaphore(permits) => write!(f, "k{permits}"),
        }
    }
}

/// Whose wait ends where a wait would close a cycle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Victim {
    /// Whoever got its lock of the cycle last.
    #[default]
    Youngest,
    /// Whoever asked with the lowest priority; the youngest of those.
    LowestPriority,
    /// Whoever holds the fewest locks in its process; the youngest of those.
    FewestLocks,
    /// The one that closes the cycle.
    Closer,
}

/// The highest priority; the lowest is its negative.
pub const HIGHEST_PRIORITY: i16 = 4_999;

/// What a caller asks for.
#[derive(Debug, Clone, Default)]
pub struct Ask {
    /// Name of the lock.
    pub name: Arc<str>,
    /// How many may hold it.
    pub kind: Kind,
    /// Scope that will own it. One that begins with `=` is the same in every process.
    pub owner: Arc<str>,
    /// Scopes that can't go on before this request has ended, from the nearest on.
    pub awaited_by: Vec<Arc<str>>,
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
    /// Higher ones are served first, `-HIGHEST_PRIORITY` to `HIGHEST_PRIORITY`.
    pub priority: i16,
    /// Who gives up where the wait would close a cycle.
    pub victim: Victim,
    /// Where in the code it is asked for.
    pub place: Arc<str>,
    /// Its place in the queue is wanted, if it has to wait.
    pub numbered: bool,
    /// After this time of holding the lease ends, renewed or not.
    pub max_hold: Option<Micros>,
    /// The fence under which the lock was offered; it is taken over.
    pub offered: Option<u64>,
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
    /// Gives a lease up to whoever takes it over within a time.
    Offer {
        /// Name of the lock.
        name: Arc<str>,
        /// Fencing token of the lease.
        fence: u64,
        /// For how long.
        within: Micros,
    },
    /// Takes leases back on a server that lost them; `Client::lease` has the rest.
    Assert(Vec<u64>),
    /// One page of what the server thinks that the session holds.
    Mine(u64),
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
    /// The life of the data that this client knew before, and the last number that it ever heard of, where a session
    /// opens or is resumed.
    pub knew: Option<(String, u64)>,
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
        /// Time until something comes due that a heartbeat does.
        due: Option<Micros>,
        /// Leases that the server has lost can be taken back.
        taking_back: bool,
        /// The last number, fencing token or rank, that was given out.
        last_number: u64,
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
    Waiting {
        /// Time after which a holder's lease ends unless it is renewed; nothing where others wait for that already.
        rest: Option<Micros>,
        /// Its rank there.
        rank: String,
        /// Its place there, from 1 on; 0 where it was not asked for.
        place: u32,
    },
    /// Not free, and the request did not want to wait. Milliseconds that the holder's lease has left.
    NotFree(u64),
    /// Waiting would close this cycle; see [`Event::Deadlock`].
    Deadlock(Vec<String>),
    /// The lock is in use as another kind, as the scripts write it.
    Mismatch(String),
    /// Nothing was offered under that fence, or not any more.
    NotOffered,
    /// Nothing is granted for so long: those who held something take it back.
    Grace(Micros),
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
    /// No heartbeats are sent, because an event loop of the process has stood still for too long.
    Stalled,
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
    /// Waiting closes this cycle. Six texts per edge, in the order of the cycle: lock, who waits for it, process of that
    /// one (JSON), where it asked, who holds the lock, where that was acquired.
    Deadlock(u64, Vec<String>),
    /// The lock is in use as another kind.
    Mismatch(u64, String),
    /// Nothing was offered under that fence.
    NotOffered(u64),
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
