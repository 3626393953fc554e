//! What is said to the server: commands of the protocol as bytes, and what is expected for each.

use super::{Arg, Call, Expect, State};
use crate::scripts::{self, SUFFIXES, Script};
use crate::{clock, wire};
use bytes::Bytes;
use dotmac_core::locks::{Ask, Command, Heartbeat, Kind, Mode, Victim};

/// The number of a request, unique on the server.
fn numbered(sid: &str, id: u64) -> String {
    [sid, ":", itoa::Buffer::new().format(id)].concat()
}

/// Locks that one script looks at when a session asks what is its own.
const MINE_PAGE: &[u8] = b"500";

impl State {
    pub(super) fn expect(&mut self, expect: Expect) {
        if self.expected.is_empty() {
            self.busy_since = clock::now();
        }
        self.expected.push_back(expect);
    }

    pub(super) fn write_script(&mut self, script: Script, keys: Option<&[&str]>, args: &[&[u8]]) {
        let index = script as usize;
        if let Some((length, start)) = &self.starts[index]
            && keys.is_none()
            && *length == args.len()
            && self.loaded[index]
        {
            self.out.extend_from_slice(start);
            for arg in args {
                wire::bulk(&mut self.out, arg);
            }
            return;
        }
        let count = keys.map_or(SUFFIXES.len(), <[_]>::len);
        let from = self.out.len();
        let by_hash = self.loaded[index] && index < self.hashes.len();
        wire::head(&mut self.out, 3 + count + args.len());
        match self.hashes.get(index) {
            Some(hash) if self.loaded[index] => {
                self.out.extend_from_slice(b"$7\r\nEVALSHA\r\n");
                wire::bulk(&mut self.out, hash);
            }
            _ => {
                self.out.extend_from_slice(b"$4\r\nEVAL\r\n");
                let text = scripts::text(index, self.sharded());
                wire::bulk(&mut self.out, text.as_bytes());
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
        if by_hash && keys.is_none() {
            // All commands of one script and as many arguments begin alike, up to the keys.
            self.starts[index] = Some((args.len(), Bytes::copy_from_slice(&self.out[from..])));
        }
        for arg in args {
            wire::bulk(&mut self.out, arg);
        }
    }

    pub(super) fn send_call(&mut self, id: u64, call: &Call) {
        self.write_call(call);
        self.expect(Expect::Call(id));
    }

    pub(super) fn write_call(&mut self, call: &Call) {
        let sid = self.client.session.sid();
        let gen_ = self.client.session.gen_.to_string();
        let channel = self.registry_channel();
        let inbox = self.inbox.clone();
        let args: Vec<&[u8]> = call
            .args
            .iter()
            .map(|arg| match arg {
                Arg::Bytes(bytes) => &bytes[..],
                Arg::Sid => sid.as_bytes(),
                Arg::Gen => gen_.as_bytes(),
                Arg::Channel => channel.as_bytes(),
                Arg::Inbox => inbox.as_bytes(),
            })
            .collect();
        self.write_script(call.script, Some(call.keys), &args);
    }

    pub(super) fn write_command(&mut self, command: Command) {
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
    pub(super) fn write_lock_command(&mut self, command: &Command, inbox: &[u8]) -> bool {
        let mut a = itoa::Buffer::new();
        let mut b = itoa::Buffer::new();
        let mut c = itoa::Buffer::new();
        match command {
            Command::Acquire(id) => return self.write_acquire(*id, inbox),
            Command::Assert(ids) => return self.write_assert(ids, inbox),
            Command::Mine(cursor) => {
                let sid = self.client.session.sid();
                self.write_script(
                    Script::Mine,
                    None,
                    &[a.format(*cursor).as_bytes(), MINE_PAGE, sid.as_bytes()],
                );
            }
            Command::Offer {
                name,
                fence,
                within,
            } => {
                let sid = self.client.session.sid();
                self.write_script(
                    Script::Offer,
                    None,
                    &[
                        name.as_bytes(),
                        a.format(*fence).as_bytes(),
                        b.format(within / 1000).as_bytes(),
                        sid.as_bytes(),
                        c.format(self.client.session.gen_).as_bytes(),
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
                let number = numbered(sid, *request);
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
                        lease.name().as_bytes(),
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

    fn write_acquire(&mut self, id: u64, inbox: &[u8]) -> bool {
        let mut a = itoa::Buffer::new();
        let mut b = itoa::Buffer::new();
        let mut c = itoa::Buffer::new();
        let Some(request) = self.client.request(id) else {
            return false;
        };
        let (ask, sid, rank) = (
            request.ask.clone(),
            request.sid.clone(),
            request.rank.clone(),
        );
        let number = numbered(&sid, id);
        let owners = self.owners(&ask);
        let unusual = self.unusual(id, &ask);
        let waiting = self.waiting(&ask, rank.as_deref());
        self.write_script(
            Script::Acquire,
            None,
            &[
                ask.name.as_bytes(),
                sid.as_bytes(),
                a.format(self.client.session.gen_).as_bytes(),
                owners.as_bytes(),
                b.format(ask.timeout / 1000).as_bytes(),
                number.as_bytes(),
                c.format(ask.since).as_bytes(),
                unusual.as_bytes(),
                if ask.wait { b"w" } else { b"t" },
                waiting.as_bytes(),
                ask.place.as_bytes(),
                inbox,
            ],
        );
        true
    }

    /// Whose a lock is, on the server: the same scope has the same name in every session of this process.
    fn owner(&self, scope: &str) -> String {
        if scope.starts_with('=') {
            scope.to_owned()
        } else {
            [self.client.session.seed(), "/", scope].concat()
        }
    }

    pub(super) fn owners(&self, ask: &Ask) -> String {
        let mut owners = self.owner(&ask.owner);
        for scope in &ask.awaited_by {
            owners.push('\u{1}');
            owners.push_str(&self.owner(scope));
        }
        owners
    }

    /// What keeps a request off the script's fast path; mostly nothing.
    fn unusual(&self, id: u64, ask: &Ask) -> String {
        let mut said = String::new();
        if self.client.is_resent(id) {
            said.push('!');
        }
        if ask.fixed {
            said.push('@');
        }
        if !ask.awaited_by.is_empty() {
            said.push('p');
        }
        if ask.numbered {
            said.push('n');
        }
        if ask.kind != Kind::Exclusive {
            said.push_str(&ask.kind.to_string());
        }
        if let Some(fence) = ask.offered {
            said.push('a');
            said.push_str(&fence.to_string());
        }
        said
    }

    /// What matters only to those who wait, where it is not the usual.
    fn waiting(&self, ask: &Ask, rank: Option<&str>) -> String {
        let held = self.client.held_by(&ask.owner);
        if ask.priority == 0 && ask.victim == Victim::Youngest && held == 0 && rank.is_none() {
            return String::new();
        }
        let policy = match ask.victim {
            Victim::Youngest => 'y',
            Victim::LowestPriority => 'p',
            Victim::FewestLocks => 'l',
            Victim::Closer => 's',
        };
        // Four digits each, the lowest for the highest priority.
        let order = 5_000 - i32::from(ask.priority);
        let rank = rank.unwrap_or_default();
        format!("{order:04} {policy} {held} {rank}")
    }

    /// False if nothing of it is held any more.
    fn write_assert(&mut self, ids: &[u64], inbox: &[u8]) -> bool {
        let (sid, now) = (self.client.session.sid(), clock::now());
        let mut cells = vec![sid.clone(), self.client.session.gen_.to_string()];
        for lease in ids.iter().filter_map(|id| self.client.lease(*id)) {
            let ask = &lease.ask;
            let left = lease.valid_until().saturating_sub(now).div_ceil(1000);
            cells.extend([
                ask.name.to_string(),
                lease.fence.to_string(),
                self.owner(&ask.owner),
                (lease.timeout() / 1000).to_string(),
                if ask.fixed {
                    left.to_string()
                } else {
                    String::new()
                },
                format!("{sid}:{}", lease.id),
                ask.since.to_string(),
                ask.kind.to_string(),
                ask.place.to_string(),
            ]);
        }
        if cells.len() == 2 {
            return false;
        }
        let mut args: Vec<&[u8]> = cells.iter().map(String::as_bytes).collect();
        args.push(inbox);
        self.write_script(Script::Assert, None, &args);
        true
    }

    pub(super) fn write_heartbeat(&mut self, heartbeat: &Heartbeat, inbox: &[u8]) {
        let opening = heartbeat.mode != Mode::Keep;
        if opening {
            // Its confirmation comes as a push, so nothing is expected for it.
            let channel = [inbox, heartbeat.sid.as_bytes()].concat();
            let subscribe = self.subscribe();
            wire::command(&mut self.out, &[subscribe, &channel]);
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
        let mode = match (heartbeat.mode, &heartbeat.knew) {
            (Mode::Open, None) => String::from("n"),
            (Mode::Open, Some((epoch, last_number))) => format!("k{epoch} {last_number}"),
            (Mode::Resume, None) => String::from("r"),
            (Mode::Resume, Some((epoch, last_number))) => format!("r{epoch} {last_number}"),
            (Mode::Keep, _) => String::from("h"),
        };
        let server = if opening {
            self.server_id.clone()
        } else {
            String::new()
        };
        let mut args: Vec<&[u8]> = vec![
            heartbeat.sid.as_bytes(),
            gen_.as_bytes(),
            stamp.as_bytes(),
            longest.as_bytes(),
            mode.as_bytes(),
            who.as_bytes(),
            heartbeat.acknowledge.as_bytes(),
            server.as_bytes(),
        ];
        for ((name, _), fence) in heartbeat.claims.iter().zip(&fences) {
            args.push(name.as_bytes());
            args.push(fence.as_bytes());
        }
        args.push(inbox);
        self.write_script(Script::Heartbeat, None, &args);
    }
}
