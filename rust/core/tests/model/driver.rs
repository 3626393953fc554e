//! What a driver does around a machine, and the checks of what its process then believes.

use super::network::{Answer, Happening, Wire};
use super::server::Acquire;
use super::world::{Broken, MS, SECOND, World};
use dotmac_core::lease::{Lease, Micros};
use dotmac_core::locks::{Command, Event};

impl World {
    pub(super) fn paused(&self, i: usize) -> bool {
        self.processes[i].paused_until > self.now
    }

    /// Sends what the machine wants sent, notes its events, looks whether what is believed is right.
    pub(super) fn settle(&mut self, i: usize) {
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

    pub(super) fn send(&mut self, i: usize, command: Command) {
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

    pub(super) fn on_event(&mut self, i: usize, event: Event) {
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

    pub(super) fn believes(&self, i: usize, lease: &Lease) -> bool {
        if self.broken == Broken::LocalDeadline {
            return !lease.released() && lease.loss().is_none();
        }
        lease.held_at(self.processes[i].clock(self.now))
    }

    /// A belief begins or grows only when its process does something, so it is enough to look then.
    pub(super) fn look(&mut self, i: usize) {
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
}
