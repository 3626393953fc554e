//! What the server says: answers in the order of the commands, pushes, errors; and what follows for the callers.

use super::{Expect, State};
use crate::ring::Sink;
use crate::scripts::{self, COUNT};
use crate::wire::{self, Value};
use crate::{Outcome, clock};
use dotmac_core::lease::Micros;
use dotmac_core::locks::{AcquireReply, Command, Event, Failure};

impl State {
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
        if ![&b"message"[..], b"smessage"].contains(&&kind[..]) {
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
            ["g", name, request, fence, stamp] => {
                if let Some((sid, id)) = request.rsplit_once(':')
                    && let (Ok(id), Ok(fence), Ok(stamp)) =
                        (id.parse(), fence.parse(), stamp.parse())
                {
                    self.client.on_grant(now, (name, sid), id, fence, stamp);
                }
            }
            ["w", _] => self.client.on_call(now),
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
            let text = scripts::explained(text, &self.hashes, self.sharded());
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
            Expect::Replicas => {
                self.on_replicas(&Outcome::Reply(value));
                Ok(())
            }
            Expect::Ignore => Ok(()),
        }
    }

    pub(super) fn on_command_reply(
        &mut self,
        now: Micros,
        command: Command,
        value: &Value,
    ) -> Result<(), String> {
        match command {
            Command::Acquire(id) => {
                let reply = wire::acquire_reply(value)?;
                if let (AcquireReply::Waiting { .. }, Some(waits)) = (&reply, &self.waits) {
                    waits.add(id);
                }
                self.client.on_acquire(now, id, reply);
            }
            Command::Release { fence, .. } | Command::Offer { fence, .. } => {
                self.client.on_release(now, fence, value.int() == Some(1));
            }
            Command::Assert(ids) => {
                let (held, said) = wire::assert_reply(value)?;
                if said {
                    self.client.on_assert(now, &ids, held.as_deref());
                }
            }
            Command::Mine(_) => {
                let (cursor, page) = wire::page_of_leases(value)?;
                self.client.on_mine(now, cursor, page);
            }
            Command::Cancel { request, .. } => self.client.on_cancel(request),
            Command::Extend(id) => {
                let items = value.items();
                let stamp = items.get(1).and_then(Value::int).map(i64::unsigned_abs);
                match items.first().and_then(Value::int) {
                    Some(-3) => {}
                    Some(-2) => self.client.on_extend_without_session(now),
                    said => self.client.on_extend(id, stamp.filter(|_| said == Some(1))),
                }
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

    pub(super) fn on_error(&mut self, expect: Expect, text: &str) -> Result<(), String> {
        if text.starts_with("NOSCRIPT") {
            self.loaded = [false; COUNT];
            match expect {
                // Asked under a session that has gone meanwhile: whatever opens the next one asks anew.
                Expect::Command(command)
                    if !self.open() && !matches!(command, Command::Heartbeat(_)) => {}
                Expect::Command(Command::Release { fence, .. } | Command::Offer { fence, .. }) => {
                    self.client.on_release_unknown(fence);
                    self.settle();
                }
                Expect::Command(command) => self.write_command(command),
                Expect::Call(id) => {
                    if let Some(call) = self.calls.get(&id).map(|p| p.call.clone()) {
                        self.send_call(id, &call);
                    }
                }
                Expect::Replicas | Expect::Ignore => {}
            }
            return Ok(());
        }
        // The server is there but can't serve: a replica after a failover, data still being loaded, or a slot that
        // is on its way to another server or has arrived there.
        if ["LOADING", "READONLY", "MASTERDOWN", "NOAUTH"]
            .iter()
            .chain(&["MOVED ", "ASK ", "TRYAGAIN", "CLUSTERDOWN"])
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
            Expect::Replicas => {
                self.on_replicas(&Outcome::Failed(Failure::Refused(text.to_owned())));
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

    pub(super) fn on_event(&mut self, event: Event) {
        match event {
            Event::Granted(token, lease) => self.finish(token, Outcome::Granted(lease)),
            Event::NotFree(token, left) => self.finish(token, Outcome::NotFree(left)),
            Event::Deadlock(token, cycle) => self.finish(token, Outcome::Deadlock(cycle)),
            Event::Mismatch(token, kind) => self.finish(token, Outcome::Mismatch(kind)),
            Event::NotOffered(token) => self.finish(token, Outcome::NotOffered),
            Event::TimedOut(token) => self.finish(token, Outcome::TimedOut),
            Event::Cancelled(token) => self.finish(token, Outcome::Cancelled),
            Event::Released(token, held) => self.finish(token, Outcome::Released(held)),
            Event::Extended(token, held) => self.finish(token, Outcome::Extended(held)),
            Event::Failed(token, failure) => self.finish(token, self.failed(failure)),
            Event::Lost(lease) => {
                self.counts.losses += 1;
                for ring in self.rings.iter().filter_map(std::sync::Weak::upgrade) {
                    Sink::Ring(ring, lease.id).put(Outcome::Lost(lease.clone()), &mut self.wake);
                }
            }
            Event::Opened(fresh) => self.on_opened(fresh),
        }
    }

    pub(super) fn on_opened(&mut self, fresh: bool) {
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

    pub(super) fn finish(&mut self, token: u64, outcome: Outcome) {
        let sink = self.sinks.remove(&token);
        debug_assert!(sink.is_some(), "call {token} has had its result");
        if let Some(sink) = sink {
            sink.put(outcome, &mut self.wake);
        }
    }

    pub(super) fn next_call_timeout(&self) -> Micros {
        self.calls
            .values()
            .next()
            .map_or(Micros::MAX, |p| p.since + self.request_timeout)
    }
}
