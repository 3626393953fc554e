//! The client's side of the lock protocol for one partition, without I/O.
//!
//! Calls and answers go in with the time at which they happen; commands for the server and events for the callers
//! come out. The driver sends the commands in their order on one connection and hands every answer back. After a
//! reconnection whatever was not answered is sent again: each command is idempotent on its request or its fence.

use crate::lease::{Lease, LossReason, Micros};
use crate::session::Session;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

/// Claims that one heartbeat carries at most, so that the script stays short.
const CLAIMS: usize = 500;
/// How long a place in a queue is kept for while the server is away.
const OUTAGE_LIMIT: Micros = 30_000_000;
/// Unknown revocations remembered, against a grant that comes after its own revocation.
const REMEMBERED: usize = 4_096;

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

/// A request that is not over.
#[derive(Debug)]
pub struct Request {
    /// What was asked for.
    pub ask: Ask,
    /// Session under which it was last sent.
    pub sid: Arc<str>,
    token: u64,
    first: Micros,
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
    members: HashSet<u64>,
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
    requests: HashMap<u64, Request>,
    patience: BTreeSet<(Micros, u64)>,
    cancels: BTreeMap<u64, (Arc<str>, Arc<str>)>,
    releases: HashMap<u64, Giveback>,
    extensions: HashMap<u64, Extension>,
    leases: HashMap<u64, Arc<Lease>>,
    by_fence: HashMap<u64, u64>,
    groups: BTreeMap<Micros, Group>,
    /// Ends of leases that heartbeats do not extend: unclaimed, frozen or fixed. An entry may be out of date; it is
    /// looked at again when its time comes.
    ends: BTreeSet<(Micros, u64)>,
    unclaimed: BTreeSet<u64>,
    revoked_early: HashSet<u64>,
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
            requests: HashMap::new(),
            patience: BTreeSet::new(),
            cancels: BTreeMap::new(),
            releases: HashMap::new(),
            extensions: HashMap::new(),
            leases: HashMap::new(),
            by_fence: HashMap::new(),
            groups: BTreeMap::new(),
            ends: BTreeSet::new(),
            unclaimed: BTreeSet::new(),
            revoked_early: HashSet::new(),
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

    // ---- answers

    /// Answer to an acquire.
    pub fn on_acquire(&mut self, now: Micros, id: u64, reply: AcquireReply) {
        match reply {
            AcquireReply::Granted {
                fence,
                stamp,
                claimed,
            } => self.grant(now, id, fence, stamp, claimed),
            AcquireReply::Waiting => {
                if let Some(request) = self.requests.get_mut(&id) {
                    request.waiting = true;
                }
            }
            AcquireReply::NotFree(left) => {
                if let Some(request) = self.drop_request(id) {
                    self.events.push(Event::NotFree(request.token, left));
                }
            }
            AcquireReply::Deadlock(cycle) => {
                if let Some(request) = self.drop_request(id) {
                    self.events.push(Event::Deadlock(request.token, cycle));
                }
            }
            AcquireReply::NoSession => self.session_gone(now),
            AcquireReply::Superseded => {}
        }
    }

    /// A lock came out of the queue.
    pub fn on_grant(&mut self, now: Micros, sid: &str, id: u64, fence: u64, stamp: Micros) {
        if *sid == *self.sid {
            self.grant(now, id, fence, stamp, false);
        }
    }

    /// The server took a lease away.
    pub fn on_revoked(&mut self, fence: u64, reason: &str) {
        let reason = if reason == "forced" {
            LossReason::Forced
        } else {
            LossReason::Revoked
        };
        if let Some(lease) = self
            .by_fence
            .get(&fence)
            .and_then(|id| self.leases.get(id))
            .cloned()
        {
            self.lose(&lease, reason);
        } else if !self.requests.is_empty() && self.revoked_early.len() < REMEMBERED {
            self.revoked_early.insert(fence);
        }
    }

    /// Answer to a release: true if the lease was held.
    pub fn on_release(&mut self, fence: u64, held: bool) {
        if let Some(giveback) = self.releases.remove(&fence)
            && let Some(token) = giveback.token
        {
            // An earlier try, whose answer was lost, may have done it.
            self.events
                .push(Event::Released(token, held || giveback.tries > 1));
        }
    }

    /// Answer to a cancellation.
    pub fn on_cancel(&mut self, id: u64) {
        self.cancels.remove(&id);
    }

    /// Answer to an extension: the stamp of the session's last heartbeat, or nothing if it is not held.
    pub fn on_extend(&mut self, id: u64, stamp: Option<Micros>) {
        let Some(extension) = self.extensions.remove(&id) else {
            return;
        };
        self.session.remove(extension.timeout);
        match stamp {
            Some(stamp) if self.leases.contains_key(&extension.lease.id) => {
                let base = if extension.lease.fixed {
                    extension.since
                } else {
                    stamp
                };
                self.reshape(&extension.lease, extension.timeout, Some(base));
                self.events.push(Event::Extended(extension.token, true));
            }
            _ => {
                self.lose(&extension.lease, LossReason::Revoked);
                self.events.push(Event::Extended(extension.token, false));
            }
        }
    }

    /// A command failed on the server. The caller is told; nothing of it stays behind.
    pub fn on_refused(&mut self, command: &Command, why: &str) {
        let failure = Failure::Refused(why.to_owned());
        match command {
            Command::Acquire(id) => {
                if let Some(token) = self.withdraw(*id) {
                    self.events.push(Event::Failed(token, failure));
                }
            }
            Command::Release { fence, .. } => {
                if let Some(token) = self.releases.get_mut(fence).and_then(|g| g.token.take()) {
                    self.events.push(Event::Failed(token, failure));
                }
            }
            Command::Extend(id) => {
                if let Some(extension) = self.extensions.remove(id) {
                    self.session.remove(extension.timeout);
                    self.events.push(Event::Failed(extension.token, failure));
                }
            }
            Command::Cancel { .. } | Command::Heartbeat(_) => {}
        }
    }

    /// Answer to a heartbeat.
    pub fn on_heartbeat(&mut self, now: Micros, sent: &Heartbeat, reply: HeartbeatReply) {
        if *sent.sid != *self.sid || sent.gen_ != self.session.gen_ {
            return;
        }
        let HeartbeatReply::Alive {
            epoch,
            revoked,
            accepted,
        } = reply
        else {
            self.session_gone(now);
            return;
        };
        let lost_data = self
            .session
            .epoch
            .as_ref()
            .is_some_and(|known| *known != epoch);
        self.session.epoch = Some(epoch);
        if lost_data && self.session.known {
            self.lose_all(LossReason::Forgotten);
        }
        for entry in revoked.split_terminator(';') {
            if let Some((fence, reason)) = entry.split_once(' ')
                && let Ok(fence) = fence.parse()
            {
                self.on_revoked(fence, reason);
            }
        }
        self.session.acknowledge = revoked;
        self.session.clock.confirm(sent.stamp);
        let accepted: HashSet<u64> = accepted.into_iter().collect();
        for (_, fence) in &sent.claims {
            let Some(lease) = self
                .by_fence
                .get(fence)
                .and_then(|id| self.leases.get(id))
                .cloned()
            else {
                continue;
            };
            if accepted.contains(fence) {
                self.unclaimed.remove(&lease.id);
                if !lease.renewed() {
                    lease.claimed(sent.stamp);
                    if lease.fixed {
                        self.ends.insert((lease.valid_until(), lease.id));
                    } else {
                        self.groups
                            .entry(lease.timeout())
                            .or_default()
                            .members
                            .insert(lease.id);
                    }
                }
            } else {
                self.lose(&lease, LossReason::Forgotten);
            }
        }
        if !self.session.open && sent.mode != Mode::Keep {
            self.opened(now, lost_data || sent.mode == Mode::Open);
        }
        if !self.unclaimed.is_empty() && sent.claims.len() >= CLAIMS {
            self.session.hurry(now);
        }
    }

    // ---- time

    /// When `tick` wants to be called next.
    pub fn next_tick(&self) -> Micros {
        let mut next = if self.session.open {
            self.session.next_due()
        } else {
            Micros::MAX
        };
        if let Some((at, _)) = self.patience.first() {
            next = next.min(*at);
        }
        if !(self.requests.is_empty() && self.releases.is_empty() && self.extensions.is_empty()) {
            next = next.min(self.look_at_requests);
        }
        for (timeout, group) in &self.groups {
            if !group.members.is_empty() {
                next = next.min(self.group_end(*timeout).max(group.look_again));
            }
        }
        if let Some((at, _)) = self.ends.first() {
            next = next.min(*at);
        }
        next
    }

    /// Lets time pass: heartbeats are sent, patience ends, leases that nobody confirmed are lost.
    pub fn tick(&mut self, now: Micros) {
        self.expire_leases(now);
        while let Some((at, id)) = self.patience.first().copied() {
            if at > now {
                break;
            }
            let answered = self
                .requests
                .get(&id)
                .is_some_and(|request| request.waiting)
                || self.connected;
            if let Some(token) = self.withdraw(id) {
                self.events.push(if answered {
                    Event::TimedOut(token)
                } else {
                    Event::Failed(token, Failure::Unavailable(self.last_error.clone()))
                });
            }
        }
        if now >= self.look_at_requests {
            self.look_at_requests = now + (self.request_timeout / 10).clamp(20_000, 500_000);
            self.expire_requests(now);
        }
        // Before the session is open the opening heartbeat is on its way, and the driver's own timeout watches it.
        if self.session.open && now >= self.session.next_due() {
            self.heartbeat(now, Mode::Keep);
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

    fn opened(&mut self, now: Micros, fresh: bool) {
        self.session.open = true;
        self.session.known = true;
        self.events.push(Event::Opened(fresh));
        for (fence, giveback) in &mut self.releases {
            giveback.tries += 1;
            self.commands.push(Command::Release {
                name: giveback.name.clone(),
                fence: *fence,
            });
        }
        for (request, (sid, name)) in &self.cancels {
            self.commands.push(Command::Cancel {
                request: *request,
                sid: sid.clone(),
                name: name.clone(),
            });
        }
        let mut again: Vec<_> = self.requests.keys().copied().collect();
        again.sort_unstable();
        for id in again {
            if let Some(request) = self.requests.get_mut(&id) {
                request.sid = self.sid.clone();
                self.commands.push(Command::Acquire(id));
            }
        }
        self.commands
            .extend(self.extensions.keys().map(|id| Command::Extend(*id)));
        // Held leases are claimed again: a server that went back in time may have given them away.
        let held: Vec<_> = self.leases.values().cloned().collect();
        for lease in held {
            if lease.renewed() {
                lease.freeze();
                if let Some(group) = self.groups.get_mut(&lease.timeout()) {
                    group.members.remove(&lease.id);
                }
                self.ends.insert((lease.valid_until(), lease.id));
            }
            self.unclaimed.insert(lease.id);
        }
        if self.unclaimed.is_empty() {
            return;
        }
        self.heartbeat(now, Mode::Keep);
    }

    fn session_gone(&mut self, now: Micros) {
        self.lose_all(LossReason::SessionEnded);
        self.session.renew();
        self.sid = self.session.sid().into();
        // What the old session still had to give back or cancel ended with it.
        for (_, giveback) in std::mem::take(&mut self.releases) {
            if let Some(token) = giveback.token {
                self.events.push(Event::Released(token, giveback.tries > 1));
            }
        }
        self.cancels.clear();
        self.heartbeat(now, Mode::Open);
    }

    fn grant(&mut self, now: Micros, id: u64, fence: u64, stamp: Micros, claimed: bool) {
        if self.by_fence.contains_key(&fence) {
            return;
        }
        let Some(request) = self.requests.get(&id) else {
            // Withdrawn: the cancellation that was sent then gives it back.
            return;
        };
        let ask = request.ask.clone();
        let base = if ask.fixed && claimed {
            request.first
        } else {
            stamp
        };
        let clock = self.session.clock.clone();
        let lease = Arc::new(Lease::new(
            (id, ask.name.clone(), fence),
            (base, ask.timeout),
            ask.fixed,
            claimed,
            clock,
        ));
        if self.revoked_early.remove(&fence) || !lease.held_at(now) {
            // Too late to be believed: it is given back, and the wait goes on under a new number.
            if lease.release() {
                self.give_back(now, &lease, None);
            }
            self.ask_again(now, id);
            return;
        }
        let Some(request) = self.requests.remove(&id) else {
            return;
        };
        if let Some(at) = request.gives_up {
            self.patience.remove(&(at, id));
        }
        if self.requests.is_empty() {
            self.revoked_early.clear();
        }
        self.by_fence.insert(fence, id);
        self.leases.insert(id, lease.clone());
        if claimed && !ask.fixed {
            self.groups
                .entry(ask.timeout)
                .or_default()
                .members
                .insert(id);
        } else {
            self.ends.insert((lease.valid_until(), id));
        }
        if !claimed {
            self.unclaimed.insert(id);
            if self.session.open {
                self.heartbeat(now, Mode::Keep);
            }
        }
        self.events.push(Event::Granted(request.token, lease));
    }

    fn ask_again(&mut self, now: Micros, id: u64) {
        let Some(mut request) = self.requests.remove(&id) else {
            return;
        };
        let fresh = self.fresh();
        if let Some(at) = request.gives_up
            && self.patience.remove(&(at, id))
        {
            self.patience.insert((at, fresh));
        }
        request.first = now;
        request.waiting = false;
        self.requests.insert(fresh, request);
        if self.session.open {
            self.heartbeat(now, Mode::Keep);
            self.commands.push(Command::Acquire(fresh));
        }
    }

    fn drop_request(&mut self, id: u64) -> Option<Request> {
        let request = self.requests.remove(&id)?;
        if let Some(at) = request.gives_up {
            self.patience.remove(&(at, id));
        }
        self.session.remove(request.ask.timeout);
        Some(request)
    }

    /// Ends a request on our side and sees to it that the server's side ends too.
    fn withdraw(&mut self, id: u64) -> Option<u64> {
        let request = self.drop_request(id)?;
        self.cancels
            .insert(id, (request.sid.clone(), request.ask.name.clone()));
        if self.session.open {
            self.commands.push(Command::Cancel {
                request: id,
                sid: request.sid,
                name: request.ask.name,
            });
        }
        Some(request.token)
    }

    fn give_back(&mut self, now: Micros, lease: &Arc<Lease>, token: Option<u64>) {
        let mut tries = 0;
        if self.session.open {
            tries = 1;
            self.commands.push(Command::Release {
                name: lease.name.clone(),
                fence: lease.fence,
            });
        }
        self.releases.insert(
            lease.fence,
            Giveback {
                name: lease.name.clone(),
                token,
                since: now,
                tries,
            },
        );
    }

    /// Takes a lease out of every index.
    fn forget(&mut self, lease: &Arc<Lease>) {
        if self.leases.remove(&lease.id).is_none() {
            return;
        }
        self.by_fence.remove(&lease.fence);
        if let Some(group) = self.groups.get_mut(&lease.timeout()) {
            group.members.remove(&lease.id);
        }
        self.unclaimed.remove(&lease.id);
        self.session.remove(lease.timeout());
        if self.groups.len() > 64 {
            self.groups.retain(|_, group| !group.members.is_empty());
        }
    }

    fn lose(&mut self, lease: &Arc<Lease>, reason: LossReason) {
        if !self.leases.contains_key(&lease.id) {
            return;
        }
        self.forget(lease);
        if lease.lose(reason) {
            if reason == LossReason::Deadline {
                // The server may still think that it is held; `now` only serves a caller's timeout, and none waits.
                self.give_back(0, lease, None);
            }
            self.events.push(Event::Lost(lease.clone()));
        }
    }

    fn lose_all(&mut self, reason: LossReason) {
        let all: Vec<_> = self.leases.values().cloned().collect();
        for lease in all {
            self.lose(&lease, reason);
        }
    }

    fn reshape(&mut self, lease: &Arc<Lease>, timeout: Micros, base: Option<Micros>) {
        if !self.leases.contains_key(&lease.id) {
            return;
        }
        let before = lease.timeout();
        self.session.add(0, timeout);
        self.session.remove(before);
        lease.resize(timeout, base);
        if !lease.renewed() {
            self.ends.insert((lease.valid_until(), lease.id));
        }
        if let Some(group) = self.groups.get_mut(&before)
            && group.members.remove(&lease.id)
        {
            self.groups
                .entry(timeout)
                .or_default()
                .members
                .insert(lease.id);
        }
    }

    fn group_end(&self, timeout: Micros) -> Micros {
        (self.session.clock.confirmed() + timeout).saturating_sub(crate::lease::drift(timeout))
    }

    fn expire_leases(&mut self, now: Micros) {
        let mut ended = Vec::new();
        while let Some((at, id)) = self.ends.first().copied() {
            if at > now {
                break;
            }
            self.ends.pop_first();
            if let Some(lease) = self.leases.get(&id).filter(|lease| !lease.renewed()) {
                let end = lease.valid_until();
                if end <= now {
                    ended.push(lease.clone());
                } else {
                    self.ends.insert((end, id));
                }
            }
        }
        let due: Vec<Micros> = self
            .groups
            .iter()
            .filter(|(timeout, group)| {
                !group.members.is_empty() && self.group_end(**timeout).max(group.look_again) <= now
            })
            .map(|(timeout, _)| *timeout)
            .collect();
        for timeout in due {
            let mut look_again = Micros::MAX;
            if let Some(group) = self.groups.get(&timeout) {
                for lease in group.members.iter().filter_map(|id| self.leases.get(id)) {
                    let end = lease.valid_until();
                    if end <= now {
                        ended.push(lease.clone())
                    } else {
                        look_again = look_again.min(end)
                    }
                }
            }
            if let Some(group) = self.groups.get_mut(&timeout) {
                group.look_again = if look_again == Micros::MAX {
                    0
                } else {
                    look_again
                };
            }
        }
        for lease in ended {
            self.lose(&lease, LossReason::Deadline);
        }
    }

    fn expire_requests(&mut self, now: Micros) {
        let limit = self.request_timeout;
        let out = !self.connected && now.saturating_sub(self.away_since) > OUTAGE_LIMIT.max(limit);
        let late: Vec<u64> = self
            .requests
            .iter()
            .filter(|(_, r)| {
                if r.waiting {
                    out
                } else {
                    now.saturating_sub(r.first) > limit
                }
            })
            .map(|(id, _)| *id)
            .collect();
        for id in late {
            if let Some(token) = self.withdraw(id) {
                self.events.push(Event::Failed(token, self.absence()));
            }
        }
        let absence = self.absence();
        for giveback in self.releases.values_mut() {
            if now.saturating_sub(giveback.since) > limit
                && let Some(token) = giveback.token.take()
            {
                self.events.push(Event::Failed(token, absence.clone()));
            }
        }
        let late: Vec<u64> = self
            .extensions
            .iter()
            .filter(|(_, e)| now.saturating_sub(e.since) > limit)
            .map(|(id, _)| *id)
            .collect();
        for id in late {
            if let Some(extension) = self.extensions.remove(&id) {
                self.session.remove(extension.timeout);
                self.events
                    .push(Event::Failed(extension.token, absence.clone()));
            }
        }
    }

    /// Why an answer is missing.
    pub fn absence(&self) -> Failure {
        if self.session.open {
            Failure::NoAnswer
        } else {
            Failure::Unavailable(self.last_error.clone())
        }
    }

    fn fail_all(&mut self, failure: &Failure) {
        let all: Vec<u64> = self.requests.keys().copied().collect();
        for id in all {
            if let Some(token) = self.withdraw(id) {
                self.events.push(Event::Failed(token, failure.clone()));
            }
        }
        for giveback in self.releases.values_mut() {
            if let Some(token) = giveback.token.take() {
                self.events.push(Event::Failed(token, failure.clone()));
            }
        }
        for (_, extension) in std::mem::take(&mut self.extensions) {
            self.session.remove(extension.timeout);
            self.events
                .push(Event::Failed(extension.token, failure.clone()));
        }
    }
}
