//! What is on the way, when it arrives, and what gets lost.

use super::server::{Acquire, Push};
use super::world::{Broken, MS, SECOND, World};
use dotmac_core::lease::Micros;
use dotmac_core::locks::{AcquireReply, Command, Heartbeat, HeartbeatReply, Mode};
use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

#[derive(Debug)]
pub enum Wire {
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
pub enum Answer {
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
pub enum Happening {
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
pub struct Connection {
    pub(super) client: usize,
    pub(super) cut: bool,
    pub(super) up: VecDeque<Wire>,
    pub(super) down: VecDeque<Answer>,
    pub(super) last_up: Micros,
    pub(super) last_down: Micros,
    pub(super) inboxes: BTreeSet<String>,
    /// Where pushes go, if they have a connection of their own: they overtake answers, and the other way round.
    pub(super) pushes: Option<u64>,
}

impl Connection {
    fn of(client: usize) -> Self {
        Self {
            client,
            ..Self::default()
        }
    }
}

impl World {
    pub(super) fn at(&mut self, time: Micros, happening: Happening) {
        self.serial += 1;
        self.agenda.insert((time, self.serial), happening);
    }

    pub(super) fn delay(&mut self) -> Micros {
        if !self.faults {
            return self.chance.u64(50..2 * MS);
        }
        match self.chance.u8(..) {
            0..=2 => self.chance.u64(..4 * SECOND),
            3..=15 => self.chance.u64(..400 * MS),
            _ => self.chance.u64(50..5 * MS),
        }
    }

    pub(super) fn answer(&mut self, number: u64, answer: Answer) {
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
    pub(super) fn cut(&mut self, i: usize) {
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
        let pushes = connection.pushes;
        let arrive = self.chance.usize(..=connection.up.len());
        let ghost = Connection {
            client: i,
            cut: true,
            up: connection.up.drain(..arrive).collect(),
            ..Connection::default()
        };
        connection.up.clear();
        let last = connection.last_up;
        if let Some(pushes) = pushes {
            self.connections.remove(&pushes);
        }
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

    pub(super) fn happen(&mut self, happening: Happening) {
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
                let mut connection = Connection::of(i);
                if self.two_connections {
                    self.serial += 1;
                    connection.pushes = Some(self.serial);
                    self.connections.insert(self.serial, Connection::of(i));
                }
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

    pub(super) fn on_command(&mut self, number: u64) {
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
                .map(|(number, c)| c.pushes.unwrap_or(*number))
                .collect();
            for inbox in inboxes {
                self.answer(inbox, Answer::Push(push.clone()));
            }
        }
        if let Some(answer) = answer {
            self.answer(number, answer);
        }
    }

    pub(super) fn on_answer(&mut self, number: u64) {
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
