//! The client's side of the lock protocol for one partition, without I/O.
//!
//! Calls and answers go in with the time at which they happen; commands for the server and events for the callers
//! come out. The driver sends the commands in their order on one connection and hands every answer back. After a
//! reconnection whatever was not answered is sent again: each command is idempotent on its request or its fence.

mod answers;
mod leases;
mod requests;
mod time;
mod wire;

pub use wire::{AcquireReply, Ask, Command, Event, Failure, Heartbeat, HeartbeatReply, Mode};

use crate::lease::{Lease, LossReason, Micros};
use crate::session::Session;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

/// Claims that one heartbeat carries at most, so that the script stays short.
const CLAIMS: usize = 500;
/// How long a place in a queue is kept for while the server is away.
const OUTAGE_LIMIT: Micros = 30_000_000;
/// Unknown revocations remembered, against a grant that comes after its own revocation.
const REMEMBERED: usize = 4_096;

/// A request that is not over.
#[derive(Debug)]
pub struct Request {
    /// What was asked for.
    pub ask: Ask,
    /// Session under which it was last sent.
    pub sid: Arc<str>,
    token: u64,
    /// When the caller asked, or when its last place in the queue was lost.
    first: Micros,
    /// When it was first sent under its number, if it was: no grant can be older.
    asked: Option<Micros>,
    gives_up: Option<Micros>,
    waiting: bool,
}

#[derive(Debug)]
struct Giveback {
    name: Arc<str>,
    token: Option<u64>,
    since: Micros,
    tries: u32,
}

/// An extension that was not answered.
#[derive(Debug)]
pub struct Extension {
    /// The lease.
    pub lease: Arc<Lease>,
    /// Its new length.
    pub timeout: Micros,
    token: u64,
    since: Micros,
}

/// Leases of one length: their earliest end follows from one number.
#[derive(Debug, Default)]
struct Group {
    members: BTreeSet<u64>,
    look_again: Micros,
}

/// The state machine.
#[derive(Debug)]
pub struct Client {
    /// The session with the partition.
    pub session: Session,
    /// Commands to send, in order.
    pub commands: Vec<Command>,
    /// Events to hand on.
    pub events: Vec<Event>,
    request_timeout: Micros,
    next_id: u64,
    connected: bool,
    away_since: Micros,
    last_error: String,
    sid: Arc<str>,
    requests: BTreeMap<u64, Request>,
    /// Requests sent a second time, until that is answered: a grant out of the queue may come and end before the
    /// server reads it, and would then be made again.
    resent: BTreeSet<u64>,
    patience: BTreeSet<(Micros, u64)>,
    cancels: BTreeMap<u64, (Arc<str>, Arc<str>)>,
    releases: BTreeMap<u64, Giveback>,
    extensions: BTreeMap<u64, Extension>,
    /// Lease and extension, for those that are not answered.
    extending: BTreeSet<(u64, u64)>,
    /// Releases and cancellations that the server refused, to be sent again.
    again: Vec<Command>,
    leases: BTreeMap<u64, Arc<Lease>>,
    by_fence: HashMap<u64, u64>,
    groups: BTreeMap<Micros, Group>,
    /// Ends of leases that heartbeats do not extend: unclaimed, frozen or fixed.
    ends: BTreeSet<(Micros, u64)>,
    unclaimed: BTreeSet<u64>,
    revoked_early: BTreeSet<u64>,
    look_at_requests: Micros,
}

impl Client {
    /// A client whose session is named after `seed`. `request_timeout` bounds every answer but a place in a queue.
    pub fn new(seed: String, chance: u64, request_timeout: Micros) -> Self {
        let session = Session::new(seed, chance);
        Self {
            sid: session.sid().into(),
            session,
            commands: Vec::new(),
            events: Vec::new(),
            request_timeout,
            next_id: 0,
            connected: false,
            away_since: 0,
            last_error: String::from("not connected yet"),
            requests: BTreeMap::new(),
            resent: BTreeSet::new(),
            patience: BTreeSet::new(),
            cancels: BTreeMap::new(),
            releases: BTreeMap::new(),
            extensions: BTreeMap::new(),
            extending: BTreeSet::new(),
            again: Vec::new(),
            leases: BTreeMap::new(),
            by_fence: HashMap::new(),
            groups: BTreeMap::new(),
            ends: BTreeSet::new(),
            unclaimed: BTreeSet::new(),
            revoked_early: BTreeSet::new(),
            look_at_requests: 0,
        }
    }

    // ---- calls

    /// Asks for a lock; the events carry `token`. Returns the number of the request.
    pub fn acquire(&mut self, now: Micros, ask: Ask, token: u64) -> u64 {
        let id = self.fresh();
        self.session.add(now, ask.timeout);
        let gives_up = ask.patience.map(|patience| now.saturating_add(patience));
        if let Some(at) = gives_up {
            self.patience.insert((at, id));
        }
        if self.session.open {
            if self.session.needs_heartbeat_for(now, ask.timeout) {
                self.heartbeat(now, Mode::Keep);
            }
            self.commands.push(Command::Acquire(id));
        }
        let request = Request {
            ask,
            sid: self.sid.clone(),
            token,
            first: now,
            asked: self.session.open.then_some(now),
            gives_up,
            waiting: false,
        };
        self.requests.insert(id, request);
        id
    }

    /// The caller no longer wants it: the request leaves the queue, or what it was granted is given back.
    pub fn cancel(&mut self, id: u64) {
        if let Some(token) = self.withdraw(id) {
            self.events.push(Event::Cancelled(token));
        }
    }

    /// Gives a lease back. False if it had ended before; then nothing is sent.
    pub fn release(&mut self, now: Micros, lease: &Arc<Lease>, token: Option<u64>) -> bool {
        if !lease.held_at(now) || !lease.release() {
            if !lease.released() {
                self.lose(lease, LossReason::Deadline);
            }
            return false;
        }
        self.forget(lease);
        self.give_back(now, lease, token);
        true
    }

    /// Changes the length of a lease. False if it had ended before.
    pub fn extend(&mut self, now: Micros, lease: &Arc<Lease>, timeout: Micros, token: u64) -> bool {
        if !lease.held_at(now) {
            self.lose(lease, LossReason::Deadline);
            return false;
        }
        self.session.add(now, timeout);
        let shorter = timeout < lease.timeout();
        if shorter {
            // The server may cut it at any time from here.
            self.reshape(lease, timeout, None);
        }
        let id = self.fresh();
        self.extending.insert((lease.id, id));
        self.extensions.insert(
            id,
            Extension {
                lease: lease.clone(),
                timeout,
                token,
                since: now,
            },
        );
        if self.session.open {
            if self.session.needs_heartbeat_for(now, timeout) {
                self.heartbeat(now, Mode::Keep);
            }
            self.commands.push(Command::Extend(id));
        }
        true
    }

    /// A request that is not over.
    pub fn request(&self, id: u64) -> Option<&Request> {
        self.requests.get(&id)
    }

    /// An extension that is not over.
    pub fn extension(&self, id: u64) -> Option<&Extension> {
        self.extensions.get(&id)
    }

    /// Leases held.
    pub fn held(&self) -> usize {
        self.leases.len()
    }

    /// Releases and cancellations that the server has not answered.
    pub fn unanswered(&self) -> usize {
        self.releases.len() + self.cancels.len()
    }

    // ---- the connection

    /// Connected: the session is opened or taken up, everything else waits for that.
    pub fn connected(&mut self, now: Micros) {
        self.connected = true;
        self.session.gen_ += 1;
        self.session.open = false;
        // Held leases are claimed again, and count on no heartbeat before: a server that went back in time may have
        // given them away.
        let held: Vec<_> = self.leases.values().cloned().collect();
        for lease in held {
            self.unclaimed.insert(lease.id);
            if lease.renewed() {
                self.unwatch(&lease);
                lease.freeze();
                self.watch(&lease);
            }
        }
        self.heartbeat(
            now,
            if self.session.known {
                Mode::Resume
            } else {
                Mode::Open
            },
        );
    }

    /// The connection is gone. Leases run on to their local deadline.
    pub fn disconnected(&mut self, now: Micros, why: String) {
        if self.connected {
            self.away_since = now;
        }
        self.connected = false;
        self.session.open = false;
        self.last_error = why;
        self.commands.clear();
        self.again.clear();
    }

    /// The server will not have us: nothing that waits can succeed.
    pub fn denied(&mut self, why: &str) {
        self.fail_all(&Failure::Denied(why.to_owned()));
    }

    /// Ends everything: requests fail, leases are given back.
    pub fn close(&mut self, now: Micros) {
        self.fail_all(&Failure::Closed);
        let held: Vec<_> = self.leases.values().cloned().collect();
        for lease in held {
            self.release(now, &lease, None);
        }
    }

    // ---- inside

    fn fresh(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn heartbeat(&mut self, now: Micros, mode: Mode) {
        let claims = self
            .unclaimed
            .iter()
            .take(CLAIMS)
            .filter_map(|id| self.leases.get(id))
            .map(|lease| (lease.name.clone(), lease.fence))
            .collect();
        self.session.sent(now);
        self.commands.push(Command::Heartbeat(Heartbeat {
            mode,
            sid: self.sid.to_string(),
            gen_: self.session.gen_,
            stamp: now,
            longest: self.session.longest(),
            acknowledge: self.session.acknowledge.clone(),
            claims,
        }));
    }
}
