//! What is on the way, when it arrives, and what gets lost.

use super::broken::Broken;
use super::redis::{Bytes, Reply};
use super::world::{MS, SECOND, World};
use crate::wire;
use bytes::{BufMut, BytesMut};
use dotmac_core::lease::Micros;
use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

/// A request as the fairness check sees it: lock, session, number.
pub type Asked = (Arc<str>, Arc<str>, u64);

/// A command on its way to the server.
#[derive(Debug)]
pub struct Up {
    pub args: Vec<Bytes>,
    /// Where it asks for a lock, and whether it may pass over others.
    pub asks: Option<(Asked, bool)>,
}

/// An answer or a push on its way to the client, with the life of the data from which it comes.
#[derive(Debug)]
pub struct Down {
    pub bytes: BytesMut,
    pub life: u64,
    /// The numbers in the command that it answers, fences among them.
    pub names: Vec<u64>,
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
    pub(super) up: VecDeque<Up>,
    pub(super) down: VecDeque<Down>,
    pub(super) last_up: Micros,
    pub(super) last_down: Micros,
    pub(super) channels: BTreeSet<Bytes>,
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

    pub(super) fn send(&mut self, number: u64, message: Up) {
        let delay = self.delay();
        let Some(connection) = self.connections.get_mut(&number) else {
            return;
        };
        if connection.cut {
            return;
        }
        connection.up.push_back(message);
        connection.last_up = connection.last_up.max(self.now + delay);
        let at = connection.last_up;
        self.at(at, Happening::Up(number));
    }

    fn answer(&mut self, number: u64, bytes: BytesMut, names: Vec<u64>) {
        let delay = self.delay();
        let life = self.server.life;
        let Some(connection) = self.connections.get_mut(&number) else {
            return;
        };
        if connection.cut {
            return;
        }
        connection.down.push_back(Down { bytes, life, names });
        connection.last_down = connection.last_down.max(self.now + delay);
        let at = connection.last_down;
        self.at(at, Happening::Down(number));
    }

    /// The client wants no more of its connection.
    pub(super) fn give_up(&mut self, i: usize) {
        self.cut(i);
        if let Some(number) = self.processes[i].connection {
            self.at(self.now, Happening::Noticed(number));
        }
    }

    /// The connection is lost: some of the commands on the way still run, perhaps late; no answer arrives.
    pub(super) fn cut(&mut self, i: usize) {
        if self.broken == Broken::Unnoticed {
            self.processes[i].named.clear();
            return;
        }
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
            Happening::Down(number) => self.on_down(number),
            Happening::Noticed(number) => {
                let Some(connection) = self.connections.remove(&number) else {
                    return;
                };
                let i = connection.client;
                self.disconnected(i);
                let backoff = self
                    .chance
                    .u64(..if self.faults { 3 * SECOND } else { 100 * MS });
                self.at(self.now + backoff, Happening::Connect(i));
            }
            // A process that was killed may have left one more attempt behind.
            Happening::Connect(i) if self.processes[i].connection.is_some() => {}
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
                self.connected(i, number);
            }
            Happening::Tick(i) => {
                if self.processes[i].tick_at == self.now {
                    self.processes[i].tick_at = 0;
                    self.turn(i);
                }
            }
        }
    }

    fn on_command(&mut self, number: u64) {
        let Some(connection) = self.connections.get_mut(&number) else {
            return;
        };
        let Some(Up { args, asks }) = connection.up.pop_front() else {
            return;
        };
        let i = connection.client;
        let subscribes = args[0] == b"SUBSCRIBE";
        if subscribes {
            connection.channels.insert(args[1].clone());
        }
        if connection.cut && connection.up.is_empty() {
            self.connections.remove(&number);
        }
        if subscribes {
            let inbox = self.inbox(number);
            self.answer(inbox, pushed(b"subscribe", &args[1], None), Vec::new());
            return;
        }
        let reply = if self.processes[i].refuse > 0 {
            self.processes[i].refuse -= 1;
            Reply::Error(String::from("BUSY the schedule says so"))
        } else {
            let wall = self.now.saturating_add_signed(self.wall_offset);
            self.server.set_time(wall);
            let reply = self.server.command(&args);
            // Three: nothing is granted yet, and it is asked again later.
            if let (Some(asks), Reply::Array(items)) = (asks, &reply)
                && items.first() != Some(&Reply::Int(3))
            {
                self.order_of(asks);
            }
            reply
        };
        self.violations.append(&mut self.server.complaints);
        for (channel, message) in self.server.take_published() {
            let inboxes: Vec<u64> = self
                .connections
                .iter()
                .filter(|(_, c)| c.channels.contains(&channel))
                .map(|(number, _)| self.inbox(*number))
                .collect();
            for inbox in inboxes {
                let twice = self.faults && self.chance.u8(..) < 16;
                for _ in 0..=u8::from(twice) {
                    self.answer(
                        inbox,
                        pushed(b"message", &channel, Some(&message)),
                        Vec::new(),
                    );
                }
            }
        }
        let mut bytes = BytesMut::new();
        write(&mut bytes, &reply);
        let names = args
            .iter()
            .filter_map(|arg| std::str::from_utf8(arg).ok()?.parse().ok());
        self.answer(number, bytes, names.collect());
    }

    /// The connection on which the pushes of a connection go.
    fn inbox(&self, number: u64) -> u64 {
        self.connections
            .get(&number)
            .and_then(|connection| connection.pushes)
            .unwrap_or(number)
    }

    fn on_down(&mut self, number: u64) {
        if let Some(connection) = self.connections.get_mut(&number)
            && let Some(message) = connection.down.pop_front()
        {
            let i = connection.client;
            self.arrived(i, message);
        }
    }
}

pub fn pushed(kind: &[u8], channel: &[u8], message: Option<&[u8]>) -> BytesMut {
    let mut out = BytesMut::from(&b">3\r\n"[..]);
    wire::bulk(&mut out, kind);
    wire::bulk(&mut out, channel);
    match message {
        Some(message) => wire::bulk(&mut out, message),
        None => out.put_slice(b":1\r\n"),
    }
    out
}

pub(super) fn write(out: &mut BytesMut, reply: &Reply) {
    match reply {
        Reply::Nil => out.put_slice(b"_\r\n"),
        Reply::Int(number) => out.put_slice(format!(":{number}\r\n").as_bytes()),
        Reply::Bulk(text) => wire::bulk(out, text),
        Reply::Array(items) => {
            wire::head(out, items.len());
            for item in items {
                write(out, item);
            }
        }
        Reply::Error(text) => {
            out.put_slice(format!("-{}\r\n", text.replace(['\r', '\n'], " ")).as_bytes());
        }
    }
}
