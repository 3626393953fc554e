//! What the engine's thread does around the state of a process, and the checks of what the process then believes.

use super::broken::Broken;
use super::network::{Asked, Down, Happening, Up};
use super::process;
use super::redis::Bytes;
use super::world::{Belief, SECOND, World};
use crate::node::{Expect, State};
use crate::wire::Value;
use crate::{Outcome, clock, driver, frame};
use dotmac_core::lease::{Lease, Micros};
use dotmac_core::locks::{Command, Kind};
use std::sync::Arc;

impl World {
    pub(super) fn paused(&self, i: usize) -> bool {
        self.processes[i].paused_until > self.now
    }

    /// Does something with the state of a process, at its own time.
    pub(super) fn with<R>(&self, i: usize, act: impl FnOnce(&mut State) -> R) -> R {
        let process = &self.processes[i];
        clock::pretend(process.clock(self.now));
        act(&mut process.node.lock())
    }

    pub(super) fn connected(&mut self, i: usize, number: u64) {
        self.processes[i].connection = Some(number);
        self.processes[i].expected = 0;
        self.processes[i].named.clear();
        let hashes = self.server.load_scripts();
        let starts = self.server.starts;
        self.with(i, |state| process::connect(state, hashes, starts));
        self.turn(i);
    }

    pub(super) fn disconnected(&mut self, i: usize) {
        self.processes[i].connection = None;
        self.with(i, |state| state.disconnected("cut"));
        self.turn(i);
    }

    /// A message arrived.
    pub(super) fn arrived(&mut self, i: usize, message: Down) {
        let Down {
            mut bytes,
            life,
            names,
        } = message;
        let before: Vec<_> = self.processes[i]
            .leases
            .iter()
            .map(|lease| (lease.clone(), lease.valid_until()))
            .collect();
        let late_stamp = self.broken == Broken::HeartbeatStamp;
        let answers = bytes[0] != b'>';
        // An error, or an answer to an older connection, says nothing about the data.
        let heard = bytes.starts_with(b"*") && !bytes.starts_with(b"*1\r\n");
        let heartbeat = answers
            && self.with(i, |state| match state.expected.front_mut() {
                Some(Expect::Command(Command::Heartbeat(sent))) => {
                    if late_stamp {
                        sent.stamp = clock::now();
                    }
                    true
                }
                _ => false,
            });
        let process = &mut self.processes[i];
        process.expected -= usize::from(answers);
        clock::pretend(process.clock(self.now));
        let trouble = driver::digest(&process.node, &mut bytes).err();
        assert!(bytes.is_empty(), "half a message was sent");
        if heartbeat && heard {
            process.heard_of = process.heard_of.max(life);
        }
        self.life = life;
        self.turn(i);
        self.processes[i].named.extend(names);
        for (lease, until) in before {
            if lease.valid_until() > until {
                self.taken_back(&lease, life);
            }
            if lease.valid_until() > until && !self.processes[i].named.contains(&lease.fence) {
                self.violations.push(format!(
                    "{i}: an answer extended a lease that nothing on this connection had named: {lease:?}"
                ));
            }
        }
        if trouble.is_some() {
            self.give_up(i);
        }
    }

    /// A lease of an earlier life of the data is known to the server in this one: from here on it is of this life.
    fn taken_back(&mut self, lease: &Arc<Lease>, life: u64) {
        let leases = self.believed.get_mut(lease.name());
        let belief = leases.and_then(|all| all.iter_mut().find(|b| Arc::ptr_eq(&b.lease, lease)));
        if let Some(belief) = belief.filter(|belief| belief.life < life) {
            belief.life = life;
            self.counts.taken_back += 1;
        }
    }

    /// One turn of the engine's loop: what is due is done, commands go out, results come in.
    pub(super) fn turn(&mut self, i: usize) {
        let sent = self.processes[i].expected;
        let mut restless = None;
        let (bytes, new, next, trouble) = self.with(i, |state| {
            let now = clock::now();
            let mut trouble = None;
            if state.arm() <= now {
                trouble = state.tick().err();
                let next = state.arm();
                if trouble.is_none() && next <= now {
                    restless = Some(format!("{i} wants to be called again at {next} at {now}"));
                }
            }
            state.answer_echoes();
            state.settle();
            let new: Vec<Option<(Asked, bool)>> = state
                .expected
                .iter()
                .skip(sent)
                .map(|e| asks(state, e))
                .collect();
            for ring in state.take_wake() {
                ring.signal();
            }
            (state.take_out(), new, state.arm(), trouble)
        });
        self.violations.extend(restless);
        let process = &mut self.processes[i];
        process.expected += new.len();
        let connection = process.connection;
        let results = process.ring.drain();
        let mut new = new.into_iter();
        for args in commands(bytes) {
            let subscribes = args[0] == b"SUBSCRIBE";
            let asks = if subscribes {
                None
            } else {
                new.next().flatten()
            };
            if let Some(number) = connection {
                self.send(number, Up { args, asks });
            }
        }
        for (token, outcome) in results {
            self.on_outcome(i, token, outcome);
        }
        self.look(i);
        if trouble.is_some() {
            self.give_up(i);
        }
        let process = &mut self.processes[i];
        if next == Micros::MAX {
            process.tick_at = Micros::MAX;
            return;
        }
        let at = process.real(next).max(self.now + 1);
        if at != process.tick_at {
            process.tick_at = at;
            self.at(at, Happening::Tick(i));
        }
    }

    fn on_outcome(&mut self, i: usize, token: u64, outcome: Outcome) {
        match outcome {
            Outcome::Lost(lease) => {
                self.counts.lost += 1;
                self.processes[i].leases.retain(|held| held.id != lease.id);
                return;
            }
            Outcome::Granted(lease) => {
                self.counts.granted += 1;
                if lease.renewed() {
                    self.processes[i].named.insert(lease.fence);
                }
                self.check_order(i, &lease);
                let life = self.life;
                let last = self.last_fence.entry(lease.name().clone()).or_default();
                if lease.fence > last.0 {
                    // Those who hold it together may hear of it in any order.
                    if lease.ask.kind == Kind::Exclusive {
                        *last = (lease.fence, life);
                    }
                } else if life >= last.1 || self.processes[i].heard_of == self.server.life {
                    self.violations.push(format!(
                        "{}: fence {} believed after {}",
                        lease.name(),
                        lease.fence,
                        last.0
                    ));
                }
                self.believed
                    .entry(lease.name().clone())
                    .or_default()
                    .push(Belief {
                        process: i,
                        lease: lease.clone(),
                        life,
                    });
                self.processes[i].leases.push(lease);
            }
            Outcome::Deadlock(_) => self.counts.deadlocks += 1,
            Outcome::Extended(held) => self.counts.extended += u64::from(held),
            _ => {}
        }
        let process = &mut self.processes[i];
        process.busy.remove(&token);
        process.requests.retain(|(other, _)| *other != token);
        if self.open.remove(&token).is_none() {
            self.violations
                .push(format!("a second result for call {token}"));
        }
    }

    /// The server has answered a request. One that it answers a second time may have got a new place meanwhile.
    pub(super) fn order_of(&mut self, (asks, passes): (Asked, bool)) {
        self.serial += 1;
        let serial = (!passes).then_some(self.serial);
        self.asked
            .entry(asks)
            .and_modify(|order| *order = None)
            .or_insert(serial);
    }

    /// Who asked earlier for a lock gets it earlier.
    fn check_order(&mut self, i: usize, lease: &Lease) {
        let sid = self.with(i, |state| state.client.session.sid());
        let asks = (lease.name().clone(), sid.into(), lease.id);
        let Some(Some(order)) = self.asked.remove(&asks) else {
            return;
        };
        let granted = self.granted.entry(lease.name().clone()).or_default();
        let passed = granted.iter().find(|(other, fence, life)| {
            *life == self.life && (*other < order) != (*fence < lease.fence)
        });
        if let Some((_, fence, _)) = passed {
            self.violations.push(format!(
                "{}: the grants of fences {fence} and {} are not in the order of their requests",
                lease.name(),
                lease.fence
            ));
        }
        granted.push((order, lease.fence, self.life));
    }

    fn believes(&self, belief: &Belief) -> bool {
        let lease = &belief.lease;
        if self.broken == Broken::LocalDeadline {
            return !lease.released() && lease.loss().is_none();
        }
        lease.held_at(self.processes[belief.process].clock(self.now))
    }

    /// A belief begins or grows only when its process does something, so it is enough to look then.
    fn look(&mut self, i: usize) {
        let mut believed = std::mem::take(&mut self.believed);
        for (name, leases) in &mut believed {
            leases.retain(|b| !b.lease.released() && b.lease.loss().is_none());
            let newest = leases.iter().map(|b| b.life).max().unwrap_or(0);
            let now = leases.iter().filter(|b| self.believes(b));
            // Across a loss of data the older one may believe until its process hears of it, and that it can't be taken
            // back.
            let (unheard, now): (Vec<_>, Vec<_>) = now.partition(|b| {
                let process = &self.processes[b.process];
                b.life < newest
                    && (process.heard_of < self.server.life
                        || process.node.lock().client.is_asserting(b.lease.id))
            });
            for (k, a) in now.iter().enumerate() {
                let apart = |b: &&Belief| !together(a, b, now.len() + unheard.len());
                self.counts.overlaps_after_loss +=
                    unheard.iter().filter(|b| apart(b)).count() as u64;
                for b in &now[k + 1..] {
                    if !together(a, b, now.len()) {
                        self.violations.push(format!(
                            "{} s after an act of {i}, two believe in {name}: {a:?} {b:?}",
                            self.now / SECOND
                        ));
                    }
                }
            }
        }
        self.believed = believed;
    }
}

/// The request behind a command, if it asks for a lock.
fn asks(state: &State, expect: &Expect) -> Option<(Asked, bool)> {
    let Expect::Command(Command::Acquire(id)) = expect else {
        return None;
    };
    let request = state.client.request(*id)?;
    // With a priority, or the place of an earlier life of the data, it may be served before others.
    let passes = request.rank.is_some() || request.ask.priority != 0;
    let asked = (request.ask.name.clone(), request.sid.clone(), *id);
    Some((asked, passes))
}

/// Both may hold the lock, of so many who do.
fn together(a: &Belief, b: &Belief, holders: usize) -> bool {
    match (a.lease.ask.kind, b.lease.ask.kind) {
        (Kind::Shared, Kind::Shared) => true,
        (Kind::Semaphore(permits), Kind::Semaphore(_)) => holders <= permits as usize,
        _ => false,
    }
}

/// The commands in what a process has written.
pub(super) fn commands(mut bytes: bytes::BytesMut) -> Vec<Vec<Bytes>> {
    let mut commands = Vec::new();
    while let Ok(Some(frame)) = frame::next_frame(&mut bytes) {
        let args = frame.value.items().iter().map(|arg| match arg {
            Value::Bytes(bytes) => bytes.to_vec(),
            other => panic!("a command has the argument {other:?}"),
        });
        commands.push(args.collect());
    }
    assert!(bytes.is_empty(), "not whole commands: {bytes:?}");
    commands
}
