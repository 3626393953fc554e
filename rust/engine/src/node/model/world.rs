//! Processes, connections and a server in simulated time, with everything that can go wrong between them.
//!
//! Each connection is first in, first out in both directions; every message has its own delay. Time is real time in
//! microseconds: every client sees it through a clock of its own with another start and up to 0.4 % off.

use super::broken::Broken;
use super::network::{Asked, Connection, Happening};
use super::process::{Process, Wish};
use super::server::Server;
use super::steps::Step;
use dotmac_core::lease::{Lease, Micros};
use std::collections::BTreeMap;
use std::sync::Arc;

pub(super) const MS: Micros = 1_000;
pub(super) const SECOND: Micros = 1_000_000;
/// Well above the gap rule, also for two steps at once.
const CLOCK_STEP: i64 = 10 * SECOND.cast_signed();
/// After which everything must have come to rest.
const REST: Micros = 90 * SECOND;

/// What happened, for tests that look at more than the violations.
#[derive(Debug, Default, Clone, Copy)]
pub struct Counts {
    pub granted: u64,
    pub lost: u64,
    pub deadlocks: u64,
    pub extended: u64,
    pub overlaps_after_loss: u64,
    pub taken_back: u64,
}

/// A lease as its holder has it.
#[derive(Debug)]
pub struct Belief {
    pub process: usize,
    pub lease: Arc<Lease>,
    /// The life of the data in which it was granted.
    pub life: u64,
}

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
    /// Calls that have no result yet, and whose they are.
    pub(super) open: BTreeMap<u64, usize>,
    /// The life of the data from which the message comes that is being read.
    pub(super) life: u64,
    /// The highest fence of an exclusive holder, by lock, with its life.
    pub(super) last_fence: BTreeMap<Arc<str>, (u64, u64)>,
    /// When the server first answered each request, unless it has answered it twice; and what became of them, by lock:
    /// that time, fence, life.
    pub(super) asked: BTreeMap<Asked, Option<u64>>,
    pub(super) granted: BTreeMap<Arc<str>, Vec<(u64, u64, u64)>>,
    /// Every lease that was granted and has not ended.
    pub(super) believed: BTreeMap<Arc<str>, Vec<Belief>>,
}

impl World {
    pub fn new(processes: usize, seed: u64, broken: Broken) -> Self {
        let mut chance = fastrand::Rng::with_seed(seed);
        let server = match Server::new(broken.mutations()) {
            Ok(server) => server,
            Err(error) => panic!("Lua: {error}"),
        };
        let mut world = Self {
            now: 0,
            server,
            processes: (0..processes)
                .map(|i| Process::new((i, 0), &mut chance))
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
            open: BTreeMap::new(),
            life: 0,
            last_fence: BTreeMap::new(),
            asked: BTreeMap::new(),
            granted: BTreeMap::new(),
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
            Step::Acquire(i, wish) => self.acquire(i % n, wish),
            Step::Release(i, which) => self.release(i % n, which),
            Step::Cancel(i, which) => self.cancel(i % n, which),
            Step::Extend(i, which, timeout) => self.extend(i % n, which, timeout * MS),
            Step::Pause(i, ms) => self.processes[i % n].paused_until = self.now + ms * MS,
            Step::PauseServer(ms) => self.server_paused_until = self.now + ms * MS,
            Step::MoveClock(tens) => self.wall_offset += i64::from(tens) * CLOCK_STEP,
            Step::Cut(i) => self.cut(i % n),
            Step::Kill(i) => self.kill(i % n),
            Step::Restart => {
                self.server.restart();
                self.cut_all();
            }
            Step::Flush => self.server.lose_data(),
            Step::Refuse(i, commands) => self.processes[i % n].refuse = commands,
            Step::ForgetScripts => self.server.forget_scripts(),
        }
    }

    /// All connections are lost, and what was on its way with them.
    fn cut_all(&mut self) {
        for i in 0..self.processes.len() {
            self.cut(i);
        }
        for connection in self.connections.values_mut() {
            connection.up.clear();
        }
    }

    /// The process ends without a word, and another one starts in its place.
    fn kill(&mut self, i: usize) {
        self.cut(i);
        if let Some(number) = self.processes[i].connection {
            self.connections.remove(&number);
        }
        self.serial += 1;
        self.processes[i] = Process::new((i, self.serial), &mut self.chance);
        self.open.retain(|_, process| *process != i);
        for leases in self.believed.values_mut() {
            leases.retain(|belief| belief.process != i);
        }
        let start = self.chance.u64(..SECOND);
        self.at(self.now + start, Happening::Connect(i));
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
                    let state = p.node.lock();
                    let session = &state.client.session;
                    let (held, unanswered) = (state.client.held(), state.client.unanswered());
                    (
                        held,
                        unanswered,
                        session.open,
                        session.interval(),
                        session.longest(),
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
                let client = &p.node.lock().client;
                client.held() == 0
                    && client.unanswered() == 0
                    && client.session.open
                    // No length of a lease or a request is counted any more.
                    && (client.session.interval(), client.session.longest())
                        == (SECOND, 10 * SECOND)
            })
    }

    // ---- calls

    pub fn acquire(&mut self, i: usize, wish: Wish) {
        if self.paused(i) {
            return;
        }
        let token = self.token(i);
        let process = &mut self.processes[i];
        // An owner waits for one lock at a time.
        let ask = if process.busy.values().any(|busy| *busy == wish.owner) {
            wish.ask(&format!("token{token}"))
        } else {
            process.busy.insert(token, wish.owner);
            wish.ask(&format!("o{}", wish.owner))
        };
        let sink = process.sink(token);
        let id = self.with(i, |state| state.acquire(ask, sink));
        self.processes[i].requests.push((token, id));
        self.turn(i);
    }

    fn release(&mut self, i: usize, which: usize) {
        if self.paused(i) || self.processes[i].leases.is_empty() {
            return;
        }
        let token = self.token(i);
        let process = &mut self.processes[i];
        let lease = process.leases.swap_remove(which % process.leases.len());
        let sink = process.sink(token);
        self.with(i, |state| state.release(&lease, sink));
        self.turn(i);
    }

    fn cancel(&mut self, i: usize, which: usize) {
        if self.paused(i) || self.processes[i].requests.is_empty() {
            return;
        }
        let process = &mut self.processes[i];
        let (_, id) = process.requests.swap_remove(which % process.requests.len());
        self.with(i, |state| state.cancel(id));
        self.turn(i);
    }

    fn extend(&mut self, i: usize, which: usize, timeout: Micros) {
        if self.paused(i) || self.processes[i].leases.is_empty() {
            return;
        }
        let token = self.token(i);
        let process = &self.processes[i];
        let lease = process.leases[which % process.leases.len()].clone();
        let sink = process.sink(token);
        self.with(i, |state| state.extend(&lease, timeout, sink));
        self.turn(i);
    }

    fn token(&mut self, i: usize) -> u64 {
        self.serial += 1;
        self.open.insert(self.serial, i);
        self.serial
    }
}
