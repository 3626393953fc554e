//! Clients, connections and a server in simulated time, with everything that can go wrong between them.
//!
//! Each connection is first in, first out in both directions; every message has its own delay. Time is real time in
//! microseconds: every client sees it through a clock of its own with another start and up to 0.4 % off.

use super::server::{Acquire, Clock, Push, Server};
use dotmac_core::lease::{Lease, Micros};
use dotmac_core::locks::{
    AcquireReply, Ask, Client, Command, Event, Heartbeat, HeartbeatReply, Mode,
};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

const MS: Micros = 1_000;
const SECOND: Micros = 1_000_000;
const REQUEST_TIMEOUT: Micros = 5 * SECOND;
/// Well above the gap rule, also for two steps at once.
const CLOCK_STEP: i64 = 10 * SECOND.cast_signed();
/// After which everything must have come to rest.
const REST: Micros = 90 * SECOND;

/// A rule that is switched off, to see that its absence is noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Broken {
    Nothing,
    /// A lease counts from the arrival of the grant.
    GrantStamp,
    /// A lease counts from the arrival of a heartbeat's answer.
    HeartbeatStamp,
    /// A grant out of the queue is believed whole without a claim.
    Claim,
    /// The logical clock advances over gaps.
    Gaps,
    /// The server judges on its wall clock.
    WallClock,
    /// The server accepts commands of older connections.
    Generations,
    /// A holder believes until it is told, whatever its own deadline says.
    LocalDeadline,
    /// Releases never arrive.
    Releases,
    /// Cancellations never arrive.
    Cancels,
    /// The fence counter starts anew with the data.
    Fences,
}

/// What happens next in a schedule. Clients, locks and numbers wrap around.
#[derive(Debug, Clone)]
pub enum Step {
    Acquire {
        client: usize,
        lock: usize,
        /// Milliseconds.
        timeout: u64,
        fixed: bool,
        wait: bool,
        patience: Option<u64>,
        owner: usize,
    },
    Release(usize, usize),
    Cancel(usize, usize),
    Extend(usize, usize, u64),
    /// The process stands still for so many milliseconds.
    Pause(usize, u64),
    PauseServer(u64),
    /// The server's wall clock jumps by so many tens of seconds.
    MoveClock(i8),
    /// The connection is lost.
    Cut(usize),
    /// The server comes back without its data.
    Restart,
    /// The data is gone, the connections stay.
    Flush,
    /// The server answers the client's next commands with errors.
    Refuse(usize, u8),
}

#[derive(Debug)]
enum Wire {
    Heartbeat(Heartbeat),
    Acquire(Acquire),
    Release(Arc<str>, u64),
    Cancel(u64, Arc<str>, Arc<str>),
    Extend {
        id: u64,
        lock: (Arc<str>, u64),
        timeout: u64,
        session: (String, u64),
    },
}

#[derive(Debug)]
enum Answer {
    /// With the life of the data in which it was given.
    Heartbeat(Heartbeat, HeartbeatReply, u64),
    Acquire(u64, AcquireReply),
    Release(u64, bool),
    Cancel(u64),
    Extend(u64, Option<Micros>),
    Refused(Command),
    Push(Push),
}

#[derive(Debug, Clone, Copy)]
enum Happening {
    /// The oldest command on the way arrives at the server.
    Up(u64),
    /// The oldest answer on the way arrives at the client.
    Down(u64),
    /// The client finds its connection gone.
    Noticed(u64),
    Connect(usize),
    Tick(usize),
}

#[derive(Debug, Default)]
struct Connection {
    client: usize,
    cut: bool,
    up: VecDeque<Wire>,
    down: VecDeque<Answer>,
    last_up: Micros,
    last_down: Micros,
    inboxes: BTreeSet<String>,
}

/// A process with its machine.
#[derive(Debug)]
pub struct Process {
    pub client: Client,
    start: Micros,
    /// Microseconds of its clock per second.
    rate: Micros,
    paused_until: Micros,
    connection: Option<u64>,
    tick_at: Micros,
    requests: Vec<(u64, u64)>,
    leases: Vec<Arc<Lease>>,
    /// Owners that wait in a queue, by token: each waits for one at a time.
    busy: BTreeMap<u64, usize>,
    refuse: u8,
    /// The life of the server's data that it has last heard of.
    heard_of: u64,
    pub heartbeats: u64,
}

impl Process {
    fn clock(&self, real: Micros) -> Micros {
        self.start + real * self.rate / SECOND
    }

    fn real(&self, clock: Micros) -> Micros {
        let passed = u128::from(clock.saturating_sub(self.start)) * u128::from(SECOND);
        Micros::try_from(passed.div_ceil(u128::from(self.rate))).unwrap_or(Micros::MAX)
    }
}

/// What happened, for tests that look at more than the violations.
#[derive(Debug, Default, Clone, Copy)]
pub struct Counts {
    pub granted: u64,
    pub lost: u64,
    pub deadlocks: u64,
    pub extended: u64,
    pub overlaps_after_loss: u64,
}

#[derive(Debug)]
pub struct World {
    pub now: Micros,
    pub server: Server,
    pub processes: Vec<Process>,
    pub violations: Vec<String>,
    pub counts: Counts,
    broken: Broken,
    chance: fastrand::Rng,
    server_paused_until: Micros,
    wall_offset: i64,
    connections: BTreeMap<u64, Connection>,
    agenda: BTreeMap<(Micros, u64), Happening>,
    serial: u64,
    faults: bool,
    /// Calls that have no final event yet.
    open: BTreeSet<u64>,
    last_fence: BTreeMap<Arc<str>, u64>,
    /// Every lease that was granted and has not ended, with its process.
    believed: BTreeMap<Arc<str>, Vec<(usize, Arc<Lease>)>>,
}

impl World {
    pub fn new(processes: usize, seed: u64, broken: Broken) -> Self {
        let mut chance = fastrand::Rng::with_seed(seed);
        let clock = match broken {
            Broken::Gaps => Clock::CountsGaps,
            Broken::WallClock => Clock::Wall,
            _ => Clock::Logical,
        };
        let mut server = Server::new(clock, broken != Broken::Generations);
        server.small_fences = broken == Broken::Fences;
        let mut world = Self {
            now: 0,
            server,
            processes: (0..processes)
                .map(|i| Process {
                    client: Client::new(format!("s{i}"), chance.u64(..), REQUEST_TIMEOUT),
                    start: chance.u64(0..1_000 * SECOND),
                    rate: chance.u64(996_000..1_004_000),
                    paused_until: 0,
                    connection: None,
                    tick_at: 0,
                    requests: Vec::new(),
                    leases: Vec::new(),
                    busy: BTreeMap::new(),
                    refuse: 0,
                    heard_of: 0,
                    heartbeats: 0,
                })
                .collect(),
            violations: Vec::new(),
            counts: Counts::default(),
            broken,
            chance,
            server_paused_until: 0,
            wall_offset: 1_700_000_000 * SECOND.cast_signed(),
            connections: BTreeMap::new(),
            agenda: BTreeMap::new(),
            serial: 0,
            faults: true,
            open: BTreeSet::new(),
            last_fence: BTreeMap::new(),
            believed: BTreeMap::new(),
        };
        for i in 0..processes {
            world.at(world.now + i as u64, Happening::Connect(i));
        }
        world
    }

    /// Plays one step.
    pub fn play(&mut self, step: &Step) {
        let n = self.processes.len();
        match *step {
            Step::Acquire {
                client,
                lock,
                timeout,
                fixed,
                wait,
                patience,
                owner,
            } => {
                let ask = Ask {
                    name: format!("lock{lock}").into(),
                    owner: format!("o{owner}").into(),
                    timeout: timeout * MS,
                    fixed,
                    wait,
                    patience: patience.map(|p| p * MS),
                    since: 0,
                };
                self.acquire(client % n, ask, owner);
            }
            Step::Release(i, which) => self.release(i % n, which),
            Step::Cancel(i, which) => self.cancel(i % n, which),
            Step::Extend(i, which, timeout) => self.extend(i % n, which, timeout * MS),
            Step::Pause(i, ms) => self.processes[i % n].paused_until = self.now + ms * MS,
            Step::PauseServer(ms) => self.server_paused_until = self.now + ms * MS,
            Step::MoveClock(tens) => self.wall_offset += i64::from(tens) * CLOCK_STEP,
            Step::Cut(i) => self.cut(i % n),
            Step::Restart => {
                self.server.lose_data();
                for i in 0..n {
                    self.cut(i);
                }
                for connection in self.connections.values_mut() {
                    connection.up.clear();
                }
            }
            Step::Flush => self.server.lose_data(),
            Step::Refuse(i, commands) => self.processes[i % n].refuse = commands,
        }
    }

    /// No faults from here on: short delays, no pauses, no errors.
    pub fn calm(&mut self) {
        self.faults = false;
        self.server_paused_until = self.now;
        for process in &mut self.processes {
            process.paused_until = self.now;
            process.refuse = 0;
        }
    }

    /// Lets real time pass.
    pub fn pass(&mut self, time: Micros) {
        let until = self.now + time;
        while let Some(entry) = self.agenda.first_entry() {
            if entry.key().0 > until || !self.violations.is_empty() {
                break;
            }
            self.now = self.now.max(entry.key().0);
            let happening = entry.remove();
            self.happen(happening);
        }
        self.now = until;
    }

    /// No more faults: everything that is held is given back, and everything must come to rest.
    pub fn come_to_rest(&mut self) {
        self.calm();
        let end = self.now + REST;
        while self.now < end && self.violations.is_empty() {
            self.pass(100 * MS);
            for i in 0..self.processes.len() {
                while !self.processes[i].leases.is_empty() {
                    self.release(i, 0);
                }
            }
            if self.at_rest() {
                break;
            }
        }
        if self.violations.is_empty() && !self.at_rest() {
            let open = &self.open;
            let left: Vec<_> = self
                .processes
                .iter()
                .map(|p| {
                    (
                        p.client.held(),
                        p.client.unanswered(),
                        p.client.session.open,
                        p.client.session.interval(),
                    )
                })
                .collect();
            self.violations.push(format!(
                "not at rest: calls without an end {open:?}, clients {left:?}, server {:?}",
                self.server.leftovers()
            ));
        }
    }

    fn at_rest(&self) -> bool {
        self.open.is_empty()
            && self.server.leftovers().is_empty()
            && self.processes.iter().all(|p| {
                p.client.held() == 0
                    && p.client.unanswered() == 0
                    && p.client.session.open
                    // No length of a lease or a request is counted any more.
                    && (p.client.session.interval(), p.client.session.longest())
                        == (SECOND, 10 * SECOND)
            })
    }

    // ---- calls

    pub fn acquire(&mut self, i: usize, mut ask: Ask, owner: usize) {
        if self.paused(i) {
            return;
        }
        let token = self.token();
        let now = self.now;
        let process = &mut self.processes[i];
        if process.busy.values().any(|busy| *busy == owner) {
            // An owner waits for one lock at a time.
            ask.owner = format!("token{token}").into();
        } else {
            process.busy.insert(token, owner);
        }
        let id = process.client.acquire(process.clock(now), ask, token);
        process.requests.push((token, id));
        self.settle(i);
    }

    fn release(&mut self, i: usize, which: usize) {
        if self.paused(i) || self.processes[i].leases.is_empty() {
            return;
        }
        let token = self.token();
        let now = self.now;
        let process = &mut self.processes[i];
        let lease = process.leases.swap_remove(which % process.leases.len());
        let clock = process.clock(now);
        if !process.client.release(clock, &lease, Some(token)) {
            self.open.remove(&token);
        }
        self.settle(i);
    }

    fn cancel(&mut self, i: usize, which: usize) {
        if self.paused(i) || self.processes[i].requests.is_empty() {
            return;
        }
        let process = &mut self.processes[i];
        let (_, id) = process.requests.swap_remove(which % process.requests.len());
        process.client.cancel(id);
        self.settle(i);
    }

    fn extend(&mut self, i: usize, which: usize, timeout: Micros) {
        if self.paused(i) || self.processes[i].leases.is_empty() {
            return;
        }
        let token = self.token();
        let now = self.now;
        let process = &mut self.processes[i];
        let lease = process.leases[which % process.leases.len()].clone();
        let clock = process.clock(now);
        if !process.client.extend(clock, &lease, timeout, token) {
            self.open.remove(&token);
        }
        self.settle(i);
    }

    fn token(&mut self) -> u64 {
        self.serial += 1;
        self.open.insert(self.serial);
        self.serial
    }

    // ---- the driver of a process

    fn paused(&self, i: usize) -> bool {
        self.processes[i].paused_until > self.now
    }

    /// Sends what the machine wants sent, notes its events, looks whether what is believed is right.
    fn settle(&mut self, i: usize) {
        let commands = std::mem::take(&mut self.processes[i].client.commands);
        for command in commands {
            self.send(i, command);
        }
        for event in std::mem::take(&mut self.processes[i].client.events) {
            self.on_event(i, event);
        }
        self.look(i);
        let process = &mut self.processes[i];
        let next = process.client.next_tick();
        if next == Micros::MAX {
            process.tick_at = Micros::MAX;
            return;
        }
        let at = process.real(next).max(self.now);
        if at != process.tick_at {
            process.tick_at = at;
            self.at(at, Happening::Tick(i));
        }
    }

    fn send(&mut self, i: usize, command: Command) {
        let process = &mut self.processes[i];
        let Some(number) = process.connection else {
            return;
        };
        let wire = match &command {
            Command::Heartbeat(heartbeat) => {
                process.heartbeats += 1;
                Wire::Heartbeat(heartbeat.clone())
            }
            Command::Acquire(id) => {
                let Some(request) = process.client.request(*id) else {
                    return;
                };
                Wire::Acquire(Acquire {
                    name: request.ask.name.clone(),
                    number: (request.sid.to_string(), *id),
                    gen_: process.client.session.gen_,
                    owner: format!("{}/{}", request.sid, request.ask.owner),
                    timeout: request.ask.timeout / MS,
                    fixed: request.ask.fixed,
                    wait: request.ask.wait,
                })
            }
            Command::Release { name, fence } => Wire::Release(name.clone(), *fence),
            Command::Cancel { request, sid, name } => {
                Wire::Cancel(*request, sid.clone(), name.clone())
            }
            Command::Extend(id) => {
                let Some(extension) = process.client.extension(*id) else {
                    return;
                };
                Wire::Extend {
                    id: *id,
                    lock: (extension.lease.name.clone(), extension.lease.fence),
                    timeout: extension.timeout / MS,
                    session: (process.client.session.sid(), process.client.session.gen_),
                }
            }
        };
        if process.refuse > 0 && !matches!(wire, Wire::Heartbeat(_)) {
            process.refuse -= 1;
            self.answer(number, Answer::Refused(command));
            return;
        }
        let delay = self.delay();
        let Some(connection) = self.connections.get_mut(&number) else {
            return;
        };
        if connection.cut {
            return;
        }
        connection.up.push_back(wire);
        connection.last_up = connection.last_up.max(self.now + delay);
        let at = connection.last_up;
        self.at(at, Happening::Up(number));
    }

    fn on_event(&mut self, i: usize, event: Event) {
        let token = match event {
            Event::Granted(token, lease) => {
                self.counts.granted += 1;
                let last = self.last_fence.entry(lease.name.clone()).or_default();
                if lease.fence > *last {
                    *last = lease.fence;
                } else if !self.server.of_lost_data(lease.fence, *last)
                    || self.processes[i].heard_of == self.server.life
                {
                    self.violations.push(format!(
                        "{}: fence {} believed after {last}",
                        lease.name, lease.fence
                    ));
                }
                self.believed
                    .entry(lease.name.clone())
                    .or_default()
                    .push((i, lease.clone()));
                self.processes[i].leases.push(lease);
                token
            }
            Event::Lost(lease) => {
                self.counts.lost += 1;
                self.processes[i].leases.retain(|held| held.id != lease.id);
                return;
            }
            Event::Opened(_) => return,
            Event::Deadlock(token, _) => {
                self.counts.deadlocks += 1;
                token
            }
            Event::Extended(token, held) => {
                self.counts.extended += u64::from(held);
                token
            }
            Event::NotFree(token, _)
            | Event::TimedOut(token)
            | Event::Cancelled(token)
            | Event::Released(token, _)
            | Event::Failed(token, _) => token,
        };
        let process = &mut self.processes[i];
        process.busy.remove(&token);
        process.requests.retain(|(other, _)| *other != token);
        if !self.open.remove(&token) {
            self.violations
                .push(format!("a second final event for call {token}"));
        }
    }

    fn believes(&self, i: usize, lease: &Lease) -> bool {
        if self.broken == Broken::LocalDeadline {
            return !lease.released() && lease.loss().is_none();
        }
        lease.held_at(self.processes[i].clock(self.now))
    }

    /// A belief begins or grows only when its process does something, so it is enough to look then.
    fn look(&mut self, i: usize) {
        let mut believed = std::mem::take(&mut self.believed);
        for (name, leases) in &mut believed {
            leases.retain(|(_, lease)| !lease.released() && lease.loss().is_none());
            let now: Vec<_> = leases
                .iter()
                .filter(|(i, lease)| self.believes(*i, lease))
                .collect();
            for (k, (a, older)) in now.iter().enumerate() {
                for (b, newer) in &now[k + 1..] {
                    // Across a loss of data the older one may believe until its process hears of it.
                    let lost = |x: &Lease, y: &Lease, i: usize| {
                        self.server.of_lost_data(x.fence, y.fence)
                            && self.processes[i].heard_of < self.server.life
                    };
                    if lost(older, newer, *a) || lost(newer, older, *b) {
                        self.counts.overlaps_after_loss += 1;
                        continue;
                    }
                    self.violations.push(format!(
                        "{} s after an act of {i}: {a} and {b} both believe in {name}: {older:?} {newer:?}",
                        self.now / SECOND
                    ));
                }
            }
        }
        self.believed = believed;
    }

    // ---- the network

    fn at(&mut self, time: Micros, happening: Happening) {
        self.serial += 1;
        self.agenda.insert((time, self.serial), happening);
    }

    fn delay(&mut self) -> Micros {
        if !self.faults {
            return self.chance.u64(50..2 * MS);
        }
        match self.chance.u8(..) {
            0..=2 => self.chance.u64(..4 * SECOND),
            3..=15 => self.chance.u64(..400 * MS),
            _ => self.chance.u64(50..5 * MS),
        }
    }

    fn answer(&mut self, number: u64, answer: Answer) {
        let delay = self.delay();
        let Some(connection) = self.connections.get_mut(&number) else {
            return;
        };
        if connection.cut {
            return;
        }
        connection.down.push_back(answer);
        connection.last_down = connection.last_down.max(self.now + delay);
        let at = connection.last_down;
        self.at(at, Happening::Down(number));
    }

    /// The connection is lost: some of the commands on the way still run, perhaps late; no answer arrives.
    fn cut(&mut self, i: usize) {
        let Some(number) = self.processes[i].connection else {
            return;
        };
        let late = if self.chance.bool() {
            self.chance.u64(..8 * SECOND)
        } else {
            0
        };
        let Some(connection) = self.connections.get_mut(&number).filter(|c| !c.cut) else {
            return;
        };
        connection.cut = true;
        connection.down.clear();
        let arrive = self.chance.usize(..=connection.up.len());
        let ghost = Connection {
            client: i,
            cut: true,
            up: connection.up.drain(..arrive).collect(),
            ..Connection::default()
        };
        connection.up.clear();
        let last = connection.last_up;
        self.serial += 1;
        let ghost_number = self.serial;
        self.connections.insert(ghost_number, ghost);
        for k in 0..arrive {
            self.at(
                last.max(self.now) + late + k as u64,
                Happening::Up(ghost_number),
            );
        }
        let notice = self.chance.u64(..SECOND);
        self.at(self.now + notice, Happening::Noticed(number));
    }

    fn happen(&mut self, happening: Happening) {
        let waits = match happening {
            Happening::Up(_) => self.server_paused_until,
            Happening::Down(number) | Happening::Noticed(number) => self
                .connections
                .get(&number)
                .map_or(0, |c| self.processes[c.client].paused_until),
            Happening::Connect(i) | Happening::Tick(i) => self.processes[i].paused_until,
        };
        if waits > self.now {
            self.at(waits, happening);
            if let Happening::Tick(i) = happening {
                self.processes[i].tick_at = waits;
            }
            return;
        }
        match happening {
            Happening::Up(number) => self.on_command(number),
            Happening::Down(number) => self.on_answer(number),
            Happening::Noticed(number) => {
                let Some(connection) = self.connections.remove(&number) else {
                    return;
                };
                let i = connection.client;
                let process = &mut self.processes[i];
                process.connection = None;
                let clock = process.clock(self.now);
                process.client.disconnected(clock, String::from("cut"));
                let backoff = self
                    .chance
                    .u64(..if self.faults { 3 * SECOND } else { 100 * MS });
                self.at(self.now + backoff, Happening::Connect(i));
                self.settle(i);
            }
            Happening::Connect(i) => {
                self.serial += 1;
                let number = self.serial;
                let connection = Connection {
                    client: i,
                    ..Connection::default()
                };
                self.connections.insert(number, connection);
                let process = &mut self.processes[i];
                process.connection = Some(number);
                process.client.connected(process.clock(self.now));
                self.settle(i);
            }
            Happening::Tick(i) => {
                let process = &mut self.processes[i];
                if process.tick_at != self.now {
                    return;
                }
                process.tick_at = 0;
                let clock = process.clock(self.now);
                process.client.tick(clock);
                let next = process.client.next_tick();
                if next <= clock {
                    self.violations.push(format!(
                        "client {i} wants to be called again at {next} at {clock}"
                    ));
                }
                self.settle(i);
            }
        }
    }

    fn on_command(&mut self, number: u64) {
        let Some(connection) = self.connections.get_mut(&number) else {
            return;
        };
        let Some(wire) = connection.up.pop_front() else {
            return;
        };
        if let Wire::Heartbeat(heartbeat) = &wire
            && heartbeat.mode != Mode::Keep
        {
            connection.inboxes.insert(heartbeat.sid.clone());
        }
        if connection.cut && connection.up.is_empty() {
            self.connections.remove(&number);
        }
        self.server.wall = self.now.saturating_add_signed(self.wall_offset);
        let answer = match wire {
            Wire::Heartbeat(sent) => {
                let life = self.server.life;
                self.server
                    .heartbeat(&sent)
                    .map(|reply| Answer::Heartbeat(sent, reply, life))
            }
            Wire::Acquire(ask) => Some(Answer::Acquire(ask.number.1, self.server.acquire(&ask))),
            Wire::Release(name, fence) => Some(Answer::Release(
                fence,
                self.broken != Broken::Releases && self.server.release(&name, fence),
            )),
            Wire::Cancel(id, sid, name) => {
                if self.broken != Broken::Cancels {
                    self.server.cancel(&name, &(sid.to_string(), id));
                }
                Some(Answer::Cancel(id))
            }
            Wire::Extend {
                id,
                lock: (name, fence),
                timeout,
                session: (sid, gen_),
            } => Some(Answer::Extend(
                id,
                self.server.extend((&name, fence), timeout, (&sid, gen_)),
            )),
        };
        self.violations.append(&mut self.server.complaints);
        for push in std::mem::take(&mut self.server.pushes) {
            let inboxes: Vec<u64> = self
                .connections
                .iter()
                .filter(|(_, c)| c.inboxes.contains(push.sid()))
                .map(|(number, _)| *number)
                .collect();
            for inbox in inboxes {
                self.answer(inbox, Answer::Push(push.clone()));
            }
        }
        if let Some(answer) = answer {
            self.answer(number, answer);
        }
    }

    fn on_answer(&mut self, number: u64) {
        let Some(connection) = self.connections.get_mut(&number) else {
            return;
        };
        let i = connection.client;
        let Some(answer) = connection.down.pop_front() else {
            return;
        };
        let broken = self.broken;
        let process = &mut self.processes[i];
        let now = process.clock(self.now);
        let client = &mut process.client;
        match answer {
            Answer::Heartbeat(mut sent, reply, life) => {
                if broken == Broken::HeartbeatStamp {
                    sent.stamp = now;
                }
                client.on_heartbeat(now, &sent, reply);
                process.heard_of = process.heard_of.max(life);
            }
            Answer::Acquire(id, mut reply) => {
                if let AcquireReply::Granted { stamp, claimed, .. } = &mut reply {
                    if broken == Broken::GrantStamp {
                        *stamp = now;
                    }
                    *claimed |= broken == Broken::Claim;
                }
                client.on_acquire(now, id, reply);
            }
            Answer::Release(fence, held) => client.on_release(fence, held),
            Answer::Cancel(id) => client.on_cancel(id),
            Answer::Extend(id, stamp) => client.on_extend(id, stamp),
            Answer::Refused(command) => client.on_refused(&command, "busy"),
            Answer::Push(Push::Grant {
                sid,
                id,
                fence,
                stamp,
            }) => {
                let stamp = if broken == Broken::GrantStamp {
                    now
                } else {
                    stamp
                };
                if broken == Broken::Claim {
                    let reply = AcquireReply::Granted {
                        fence,
                        stamp,
                        claimed: true,
                    };
                    client.on_acquire(now, id, reply);
                } else {
                    client.on_grant(now, &sid, id, fence, stamp);
                }
            }
            Answer::Push(Push::Revoked { fence, reason, .. }) => client.on_revoked(fence, reason),
        }
        self.settle(i);
    }
}
