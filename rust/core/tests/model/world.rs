//! Clients, connections and a server in simulated time, with everything that can go wrong between them.
//!
//! Each connection is first in, first out in both directions; every message has its own delay. Time is real time in
//! microseconds: every client sees it through a clock of its own with another start and up to 0.4 % off.

use super::network::{Connection, Happening};
use super::server::{Clock, Server};
use dotmac_core::lease::{Lease, Micros};
use dotmac_core::locks::{Ask, Client};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

pub(super) const MS: Micros = 1_000;
pub(super) const SECOND: Micros = 1_000_000;
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

/// A process with its machine.
#[derive(Debug)]
pub struct Process {
    pub client: Client,
    pub(super) start: Micros,
    /// Microseconds of its clock per second.
    pub(super) rate: Micros,
    pub(super) paused_until: Micros,
    pub(super) connection: Option<u64>,
    pub(super) tick_at: Micros,
    pub(super) requests: Vec<(u64, u64)>,
    pub(super) leases: Vec<Arc<Lease>>,
    /// Owners that wait in a queue, by token: each waits for one at a time.
    pub(super) busy: BTreeMap<u64, usize>,
    pub(super) refuse: u8,
    /// The life of the server's data that it has last heard of.
    pub(super) heard_of: u64,
    pub heartbeats: u64,
}

impl Process {
    pub(super) fn clock(&self, real: Micros) -> Micros {
        self.start + real * self.rate / SECOND
    }

    pub(super) fn real(&self, clock: Micros) -> Micros {
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
    pub(super) broken: Broken,
    pub(super) chance: fastrand::Rng,
    pub(super) server_paused_until: Micros,
    pub(super) wall_offset: i64,
    pub(super) connections: BTreeMap<u64, Connection>,
    pub(super) agenda: BTreeMap<(Micros, u64), Happening>,
    pub(super) serial: u64,
    pub(super) faults: bool,
    /// Pushes have connections of their own.
    pub(super) two_connections: bool,
    /// Calls that have no final event yet.
    pub(super) open: BTreeSet<u64>,
    pub(super) last_fence: BTreeMap<Arc<str>, u64>,
    /// Every lease that was granted and has not ended, with its process.
    pub(super) believed: BTreeMap<Arc<str>, Vec<(usize, Arc<Lease>)>>,
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
            two_connections: seed % 2 == 1,
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

    pub(super) fn token(&mut self) -> u64 {
        self.serial += 1;
        self.open.insert(self.serial);
        self.serial
    }
}
