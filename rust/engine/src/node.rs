//! One partition's state, shared by the callers, who submit, and the engine thread, which reads and keeps time.
//!
//! Callers write to a plain socket themselves when it takes the bytes at once: that saves a wake-up of the engine.
//! The lock is held for moments only and never while anybody waits for the interpreter.

use crate::clock;
use crate::registry::{Registry, Request, Step, Task};
use crate::ring::{Ring, Sink};
use crate::scripts::{COUNT, SCRIPTS, SUFFIXES, Script, tag};
use crate::transport::{Direct, Target};
use crate::wire::{self, Value};
use crate::{Outcome, Settings};
use bytes::{Bytes, BytesMut};
use dotmac_core::lease::{Lease, Micros};
use dotmac_core::locks::{Ask, Client, Command, Event, Failure, Heartbeat, Mode};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io::ErrorKind;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

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
    Ignore,
}

/// Everything of one partition.
pub struct State {
    /// The lock protocol.
    pub client: Client,
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
    loaded: [bool; COUNT],
    direct: Option<Direct>,
    connected: bool,
    sinks: HashMap<u64, Sink>,
    next_token: u64,
    calls: BTreeMap<u64, Pending>,
    /// Instances of this process, and services that it follows.
    pub registry: Registry,
    echoes: Vec<Sink>,
    rings: Vec<std::sync::Weak<Ring>>,
    wake: Vec<Arc<Ring>>,
    armed: Micros,
    /// Counters for `stats`.
    pub counts: Counts,
    /// Set by `close`.
    pub closing: bool,
    /// The engine thread has ended.
    pub ended: bool,
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
}

impl Node {
    /// A partition of which nothing is known yet.
    pub fn new(settings: &Settings) -> Self {
        let tag = tag(&settings.namespace, 0);
        let mut keys = BytesMut::new();
        wire::bulk(&mut keys, SUFFIXES.len().to_string().as_bytes());
        for suffix in SUFFIXES {
            wire::bulk(&mut keys, format!("{tag}:{suffix}").as_bytes());
        }
        let timeout = settings.target.request_timeout;
        Self {
            state: Mutex::new(State {
                client: Client::new(settings.session.clone(), settings.chance, timeout),
                inbox: format!("{tag}:inbox:"),
                tag,
                who: settings.who.clone(),
                request_timeout: timeout,
                keys,
                out: BytesMut::with_capacity(64 * 1024),
                expected: VecDeque::new(),
                busy_since: 0,
                hashes: Vec::new(),
                loaded: [false; COUNT],
                direct: None,
                connected: false,
                sinks: HashMap::new(),
                next_token: 0,
                calls: BTreeMap::new(),
                registry: Registry::default(),
                echoes: Vec::new(),
                rings: Vec::new(),
                wake: Vec::new(),
                armed: 0,
                counts: Counts::default(),
                closing: false,
                ended: false,
            }),
            notify: Notify::new(),
            target: settings.target.clone(),
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
        let idle = state.expected.len() <= 1;
        let wrote = (flush || idle) && state.flush();
        let engine = state.client.next_tick().min(state.next_call_timeout()) < state.armed;
        let wake = std::mem::take(&mut state.wake);
        let waiting = !state.out.is_empty();
        // Unsent bytes on a connection that only the engine may write to, or that takes no more at once.
        let stuck = waiting && (flush || idle) && !wrote;
        drop(state);
        if engine || stuck {
            self.notify.notify_one();
        }
        for ring in wake {
            ring.signal();
        }
        waiting && !(flush || idle)
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
                let failure = self.client.absence();
                pending.sink.put(Outcome::Failed(failure), &mut self.wake);
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

    /// The handshake is done: the session opens.
    pub fn connected(&mut self, direct: Option<Direct>, hashes: Vec<Bytes>) {
        self.direct = direct;
        self.hashes = hashes;
        self.loaded = [true; COUNT];
        self.out.clear();
        self.expected.clear();
        self.connected = true;
        self.counts.connections += 1;
        self.client.connected(clock::now());
        self.settle();
    }

    /// The connection is gone.
    pub fn disconnected(&mut self, why: &str) {
        self.direct = None;
        self.connected = false;
        self.out.clear();
        self.expected.clear();
        self.client.disconnected(clock::now(), why.to_owned());
        self.registry.disconnected();
        self.settle();
    }

    /// The credentials are refused.
    pub fn denied(&mut self, why: &str) {
        self.disconnected(why);
        self.client.denied(why);
        for (_, pending) in std::mem::take(&mut self.calls) {
            pending.sink.put(
                Outcome::Failed(Failure::Denied(why.to_owned())),
                &mut self.wake,
            );
        }
        self.settle();
    }

    /// Bytes that nobody could write yet.
    pub fn take_out(&mut self) -> BytesMut {
        self.out.split()
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

    /// A message that the server pushed.
    pub fn on_push(&mut self, value: &Value) {
        let [
            Value::Bytes(kind),
            Value::Bytes(channel),
            Value::Bytes(payload),
        ] = value.items()
        else {
            return;
        };
        if &kind[..] != b"message" {
            return;
        }
        let now = clock::now();
        let text = String::from_utf8_lossy(payload);
        if channel[..] == *self.registry_channel().as_bytes() {
            let steps = self.registry.on_change(&text);
            self.run(steps);
            return;
        }
        let parts: Vec<&str> = text.split('\0').collect();
        match parts[..] {
            ["g", _, request, fence, stamp] => {
                if let Some((sid, id)) = request.rsplit_once(':')
                    && let (Ok(id), Ok(fence), Ok(stamp)) =
                        (id.parse(), fence.parse(), stamp.parse())
                {
                    self.client.on_grant(now, sid, id, fence, stamp);
                }
            }
            ["x", fence, reason] => {
                if let Ok(fence) = fence.parse() {
                    self.client.on_revoked(fence, reason);
                }
            }
            _ => {}
        }
    }

    /// An answer to the oldest command; an error says why the connection can't be trusted any more.
    pub fn on_reply(&mut self, value: Value) -> Result<(), String> {
        let now = clock::now();
        self.busy_since = now;
        let expect = self
            .expected
            .pop_front()
            .ok_or("an answer that nothing had asked for")?;
        if let Value::Error(text) = &value {
            let text = text.clone();
            return self.on_error(expect, &text);
        }
        match expect {
            Expect::Command(command) => self.on_command_reply(now, command, &value),
            Expect::Call(id) => {
                if let Some(pending) = self.calls.remove(&id) {
                    if let Some(task) = &pending.task {
                        if task.needs_session()
                            && value.items().first().and_then(Value::int) == Some(0)
                        {
                            // The session has gone: the next heartbeat finds that out, and what it opens sends this again.
                            self.client.session.hurry(now);
                            self.calls.insert(id, pending);
                            return Ok(());
                        }
                        self.on_registry_reply(task, &value);
                    }
                    pending.sink.put(Outcome::Reply(value), &mut self.wake);
                }
                Ok(())
            }
            Expect::Ignore => Ok(()),
        }
    }

    fn on_command_reply(
        &mut self,
        now: Micros,
        command: Command,
        value: &Value,
    ) -> Result<(), String> {
        match command {
            Command::Acquire(id) => self.client.on_acquire(now, id, wire::acquire_reply(value)?),
            Command::Release { fence, .. } => self.client.on_release(fence, value.int() == Some(1)),
            Command::Cancel { request, .. } => self.client.on_cancel(request),
            Command::Extend(id) => {
                let items = value.items();
                let held = items.first().and_then(Value::int) == Some(1);
                let stamp = items.get(1).and_then(Value::int).map(i64::unsigned_abs);
                self.client.on_extend(id, stamp.filter(|_| held));
            }
            Command::Heartbeat(sent) => {
                self.counts.heartbeats += 1;
                let silent = now.saturating_sub(self.client.session.clock.confirmed());
                if self.client.session.open && self.registry.may_have_died(silent) {
                    let steps = self.registry.opened();
                    self.run(steps);
                }
                if let Some(reply) = wire::heartbeat_reply(value)? {
                    self.client.on_heartbeat(now, &sent, reply);
                }
            }
        }
        Ok(())
    }

    fn on_error(&mut self, expect: Expect, text: &str) -> Result<(), String> {
        if text.starts_with("NOSCRIPT") {
            self.loaded = [false; COUNT];
            match expect {
                Expect::Command(command) => self.write_command(command),
                Expect::Call(id) => {
                    if let Some(call) = self.calls.get(&id).map(|p| p.call.clone()) {
                        self.send_call(id, &call);
                    }
                }
                Expect::Ignore => {}
            }
            return Ok(());
        }
        // The server is there but can't serve: a replica after a failover, or data still being loaded.
        if ["LOADING", "READONLY", "MASTERDOWN", "NOAUTH"]
            .iter()
            .any(|code| text.starts_with(code))
        {
            return Err(text.to_owned());
        }
        match expect {
            Expect::Command(Command::Heartbeat(_)) => {
                return Err(format!("{text} (answer to a heartbeat)"));
            }
            Expect::Command(command) => self.client.on_refused(&command, text),
            Expect::Call(id) => {
                if let Some(pending) = self.calls.remove(&id) {
                    pending.sink.put(
                        Outcome::Failed(Failure::Refused(text.to_owned())),
                        &mut self.wake,
                    );
                }
            }
            Expect::Ignore => {}
        }
        Ok(())
    }

    /// Turns what the protocol wants into bytes and results.
    pub fn settle(&mut self) {
        loop {
            for command in std::mem::take(&mut self.client.commands) {
                self.write_command(command);
            }
            let events = std::mem::take(&mut self.client.events);
            if events.is_empty() {
                return;
            }
            for event in events {
                self.on_event(event);
            }
        }
    }

    fn on_event(&mut self, event: Event) {
        match event {
            Event::Granted(token, lease) => self.finish(token, Outcome::Granted(lease)),
            Event::NotFree(token, left) => self.finish(token, Outcome::NotFree(left)),
            Event::Deadlock(token, cycle) => self.finish(token, Outcome::Deadlock(cycle)),
            Event::TimedOut(token) => self.finish(token, Outcome::TimedOut),
            Event::Cancelled(token) => self.finish(token, Outcome::Cancelled),
            Event::Released(token, held) => self.finish(token, Outcome::Released(held)),
            Event::Extended(token, held) => self.finish(token, Outcome::Extended(held)),
            Event::Failed(token, failure) => self.finish(token, Outcome::Failed(failure)),
            Event::Lost(lease) => {
                self.counts.losses += 1;
                for ring in self.rings.iter().filter_map(std::sync::Weak::upgrade) {
                    Sink::Ring(ring, lease.id).put(Outcome::Lost(lease.clone()), &mut self.wake);
                }
            }
            Event::Opened(fresh) => self.on_opened(fresh),
        }
    }

    fn on_opened(&mut self, fresh: bool) {
        self.counts.sessions += u64::from(fresh);
        // What the registry wants is asked for anew below, as far as it still wants it.
        self.calls
            .retain(|_, p| p.task.is_none() || !matches!(p.sink, Sink::Nobody));
        let waiting: Vec<_> = self
            .calls
            .iter()
            .map(|(id, p)| (*id, p.call.clone()))
            .collect();
        for (id, call) in waiting {
            self.send_call(id, &call);
        }
        let steps = self.registry.opened();
        self.run(steps);
    }

    fn finish(&mut self, token: u64, outcome: Outcome) {
        if let Some(sink) = self.sinks.remove(&token) {
            sink.put(outcome, &mut self.wake);
        }
    }

    fn next_call_timeout(&self) -> Micros {
        self.calls
            .values()
            .next()
            .map_or(Micros::MAX, |p| p.since + self.request_timeout)
    }

    // ---- bytes

    fn expect(&mut self, expect: Expect) {
        if self.expected.is_empty() {
            self.busy_since = clock::now();
        }
        self.expected.push_back(expect);
    }

    fn write_script(&mut self, script: Script, keys: Option<&[&str]>, args: &[&[u8]]) {
        let index = script as usize;
        let count = keys.map_or(SUFFIXES.len(), <[_]>::len);
        wire::head(&mut self.out, 3 + count + args.len());
        match self.hashes.get(index) {
            Some(hash) if self.loaded[index] => {
                self.out.extend_from_slice(b"$7\r\nEVALSHA\r\n");
                wire::bulk(&mut self.out, hash);
            }
            _ => {
                self.out.extend_from_slice(b"$4\r\nEVAL\r\n");
                wire::bulk(&mut self.out, SCRIPTS[index].1.as_bytes());
                self.loaded[index] = index < self.hashes.len();
            }
        }
        match keys {
            None => self.out.extend_from_slice(&self.keys),
            Some(suffixes) => {
                wire::bulk(&mut self.out, count.to_string().as_bytes());
                for suffix in suffixes {
                    wire::bulk(&mut self.out, format!("{}:{suffix}", self.tag).as_bytes());
                }
            }
        }
        for arg in args {
            wire::bulk(&mut self.out, arg);
        }
    }

    fn send_call(&mut self, id: u64, call: &Call) {
        self.write_call(call);
        self.expect(Expect::Call(id));
    }

    fn write_call(&mut self, call: &Call) {
        let sid = self.client.session.sid();
        let gen_ = self.client.session.gen_.to_string();
        let channel = self.registry_channel();
        let args: Vec<&[u8]> = call
            .args
            .iter()
            .map(|arg| match arg {
                Arg::Bytes(bytes) => &bytes[..],
                Arg::Sid => sid.as_bytes(),
                Arg::Gen => gen_.as_bytes(),
                Arg::Channel => channel.as_bytes(),
            })
            .collect();
        self.write_script(call.script, Some(call.keys), &args);
    }

    fn write_command(&mut self, command: Command) {
        if !self.connected {
            return;
        }
        let inbox = std::mem::take(&mut self.inbox);
        let written = self.write_lock_command(&command, inbox.as_bytes());
        self.inbox = inbox;
        if written {
            self.expect(Expect::Command(command));
        }
    }

    /// False if the command has nothing to say any more.
    fn write_lock_command(&mut self, command: &Command, inbox: &[u8]) -> bool {
        let mut a = itoa::Buffer::new();
        let mut b = itoa::Buffer::new();
        let mut c = itoa::Buffer::new();
        match command {
            Command::Acquire(id) => {
                let Some(request) = self.client.request(*id) else {
                    return false;
                };
                let (ask, sid) = (request.ask.clone(), request.sid.clone());
                let number = format!("{sid}:{id}");
                let owner = format!("{sid}/{}", ask.owner);
                self.write_script(
                    Script::Acquire,
                    None,
                    &[
                        ask.name.as_bytes(),
                        sid.as_bytes(),
                        a.format(self.client.session.gen_).as_bytes(),
                        owner.as_bytes(),
                        b.format(ask.timeout / 1000).as_bytes(),
                        number.as_bytes(),
                        c.format(ask.since).as_bytes(),
                        if ask.fixed { b"@" } else { b"" },
                        if ask.wait { b"w" } else { b"t" },
                        inbox,
                    ],
                );
            }
            Command::Release { name, fence } => {
                self.write_script(
                    Script::Release,
                    None,
                    &[name.as_bytes(), a.format(*fence).as_bytes(), inbox],
                );
            }
            Command::Cancel { request, sid, name } => {
                let number = format!("{sid}:{request}");
                self.write_script(
                    Script::Cancel,
                    None,
                    &[name.as_bytes(), number.as_bytes(), inbox],
                );
            }
            Command::Extend(id) => {
                let Some(extension) = self.client.extension(*id) else {
                    return false;
                };
                let (lease, timeout) = (extension.lease.clone(), extension.timeout / 1000);
                let sid = self.client.session.sid();
                self.write_script(
                    Script::Extend,
                    None,
                    &[
                        lease.name.as_bytes(),
                        a.format(lease.fence).as_bytes(),
                        b.format(timeout).as_bytes(),
                        sid.as_bytes(),
                        c.format(self.client.session.gen_).as_bytes(),
                        inbox,
                    ],
                );
            }
            Command::Heartbeat(heartbeat) => self.write_heartbeat(heartbeat, inbox),
        }
        true
    }

    fn write_heartbeat(&mut self, heartbeat: &Heartbeat, inbox: &[u8]) {
        let opening = heartbeat.mode != Mode::Keep;
        if opening {
            // Its confirmation comes as a push, so nothing is expected for it.
            let channel = [inbox, heartbeat.sid.as_bytes()].concat();
            wire::command(&mut self.out, &[b"SUBSCRIBE", &channel]);
        }
        let who = if opening {
            self.who.clone()
        } else {
            String::new()
        };
        let (gen_, stamp) = (heartbeat.gen_.to_string(), heartbeat.stamp.to_string());
        let longest = heartbeat.longest.div_ceil(1000).to_string();
        let fences: Vec<String> = heartbeat
            .claims
            .iter()
            .map(|(_, fence)| fence.to_string())
            .collect();
        let mode: &[u8] = match heartbeat.mode {
            Mode::Open => b"n",
            Mode::Resume => b"r",
            Mode::Keep => b"h",
        };
        let mut args: Vec<&[u8]> = vec![
            heartbeat.sid.as_bytes(),
            gen_.as_bytes(),
            stamp.as_bytes(),
            longest.as_bytes(),
            mode,
            who.as_bytes(),
            heartbeat.acknowledge.as_bytes(),
        ];
        for ((name, _), fence) in heartbeat.claims.iter().zip(&fences) {
            args.push(name.as_bytes());
            args.push(fence.as_bytes());
        }
        args.push(inbox);
        self.write_script(Script::Heartbeat, None, &args);
    }
}
