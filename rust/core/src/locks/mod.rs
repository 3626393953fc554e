//! The client's side of the lock protocol for one partition, without I/O.
//!
//! Calls and answers go in with the time at which they happen; commands for the server and events for the callers
//! come out. The driver sends the commands in their order on one connection and hands every answer back. After a
//! reconnection whatever was not answered is sent again: each command is idempotent on its request or its fence.

mod answers;
pub mod graph;
mod leases;
mod requests;
mod time;
mod wire;

pub use wire::{
    AcquireReply, Ask, Command, Event, Failure, HIGHEST_PRIORITY, Heartbeat, HeartbeatReply, Kind,
    Mode, Victim,
};

use crate::lease::{Lease, LossReason, Micros, drift};
use crate::session::Session;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

/// Claims that one heartbeat carries at most, so that the script stays short.
const CLAIMS: usize = 500;
/// Leases that one command takes back at most.
const ASSERTS: usize = 100;
/// How long a place in a queue is kept for while the server is away.
const OUTAGE_LIMIT: Micros = 30_000_000;
/// Unknown revocations remembered, against a grant that comes after its own revocation.
const REMEMBERED: usize = 4_096;

/// A request that is not over.
#[derive(Debug)]
pub struct Request {
    /// What was asked for.
    pub ask: Arc<Ask>,
    /// Session under which it was last sent.
    pub sid: Arc<str>,
    /// Its rank in the queue, once it has one: kept over lost data.
    pub rank: Option<String>,
    /// Its first place in the queue; 0 before it has one.
    place: u32,
    token: u64,
    /// When the caller asked, or when its last place in the queue was lost.
    first: Micros,
    /// When it was first sent under its number, if it was: no grant can be older.
    asked: Option<Micros>,
    gives_up: Option<Micros>,
    waiting: bool,
}

impl Request {
    /// Whether it is known to have a place in the queue.
    pub fn waits(&self) -> bool {
        self.waiting
    }
}

#[derive(Debug)]
struct Giveback {
    name: Arc<str>,
    token: Option<u64>,
    since: Micros,
    tries: u32,
    /// It is not given back but offered to others for this long.
    offer: Option<Micros>,
    /// Session under which it was held.
    sid: Arc<str>,
    /// What was asked for after it may reach the server before it.
    overtaken: bool,
}

impl Giveback {
    fn command(&self, fence: u64) -> Command {
        let name = self.name.clone();
        match self.offer {
            None => Command::Release { name, fence },
            Some(within) => Command::Offer {
                name,
                fence,
                within,
            },
        }
    }
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
    /// The server was reached and refuses this client; until it is tried again, that is the answer.
    refused: bool,
    sid: Arc<str>,
    requests: BTreeMap<u64, Request>,
    /// Requests sent a second time, and the answers to come until that is answered: a grant out of the queue may come and
    /// end before the server reads it, and would then be made again.
    resent: BTreeMap<u64, u32>,
    patience: BTreeSet<(Micros, u64)>,
    cancels: BTreeMap<u64, (Arc<str>, Arc<str>)>,
    releases: BTreeMap<u64, Giveback>,
    /// Releases of leases that the server does not know: either they were taken away before, or it has lost its data.
    doubts: BTreeMap<u64, Giveback>,
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
    /// Leases that the server has lost and that are being taken back.
    asserting: BTreeSet<u64>,
    revoked_early: BTreeSet<u64>,
    look_at_requests: Micros,
    /// Requests to be asked again at a time, because nothing is granted before.
    later: BTreeSet<(Micros, u64)>,
    /// When leases have been held for as long as their holders allow.
    limits: BTreeSet<(Micros, u64)>,
    limit_of: HashMap<u64, Micros>,
    /// How many leases an owner has.
    owners: HashMap<Arc<str>, u32>,
    /// No heartbeats go out.
    stalled: bool,
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
            refused: false,
            requests: BTreeMap::new(),
            resent: BTreeMap::new(),
            patience: BTreeSet::new(),
            cancels: BTreeMap::new(),
            releases: BTreeMap::new(),
            doubts: BTreeMap::new(),
            extensions: BTreeMap::new(),
            extending: BTreeSet::new(),
            again: Vec::new(),
            leases: BTreeMap::new(),
            by_fence: HashMap::new(),
            groups: BTreeMap::new(),
            ends: BTreeSet::new(),
            unclaimed: BTreeSet::new(),
            asserting: BTreeSet::new(),
            revoked_early: BTreeSet::new(),
            look_at_requests: 0,
            later: BTreeSet::new(),
            limits: BTreeSet::new(),
            limit_of: HashMap::new(),
            owners: HashMap::new(),
            stalled: false,
        }
    }

    /// Numbers of requests, and so of leases, begin above this one: those of a process's partitions differ then.
    pub fn number_from(&mut self, first: u64) {
        self.next_id = first;
    }

    // ---- calls

    /// Asks for a lock; the events carry `token`. Returns the number of the request.
    pub fn acquire(&mut self, now: Micros, ask: Ask, token: u64) -> u64 {
        let id = self.fresh();
        if self.stalled {
            self.events.push(Event::Failed(token, Failure::Stalled));
            return id;
        }
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
            ask: Arc::new(ask),
            sid: self.sid.clone(),
            rank: None,
            place: 0,
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

    /// These scopes have come to wait for the request's owner: they wait for what it waits for.
    pub fn awaited(&mut self, id: u64, by: &[Arc<str>]) {
        let Some(request) = self.requests.get_mut(&id) else {
            return;
        };
        let known = &request.ask.awaited_by;
        let new: Vec<_> = by.iter().filter(|o| !known.contains(o)).cloned().collect();
        if new.is_empty() {
            return;
        }
        let mut ask = (*request.ask).clone();
        ask.awaited_by.extend(new);
        request.ask = Arc::new(ask);
        let first = u32::from(!request.waiting);
        if self.session.open {
            // The answer to the first time may still be to come.
            *self.resent.entry(id).or_insert(first) += 1;
            self.commands.push(Command::Acquire(id));
        }
    }

    /// Gives a lease back. False if it had ended before; then nothing is sent.
    pub fn release(&mut self, now: Micros, lease: &Arc<Lease>, token: Option<u64>) -> bool {
        self.end_lease(now, lease, token, None)
    }

    /// Gives a lease up to whoever takes it over by its fence `within` that time. From here on it is not held. False if
    /// it had ended before.
    pub fn offer(&mut self, now: Micros, lease: &Arc<Lease>, within: Micros, token: u64) -> bool {
        // The session's record has to outlive the offer.
        self.session.hurry(now);
        self.end_lease(now, lease, Some(token), Some(within))
    }

    fn end_lease(
        &mut self,
        now: Micros,
        lease: &Arc<Lease>,
        token: Option<u64>,
        offer: Option<Micros>,
    ) -> bool {
        if !lease.held_at(now) || !lease.release() {
            if !lease.released() {
                self.lose(lease, LossReason::Deadline);
            }
            return false;
        }
        // In this order: what cancels a request that may have been granted twice would else give this one back, and the
        // release find nothing.
        self.give_back(now, lease, token, offer);
        self.forget(lease);
        true
    }

    /// Sends a heartbeat now.
    pub fn beat(&mut self, now: Micros) {
        self.heartbeat(now, Mode::Keep);
    }

    /// An event loop of the process has stood still for longer than its owners allow, or goes on: meanwhile no heartbeat
    /// is sent, and nothing is granted.
    pub fn stall(&mut self, now: Micros, stalled: bool) {
        if self.stalled && !stalled {
            self.session.hurry(now);
        }
        self.stalled = stalled;
    }

    /// Changes the length of a lease. False if it had ended before.
    pub fn extend(&mut self, now: Micros, lease: &Arc<Lease>, timeout: Micros, token: u64) -> bool {
        if !lease.held_at(now) {
            self.lose(lease, LossReason::Deadline);
            return false;
        }
        self.session.add(now, timeout);
        if self.session.open && self.session.needs_heartbeat_for(now, timeout) {
            self.heartbeat(now, Mode::Keep);
        }
        if timeout < lease.timeout() {
            // The server may cut it at any time from here, but not before it has read a heartbeat that goes ahead of
            // this, and counts from there. Nothing is believed for longer than before.
            let ahead = if self.session.open {
                self.session.last_sent()
            } else {
                now
            };
            let before = lease.valid_until() + drift(timeout);
            self.reshape(
                lease,
                timeout,
                Some(ahead.min(before.saturating_sub(timeout))),
            );
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
            self.commands.push(Command::Extend(id));
        }
        true
    }

    /// A request that is not over.
    pub fn request(&self, id: u64) -> Option<&Request> {
        self.requests.get(&id)
    }

    /// Ends a request whose wait would not end otherwise, to let the others of this cycle go on. False if it does not wait.
    pub fn give_up(&mut self, id: u64, cycle: Vec<String>) -> bool {
        let waits = self.requests.get(&id).is_some_and(Request::waits);
        if waits && let Some(token) = self.withdraw(id) {
            self.events.push(Event::Deadlock(token, cycle));
        }
        waits
    }

    /// An extension that is not over.
    pub fn extension(&self, id: u64) -> Option<&Extension> {
        self.extensions.get(&id)
    }

    /// A lease that is held.
    pub fn lease(&self, id: u64) -> Option<&Arc<Lease>> {
        self.leases.get(&id)
    }

    /// True for a lease that the server has lost and that is being taken back.
    pub fn is_asserting(&self, id: u64) -> bool {
        self.asserting.contains(&id)
    }

    /// Leases held.
    pub fn held(&self) -> usize {
        self.leases.len()
    }

    /// Leases that this owner holds.
    pub fn held_by(&self, owner: &str) -> u32 {
        self.owners.get(owner).copied().unwrap_or(0)
    }

    /// True for a request that is sent again before it was answered, or with other owners.
    pub fn is_resent(&self, id: u64) -> bool {
        self.resent.contains_key(&id)
    }

    /// Releases and cancellations that the server has not answered.
    pub fn unanswered(&self) -> usize {
        self.releases.len() + self.cancels.len() + self.doubts.len()
    }

    // ---- the connection

    /// Connected: the session is opened or taken up, everything else waits for that. `elsewhere` where another server
    /// process answers than before, whose data may be older.
    pub fn connected(&mut self, now: Micros, elsewhere: bool) {
        self.connected = true;
        self.refused = false;
        self.session.gen_ += 1;
        self.session.open = false;
        // Held leases are claimed again, and count on no heartbeat before: a server that went back in time may have
        // given them away.
        let held: Vec<_> = self.leases.values().cloned().collect();
        self.session.compare |= elsewhere;
        self.asserting.clear();
        for lease in held {
            if self.session.known {
                self.unclaimed.insert(lease.id);
            } else {
                self.asserting.insert(lease.id);
            }
            self.freeze(&lease);
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
        self.refused = false;
        self.last_error = why;
        self.commands.clear();
        self.again.clear();
        // All that is not over is asked for again on the next connection.
        self.later.clear();
    }

    /// The server will not have us: nothing that waits can succeed.
    pub fn denied(&mut self, why: &str) {
        why.clone_into(&mut self.last_error);
        self.refused = true;
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
        if self.stalled && mode == Mode::Keep {
            return;
        }
        let claims = self
            .unclaimed
            .iter()
            .take(CLAIMS)
            .filter_map(|id| self.leases.get(id))
            .map(|lease| (lease.name().clone(), lease.fence))
            .collect();
        self.session.sent(now);
        self.commands.push(Command::Heartbeat(Heartbeat {
            mode,
            sid: self.sid.to_string(),
            knew: (self.session.epoch.clone())
                .filter(|_| mode != Mode::Keep)
                .map(|epoch| (epoch, self.session.last_number)),
            gen_: self.session.gen_,
            stamp: now,
            longest: self.session.longest(),
            acknowledge: self.session.acknowledge.clone(),
            claims,
        }));
    }
}
