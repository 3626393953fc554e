//! What is said to the server: commands of the protocol as bytes, and what is expected for each.

use super::{Arg, Call, Expect, State};
use crate::scripts::{SCRIPTS, SUFFIXES, Script};
use crate::{clock, wire};
use dotmac_core::locks::{Command, Heartbeat, Mode};

impl State {
    pub(super) fn expect(&mut self, expect: Expect) {
        if self.expected.is_empty() {
            self.busy_since = clock::now();
        }
        self.expected.push_back(expect);
    }

    pub(super) fn write_script(&mut self, script: Script, keys: Option<&[&str]>, args: &[&[u8]]) {
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

    pub(super) fn send_call(&mut self, id: u64, call: &Call) {
        self.write_call(call);
        self.expect(Expect::Call(id));
    }

    pub(super) fn write_call(&mut self, call: &Call) {
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

    pub(super) fn write_heartbeat(&mut self, heartbeat: &Heartbeat, inbox: &[u8]) {
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
