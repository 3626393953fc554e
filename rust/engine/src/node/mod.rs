//! One partition's state, shared by the callers, who submit, and the engine thread, which reads and keeps time.
//!
//! Callers write to a plain socket themselves when it takes the bytes at once: that saves a wake-up of the engine.
//! The lock is held for moments only and never while anybody waits for the interpreter.
//!
//! The file is long because everything that may be done to the state under that lock stands in it; what is said to the
//! server and what it answers have files of their own.

mod answers;
pub mod chased;
#[cfg(all(test, feature = "shuttle"))]
mod concurrency;
mod kind;
#[cfg(all(test, not(feature = "shuttle")))]
mod model;
mod writing;

use crate::chase::Waits;
use crate::clock;
use crate::registry::{Registry, Request, Step, Task};
use crate::ring::{Ring, Sink};
use crate::scripts::{COUNT, SUFFIXES, Script, tag};
use crate::sync::{Mutex, MutexGuard, Notify};
use crate::transport::{Direct, Target};
use crate::wire::{self, Value};
use crate::{Outcome, Settings};
use bytes::{Bytes, BytesMut};
use dotmac_core::lease::{Lease, Micros};
use dotmac_core::locks::{Ask, Client, Command, Failure};
use kind::Channels;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io::ErrorKind;
use std::sync::{Arc, PoisonError};

/// Bytes that are not held back any longer, whatever else may still come to go with them.
const MUCH: usize = 16 * 1024;

/// Milliseconds that the server waits for its replicas at most, at a time.
const REPLICAS_WAIT: &[u8] = b"10";

/// Bits that number the requests of a partition; those above it are the partition's number.
pub const REQUESTS: u32 = 40;

/// An argument of a script that is not a lock script.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Arg {
    /// These bytes.
    Bytes(Bytes),
    /// Name of the session at the time of sending.
    Sid,
    /// Generation of the connection at the time of sending.
    Gen,
    /// Where changes of the registry are announced.
    Channel,
    /// What the channels of the sessions begin with.
    Inbox,
}

/// A script call with keys of its own.
#[derive(Debug, Clone)]
pub struct Call {
    /// Which script.
    pub script: Script,
    /// Suffixes of its keys after the partition's tag.
    pub keys: &'static [&'static str],
    /// Its arguments.
    pub args: Vec<Arg>,
}

#[derive(Debug)]
struct Pending {
    call: Call,
    sink: Sink,
    since: Micros,
    /// What the engine itself does with the answer.
    task: Option<Task>,
}

/// What the next answer on the connection belongs to.
#[derive(Debug)]
enum Expect {
    Command(Command),
    Call(u64),
    /// How many replicas know what was written.
    Replicas,
    Ignore,
}

/// Everything of one partition.
pub struct State {
    /// The lock protocol.
    pub client: Client,
    channels: Channels,
    /// Where the session's inbox is.
    tag: String,
    inbox: String,
    who: String,
    request_timeout: Micros,
    keys: BytesMut,
    out: BytesMut,
    expected: VecDeque<Expect>,
    busy_since: Micros,
    hashes: Vec<Bytes>,
    /// Which process serves: `run_id` of the server of this connection, or of the last one.
    server_id: String,
    /// Why `denied` was said: not for want of rights.
    misconfigured: bool,
    loaded: [bool; COUNT],
    /// What commands begin with, by script, for so many arguments.
    starts: [Option<(usize, Bytes)>; COUNT],
    direct: Option<Direct>,
    connected: bool,
    sinks: HashMap<u64, Sink>,
    next_token: u64,
    calls: BTreeMap<u64, Pending>,
    /// Who is told how many replicas know what was written: by the answer that is due, and by the one after it.
    asked: Vec<Sink>,
    asking: Vec<(u32, Sink)>,
    /// Instances of this process, and services that it follows.
    pub registry: Registry,
    /// Who wants to know of requests that wait: only where there are several partitions.
    waits: Option<Arc<Waits>>,
    echoes: Vec<Sink>,
    rings: Vec<std::sync::Weak<Ring>>,
    wake: Vec<Arc<Ring>>,
    armed: Micros,
    /// Counters for `stats`.
    pub counts: Counts,
    /// Set by `close`.
    pub closing: bool,
}

/// What the engine has counted since it started.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counts {
    /// Heartbeats answered.
    pub heartbeats: u64,
    /// Heartbeats sent more than half an interval late.
    pub late_heartbeats: u64,
    /// Leases lost.
    pub losses: u64,
    /// Connections opened.
    pub connections: u64,
    /// Sessions opened anew, so that what hangs on them was told again.
    pub sessions: u64,
}

/// A partition, and how to wake the engine for it.
pub struct Node {
    state: Mutex<State>,
    /// Wakes the engine thread.
    pub notify: Notify,
    /// Where the server is.
    pub target: Target,
    /// Number of the partition.
    pub partition: usize,
}

impl Node {
    /// A partition of which nothing is known yet.
    pub fn new(settings: &Settings, partition: usize) -> Self {
        let tag = tag(&settings.namespace, partition);
        let mut keys = BytesMut::new();
        wire::bulk(&mut keys, SUFFIXES.len().to_string().as_bytes());
        for suffix in SUFFIXES {
            wire::bulk(&mut keys, format!("{tag}:{suffix}").as_bytes());
        }
        let timeout = settings.target.request_timeout;
        // Each partition's heartbeats have moments of their own.
        let chance = settings.chance.wrapping_add(partition as u64);
        let mut client = Client::new(settings.session.clone(), chance, timeout);
        client.number_from((partition as u64) << REQUESTS);
        Self {
            state: Mutex::new(State {
                client,
                channels: Channels::of(&settings.target),
                inbox: format!("{tag}:inbox:"),
                tag,
                who: settings.who.clone(),
                request_timeout: timeout,
                keys,
                out: BytesMut::with_capacity(64 * 1024),
                expected: VecDeque::new(),
                busy_since: 0,
                hashes: Vec::new(),
                server_id: String::new(),
                misconfigured: false,
                loaded: [false; COUNT],
                starts: [const { None }; COUNT],
                direct: None,
                connected: false,
                sinks: HashMap::new(),
                next_token: 0,
                calls: BTreeMap::new(),
                asked: Vec::new(),
                asking: Vec::new(),
                registry: Registry::default(),
                waits: None,
                echoes: Vec::new(),
                rings: Vec::new(),
                wake: Vec::new(),
                armed: 0,
                counts: Counts::default(),
                closing: false,
            }),
            notify: Notify::new(),
            target: settings.target.clone(),
            partition,
        }
    }

    /// The state, for moments.
    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// After a change by a caller: writes what can be written and wakes the engine where it has to act.
    /// With `flush` false nothing is written yet; the caller has promised to call `flush` soon.
    pub fn settle(&self, mut state: MutexGuard<'_, State>, flush: bool) -> bool {
        state.settle();
        // So that the server works meanwhile, where many submit in one turn.
        let flush = flush || state.out.len() >= MUCH;
        let wrote = flush && state.flush();
        let engine = state.client.next_tick().min(state.next_call_timeout()) < state.armed;
        let wake = std::mem::take(&mut state.wake);
        let waiting = !state.out.is_empty();
        // Unsent bytes on a connection that only the engine may write to, or that takes no more at once.
        let stuck = waiting && flush && !wrote;
        drop(state);
        if engine || stuck {
            self.notify.notify_one();
        }
        for ring in wake {
            ring.signal();
        }
        waiting && !flush
    }

    /// Writes what was held back.
    pub fn flush(&self) {
        let mut state = self.lock();
        if !state.out.is_empty() && !state.flush() {
            drop(state);
            self.notify.notify_one();
        }
    }
}

impl State {
    // ---- callers

    fn token(&mut self, sink: Sink) -> u64 {
        self.next_token += 1;
        self.sinks.insert(self.next_token, sink);
        self.next_token
    }

    /// Results for this loop, and losses, go to `ring`.
    pub fn add_ring(&mut self, ring: &Arc<Ring>) {
        self.rings.retain(|known| known.strong_count() > 0);
        self.rings.push(Arc::downgrade(ring));
    }

    /// Asks for a lock. Returns the number of the request.
    pub fn acquire(&mut self, ask: Ask, sink: Sink) -> u64 {
        let token = self.token(sink);
        if self.closing {
            self.finish(token, Outcome::Failed(Failure::Closed));
            return 0;
        }
        self.client.acquire(clock::now(), ask, token)
    }

    /// Withdraws a request.
    pub fn cancel(&mut self, request: u64) {
        self.client.cancel(request);
    }

    /// Gives a lease back.
    pub fn release(&mut self, lease: &Arc<Lease>, sink: Sink) {
        let token = self.token(sink);
        if !self.client.release(clock::now(), lease, Some(token)) {
            self.finish(token, Outcome::Released(false));
        }
    }

    /// Gives a lease back without anybody waiting for the answer.
    pub fn drop_lease(&mut self, lease: &Arc<Lease>) {
        self.client.release(clock::now(), lease, None);
    }

    /// Gives a lease up to whoever takes it over within a time.
    pub fn offer(&mut self, lease: &Arc<Lease>, within: Micros, sink: Sink) {
        let token = self.token(sink);
        if !self.client.offer(clock::now(), lease, within, token) {
            self.finish(token, Outcome::Released(false));
        }
    }

    /// These scopes have come to wait for the owner of a request.
    pub fn awaited(&mut self, request: u64, by: &[Arc<str>]) {
        self.client.awaited(request, by);
    }

    /// Asks how many replicas know everything that was written so far, and waits for so many, for a moment: meanwhile
    /// everything else that is asked for waits, too, heartbeats included. Who needs more time asks `again`.
    pub fn replicas(&mut self, count: u32, again: bool, sink: Sink) {
        if !self.open() {
            let failure = self.client.absence();
            sink.put(Outcome::Failed(failure), &mut self.wake);
            return;
        }
        // The grant may have been written for us by another client, and the server knows only what we wrote ourselves.
        if !again {
            self.client.beat(clock::now());
            self.settle();
        }
        self.asking.push((count, sink));
        self.ask_replicas();
    }

    /// One question at a time, for all who asked meanwhile: many of them in a row would keep the heartbeats waiting for
    /// as long as all of them take.
    fn ask_replicas(&mut self) {
        if self.asking.is_empty() || !self.asked.is_empty() {
            return;
        }
        let count = self.asking.iter().map(|(count, _)| *count).max();
        let count = count.unwrap_or(0).to_string();
        wire::command(&mut self.out, &[b"WAIT", count.as_bytes(), REPLICAS_WAIT]);
        self.asked = self.asking.drain(..).map(|(_, sink)| sink).collect();
        self.expect(Expect::Replicas);
    }

    fn on_replicas(&mut self, outcome: &Outcome) {
        for sink in std::mem::take(&mut self.asked) {
            sink.put(outcome.clone(), &mut self.wake);
        }
        self.ask_replicas();
    }

    /// Changes a lease's length.
    pub fn extend(&mut self, lease: &Arc<Lease>, timeout: Micros, sink: Sink) {
        let token = self.token(sink);
        if !self.client.extend(clock::now(), lease, timeout, token) {
            self.finish(token, Outcome::Extended(false));
        }
    }

    /// Calls a script. It is sent again after a reconnection until it is answered, so it must be idempotent.
    pub fn call(&mut self, call: Call, sink: Sink) {
        self.call_for(call, sink, None);
    }

    /// The same, with something that the engine does with the answer; the number of the call.
    fn call_for(&mut self, call: Call, sink: Sink, task: Option<Task>) -> u64 {
        if self.closing {
            sink.put(Outcome::Failed(Failure::Closed), &mut self.wake);
            return 0;
        }
        self.next_token += 1;
        let id = self.next_token;
        if self.client.session.open {
            self.send_call(id, &call);
        }
        self.calls.insert(
            id,
            Pending {
                call,
                sink,
                since: clock::now(),
                task,
            },
        );
        id
    }

    /// Carries out a request to the registry.
    pub fn registry(&mut self, request: &Request, sink: Sink) {
        let now = clock::now();
        match self.registry.request(request) {
            Step::Answer(outcome) => sink.put(outcome, &mut self.wake),
            Step::Call(call, task) => {
                if let Some(ttl) = self.registry.take_added() {
                    self.client.session.add(now, ttl);
                    // The session must be known to live that long before anything hangs on it for so long.
                    self.client.session.hurry(now);
                }
                self.count_out();
                let id = self.call_for(call, sink, Some(task.clone()));
                self.registry.sent(&task, id);
            }
        }
    }

    /// Calls that the registry makes by itself.
    fn run(&mut self, steps: Vec<(Call, Task)>) {
        for (call, task) in steps {
            if self
                .registry
                .fetching(&task)
                .is_some_and(|id| self.calls.contains_key(&id))
            {
                self.registry.again(&task);
                continue;
            }
            let id = self.call_for(call, Sink::Nobody, Some(task.clone()));
            self.registry.sent(&task, id);
        }
    }

    fn on_registry_reply(&mut self, task: &Task, value: &Value) {
        let steps = self.registry.reply(clock::now(), task, value);
        self.count_out();
        self.run(steps);
    }

    /// Registrations that are not kept any more count no longer for the session's length.
    fn count_out(&mut self) {
        for ttl in self.registry.take_removed() {
            self.client.session.remove(ttl);
        }
    }

    /// Sends the sink back through the engine thread, to measure the bridge.
    pub fn echo(&mut self, sink: Sink) -> bool {
        self.echoes.push(sink);
        self.echoes.len() == 1
    }

    /// Begins the end: requests fail, leases are given back, the session is closed.
    pub fn close(&mut self) {
        if self.closing {
            return;
        }
        self.client.close(clock::now());
        self.settle();
        for (_, pending) in std::mem::take(&mut self.calls) {
            pending
                .sink
                .put(Outcome::Failed(Failure::Closed), &mut self.wake);
        }
        if self.client.session.open {
            for call in self.registry.farewells() {
                self.write_call(&call);
                self.expect(Expect::Ignore);
            }
            let sid = self.client.session.sid();
            self.write_script(Script::Close, None, &[sid.as_bytes()]);
            self.expect(Expect::Ignore);
        }
        self.closing = true;
    }

    /// True when the server has answered everything.
    pub fn quiet(&self) -> bool {
        !self.connected || (self.expected.is_empty() && self.out.is_empty())
    }

    /// Where changes of the registry are announced.
    pub fn registry_channel(&self) -> String {
        format!("{}:reg", self.tag)
    }

    /// Connected and the session confirmed.
    pub fn open(&self) -> bool {
        self.client.session.open
    }

    // ---- the engine thread

    /// The engine will look again at this time by itself.
    pub fn arm(&mut self) -> Micros {
        let mut next = Micros::MAX;
        if !self.closing {
            next = self.client.next_tick().min(self.next_call_timeout());
            // Or each request after a pause would wake the engine, which had meant to sleep for longer, only to see
            // that nothing is due.
            next = next.min(self.client.next_look());
            if self.open() {
                next = next.min(self.registry.next_due());
            }
        }
        if !self.expected.is_empty() {
            next = next.min(self.busy_since + self.request_timeout);
        }
        self.armed = next;
        next
    }

    /// Time passes; an error says why the connection has to be given up.
    pub fn tick(&mut self) -> Result<(), String> {
        let now = clock::now();
        let due = self.client.session.next_due();
        if self.open() && now > due + self.client.session.interval() / 2 {
            self.counts.late_heartbeats += 1;
        }
        let stalled = self
            .rings
            .iter()
            .any(|ring| ring.upgrade().is_some_and(|ring| ring.stalled(now)));
        self.client.stall(now, stalled);
        // After the end of the session was sent, a heartbeat would open another.
        if !self.closing {
            self.client.tick(now);
            if self.open() {
                let steps = self.registry.tick(now);
                self.run(steps);
            }
        }
        self.settle();
        let late: Vec<u64> = self
            .calls
            .iter()
            .filter(|(_, p)| p.since + self.request_timeout <= now)
            .map(|(id, _)| *id)
            .collect();
        for id in late {
            if let Some(pending) = self.calls.remove(&id) {
                let outcome = self.failed(self.client.absence());
                pending.sink.put(outcome, &mut self.wake);
            }
        }
        if self.connected
            && !self.expected.is_empty()
            && self.busy_since + self.request_timeout <= now
        {
            return Err(format!("no answer for {} ms", self.request_timeout / 1000));
        }
        Ok(())
    }

    /// The rings that need a signal.
    pub fn take_wake(&mut self) -> Vec<Arc<Ring>> {
        std::mem::take(&mut self.wake)
    }

    /// Answers the echoes.
    pub fn answer_echoes(&mut self) {
        for sink in std::mem::take(&mut self.echoes) {
            sink.put(Outcome::Echo, &mut self.wake);
        }
    }

    /// The handshake is done: the session opens. `run_id` is what the server calls its own process.
    pub fn connected(&mut self, direct: Option<Direct>, hashes: Vec<Bytes>, run_id: String) {
        let elsewhere = !self.server_id.is_empty() && self.server_id != run_id;
        self.direct = direct;
        self.hashes = hashes;
        self.server_id = run_id;
        self.loaded = [true; COUNT];
        self.starts = [const { None }; COUNT];
        self.out.clear();
        self.expected.clear();
        self.connected = true;
        self.misconfigured = false;
        self.counts.connections += 1;
        self.client.connected(clock::now(), elsewhere);
        self.settle();
    }

    /// The connection is gone.
    pub fn disconnected(&mut self, why: &str) {
        self.direct = None;
        self.connected = false;
        self.out.clear();
        self.expected.clear();
        let unknown = std::mem::take(&mut self.asking).into_iter();
        for sink in std::mem::take(&mut self.asked)
            .into_iter()
            .chain(unknown.map(|(_, sink)| sink))
        {
            let failure = Failure::Unavailable(why.to_owned());
            sink.put(Outcome::Failed(failure), &mut self.wake);
        }
        self.client.disconnected(clock::now(), why.to_owned());
        self.registry.disconnected();
        self.settle();
    }

    /// Which server process the connection is to, or was to last; empty before the first.
    pub fn server_id(&self) -> &str {
        &self.server_id
    }

    /// Bytes that nobody could write yet.
    pub fn take_out(&mut self) -> BytesMut {
        self.out.split()
    }

    /// No answer is due.
    pub fn idle(&self) -> bool {
        self.expected.is_empty()
    }

    /// There are bytes to write.
    pub fn has_out(&self) -> bool {
        !self.out.is_empty()
    }

    /// Writes to a plain socket; true when nothing is left or nothing can be written before a connection is there.
    pub fn flush(&mut self) -> bool {
        let Some(direct) = &self.direct else {
            return self.out.is_empty() || !self.connected;
        };
        while !self.out.is_empty() {
            match direct.try_write(&self.out) {
                Ok(n) => {
                    let _ = self.out.split_to(n);
                }
                // The engine waits until the socket takes more, and finds out about any other error by reading.
                Err(e) if e.kind() == ErrorKind::WouldBlock => return false,
                Err(_) => return false,
            }
        }
        true
    }
}
