//! Answers of the server, handed in by the driver.

use super::{
    AcquireReply, CLAIMS, Client, Command, Event, Failure, Giveback, Heartbeat, HeartbeatReply,
    Mode, REMEMBERED, Request,
};
use crate::lease::{LossReason, Micros};
use std::collections::BTreeSet;
use std::sync::Arc;

/// What is due sooner than the heartbeats that go out anyway is worth one of its own.
const NEAR: Micros = 1_000_000;
/// For the difference between two clocks that count in milliseconds.
const MOMENT: Micros = 2_000;

/// A text in which `%` and two hexadecimal digits stand for a byte.
fn unescaped(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((byte, after)) = rest.split_first() {
        rest = after;
        let code = (*byte == b'%').then(|| after.get(..2)).flatten();
        let code =
            code.and_then(|code| u8::from_str_radix(std::str::from_utf8(code).ok()?, 16).ok());
        bytes.push(code.unwrap_or(*byte));
        if code.is_some() {
            rest = &after[2..];
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

impl Client {
    /// Answer to an acquire.
    pub fn on_acquire(&mut self, now: Micros, id: u64, reply: AcquireReply) {
        if let Some(answers) = self.resent.get_mut(&id) {
            *answers -= 1;
            if *answers == 0 {
                self.resent.remove(&id);
            }
        }
        match reply {
            AcquireReply::Granted {
                fence,
                stamp,
                claimed,
            } => self.grant(now, id, fence, stamp, claimed),
            AcquireReply::Waiting { rest, rank, place } => {
                if let Some(request) = self.requests.get_mut(&id) {
                    if !request.waiting {
                        request.place = place;
                    }
                    request.waiting = true;
                    request.rank = Some(rank);
                    if let Some(rest) = rest {
                        self.look_at(now, rest);
                    }
                }
            }
            AcquireReply::Grace(left) => {
                if self.requests.contains_key(&id) {
                    self.later.retain(|(_, other)| *other != id);
                    self.later.insert((now + left.max(MOMENT), id));
                }
            }
            AcquireReply::Mismatch(kind) => {
                if let Some(request) = self.refused(id) {
                    self.events.push(Event::Mismatch(request.token, kind));
                }
            }
            AcquireReply::NotOffered => {
                if let Some(request) = self.refused(id) {
                    self.events.push(Event::NotOffered(request.token));
                }
            }
            // What is in its way is a release of ours that was sent before it and has to be sent again: so has this.
            AcquireReply::NotFree(_) | AcquireReply::Deadlock(_) if self.has_overtaken(id) => {
                self.commands.push(Command::Acquire(id));
            }
            AcquireReply::NotFree(left) => {
                if let Some(request) = self.refused(id) {
                    self.events.push(Event::NotFree(request.token, left));
                }
            }
            AcquireReply::Deadlock(cycle) => {
                if let Some(request) = self.refused(id) {
                    self.events.push(Event::Deadlock(request.token, cycle));
                }
            }
            // Only the first of a pipeline: the others were asked under the session that is gone, too.
            AcquireReply::NoSession => {
                if self.session.open {
                    self.session_gone(now);
                }
            }
            AcquireReply::Superseded => {}
        }
    }

    fn has_overtaken(&self, id: u64) -> bool {
        let Some(request) = self.requests.get(&id) else {
            return false;
        };
        let mut late = self.releases.values().filter(|g| g.overtaken);
        late.any(|giveback| giveback.name == request.ask.name)
    }

    /// The server did not know the script of a release or an offer: it goes out again, behind what came after it.
    pub fn on_release_unknown(&mut self, fence: u64) {
        if let Some(giveback) = self.releases.get_mut(&fence) {
            giveback.overtaken = true;
            self.commands.push(giveback.command(fence));
        }
    }

    /// The server has ended a request. Where it is on its way a second time, what that one gets is given back.
    fn refused(&mut self, id: u64) -> Option<Request> {
        let request = self.drop_request(id)?;
        if self.resent.contains_key(&id) {
            self.cancel_on_server(id, request.sid.clone(), request.ask.name.clone());
        }
        Some(request)
    }

    /// A lock came out of the queue.
    pub fn on_grant(
        &mut self,
        now: Micros,
        (name, sid): (&str, &str),
        id: u64,
        fence: u64,
        stamp: Micros,
    ) {
        if *sid != *self.sid {
            return;
        }
        if self.requests.contains_key(&id) {
            self.grant(now, id, fence, stamp, false);
        } else {
            self.stray(now, name, id, fence);
        }
    }

    /// A grant that nobody waits for. A server that took over without the last writes has the request in the queue
    /// still, though it was answered; and since this session lives, nobody else would ever be granted the lock.
    fn stray(&mut self, now: Micros, name: &str, id: u64, fence: u64) {
        let known = self.by_fence.contains_key(&fence)
            || self.releases.contains_key(&fence)
            || self.doubts.contains_key(&fence)
            || self.cancels.contains_key(&id);
        if known {
            return;
        }
        if self.leases.contains_key(&id) {
            // Held by the grant that was lost; the server has just made another.
            self.give_back_unknown(now, name.into(), fence);
        } else {
            // By the request, not by the fence: under that somebody may have taken the lock over.
            self.cancel_on_server(id, self.sid.clone(), name.into());
        }
    }

    /// The server took a lease away, or, with the reason `dropped`, a place in a queue: its session had been silent for
    /// too long when its turn came. Then `fence` is the number of the request, which is made again under a new one.
    pub fn on_revoked(&mut self, fence: u64, reason: &str) {
        if reason == "dropped" {
            self.ask_again(self.session.last_sent(), fence, false);
            return;
        }
        if reason == "late" {
            // The holder died, and this session had not answered in time when those who wait were called.
            self.ask_again(self.session.last_sent(), fence, true);
            return;
        }
        if let Some(cycle) = reason.strip_prefix("deadlock:") {
            // Its place in the queue was taken away, to let the others of a cycle go on.
            if let Some(request) = self.refused(fence) {
                let cycle = cycle.split(',').map(unescaped).collect();
                self.events.push(Event::Deadlock(request.token, cycle));
            }
            return;
        }
        let reason = if reason == "forced" {
            LossReason::Forced
        } else {
            LossReason::Revoked
        };
        if let Some(lease) = self
            .by_fence
            .get(&fence)
            .and_then(|id| self.leases.get(id))
            .cloned()
        {
            self.lose(&lease, reason);
        } else if !self.requests.is_empty() {
            self.revoked_early.insert(fence);
            if self.revoked_early.len() > REMEMBERED {
                self.revoked_early.pop_first();
            }
        }
    }

    /// The holder of a lock that this session waits for has died: who still lives has to say so now.
    pub fn on_call(&mut self, now: Micros) {
        self.session.hurry(now);
    }

    /// Answer to a release or an offer: true if the lease was held.
    pub fn on_release(&mut self, now: Micros, fence: u64, held: bool) {
        let Some(mut giveback) = self.releases.remove(&fence) else {
            return;
        };
        // An earlier try, whose answer was lost, may have done it. Or the server has lost the session meanwhile, and this
        // with it.
        // An offer that may not stand must not be handed on, though.
        let excused = giveback.tries > 1 || giveback.sid != self.sid;
        if held || (excused && giveback.offer.is_none()) {
            if let Some(token) = giveback.token {
                self.events.push(Event::Released(token, true));
            }
        } else if giveback.token.is_some() {
            giveback.since = now;
            self.doubts.insert(fence, giveback);
            self.session.hurry(now);
        }
    }

    /// The session lives, by what was sent at `stamp`: what the server did not know by then was taken away.
    pub(super) fn settle_doubts(&mut self, stamp: Micros) {
        let events = &mut self.events;
        self.doubts.retain(|_, doubt| {
            let open = doubt.since > stamp;
            if !open && let Some(token) = doubt.token {
                events.push(Event::Released(token, false));
            }
            open
        });
    }

    /// Answer to a cancellation.
    pub fn on_cancel(&mut self, id: u64) {
        self.cancels.remove(&id);
    }

    /// An extension was asked for under a session that the server does not know; it is asked for again under the next.
    pub fn on_extend_without_session(&mut self, now: Micros) {
        if self.session.open {
            self.session_gone(now);
        }
    }

    /// Answer to an extension: the stamp of the session's last heartbeat, or nothing if it is not held.
    pub fn on_extend(&mut self, id: u64, stamp: Option<Micros>) {
        let Some(extension) = self.drop_extension(id) else {
            return;
        };
        match stamp {
            Some(stamp) if self.leases.contains_key(&extension.lease.id) => {
                let lease = &extension.lease;
                let base = if lease.fixed() && lease.whole() {
                    extension.since
                } else {
                    stamp
                };
                // The server may have done a later one, too, whose answer is still to come.
                let timeout = self
                    .extending
                    .range((lease.id, 0)..=(lease.id, u64::MAX))
                    .filter_map(|(_, other)| self.extensions.get(other))
                    .fold(extension.timeout, |least, other| least.min(other.timeout));
                self.reshape(lease, timeout, Some(base));
                self.events.push(Event::Extended(extension.token, true));
            }
            _ => {
                self.lose(&extension.lease, LossReason::Revoked);
                self.events.push(Event::Extended(extension.token, false));
            }
        }
    }

    /// A command failed on the server. The caller is told; nothing of it stays behind. A release or a cancellation is
    /// sent again later: as long as the session lives, nobody else would get the lock.
    pub fn on_refused(&mut self, command: &Command, why: &str) {
        let failure = Failure::Refused(why.to_owned());
        match command {
            Command::Acquire(id) => {
                if let Some(token) = self.withdraw(*id) {
                    self.events.push(Event::Failed(token, failure));
                }
            }
            Command::Release { fence, .. } | Command::Offer { fence, .. } => {
                if let Some(token) = self.releases.get_mut(fence).and_then(|g| g.token.take()) {
                    self.events.push(Event::Failed(token, failure));
                }
                self.again.push(command.clone());
            }
            Command::Extend(id) => {
                if let Some(extension) = self.drop_extension(*id) {
                    self.events.push(Event::Failed(extension.token, failure));
                }
            }
            Command::Cancel { .. } | Command::Mine(_) => self.again.push(command.clone()),
            Command::Assert(ids) => {
                for id in ids {
                    if let Some(lease) = self.leases.get(id).cloned()
                        && self.asserting.contains(id)
                    {
                        self.lose(&lease, LossReason::Forgotten);
                    }
                }
            }
            Command::Heartbeat(_) => {}
        }
    }

    /// Answer to a heartbeat.
    pub fn on_heartbeat(&mut self, now: Micros, sent: &Heartbeat, reply: HeartbeatReply) {
        if *sent.sid != *self.sid || sent.gen_ != self.session.gen_ {
            return;
        }
        // A lease whose end has passed stays lost, however long this answer was on its way.
        self.expire_leases(now);
        let HeartbeatReply::Alive {
            epoch,
            revoked,
            accepted,
            due,
            taking_back,
            last_number,
        } = reply
        else {
            self.session_gone(now);
            return;
        };
        self.session.last_number = self.session.last_number.max(last_number);
        let lost_data = self
            .session
            .epoch
            .as_ref()
            .is_some_and(|known| *known != epoch);
        if lost_data && self.session.known {
            // It was an older command of ours that opened the session on the emptied server.
            self.session_gone(now);
            return;
        }
        self.session.epoch = Some(epoch);
        self.settle_doubts(sent.stamp);
        for entry in revoked.split_terminator(';') {
            if let Some((fence, reason)) = entry.split_once(' ')
                && let Ok(fence) = fence.parse()
            {
                self.on_revoked(fence, reason);
            }
        }
        self.session.acknowledge = revoked;
        self.session.clock.confirm(sent.stamp);
        let accepted: BTreeSet<u64> = accepted.into_iter().collect();
        let before = self.asserting.len();
        for (_, fence) in &sent.claims {
            let Some(lease) = self
                .by_fence
                .get(fence)
                .and_then(|id| self.leases.get(id))
                .cloned()
            else {
                continue;
            };
            if accepted.contains(fence) {
                self.confirm(&lease, sent.stamp);
            } else {
                self.unclaimed.remove(&lease.id);
                self.asserting.insert(lease.id);
            }
        }
        let opened = !self.session.open && sent.mode != Mode::Keep;
        if opened || self.asserting.len() > before {
            self.take_back(taking_back);
        }
        if opened {
            self.opened(now, sent.mode == Mode::Open, lost_data);
        }
        if !self.unclaimed.is_empty() && sent.claims.len() >= CLAIMS && self.session.open {
            self.session.hurry(now);
        }
        if let Some(due) = due
            && self.requests.values().any(|request| request.waiting)
        {
            self.look_at(now, due);
        }
    }

    /// Answer to taking leases back: the fences that the session holds now; nothing if the session is gone.
    pub fn on_assert(&mut self, now: Micros, ids: &[u64], held: Option<&[u64]>) {
        let Some(held) = held else {
            if self.session.open {
                self.session_gone(now);
            }
            return;
        };
        let stamp = self.session.clock.confirmed();
        for id in ids {
            if !self.asserting.contains(id) {
                continue;
            }
            let Some(lease) = self.leases.get(id).cloned() else {
                continue;
            };
            if held.contains(&lease.fence) {
                self.confirm(&lease, stamp);
            } else {
                self.lose(&lease, LossReason::Forgotten);
            }
        }
    }

    /// One page of what the server thinks that this session holds: what it does not hold is given back.
    pub fn on_mine(&mut self, now: Micros, cursor: u64, page: Vec<(Arc<str>, u64)>) {
        for (name, fence) in page {
            if self.by_fence.contains_key(&fence) || self.releases.contains_key(&fence) {
                continue;
            }
            self.give_back_unknown(now, name, fence);
        }
        if cursor == 0 {
            self.session.compare = false;
        } else {
            self.commands.push(Command::Mine(cursor));
        }
    }

    /// The server thinks that this session holds what it does not.
    fn give_back_unknown(&mut self, now: Micros, name: Arc<str>, fence: u64) {
        let giveback = Giveback {
            name,
            token: None,
            since: now,
            tries: 1,
            offer: None,
            sid: self.sid.clone(),
            overtaken: false,
        };
        self.commands.push(giveback.command(fence));
        self.releases.insert(fence, giveback);
    }

    /// Something is to be done on the server after this time, and a heartbeat does it.
    fn look_at(&mut self, now: Micros, rest: Micros) {
        if rest < NEAR {
            self.session.hurry(now + rest.max(MOMENT) + MOMENT);
        }
    }

    fn opened(&mut self, now: Micros, fresh: bool, lost_data: bool) {
        self.session.open = true;
        self.session.known = true;
        if self
            .session
            .needs_heartbeat_for(now, self.session.longest())
        {
            // What was asked for while it opened is longer than what the session was opened for.
            self.heartbeat(now, Mode::Keep);
        }
        self.events.push(Event::Opened(fresh));
        for (fence, giveback) in &mut self.releases {
            giveback.tries += 1;
            self.commands.push(giveback.command(*fence));
        }
        for (request, (sid, name)) in &self.cancels {
            self.commands.push(Command::Cancel {
                request: *request,
                sid: sid.clone(),
                name: name.clone(),
            });
        }
        for (id, request) in &mut self.requests {
            request.sid = self.sid.clone();
            if fresh && !lost_data {
                // The place was given up for its session's silence, and others may be served already.
                request.rank = None;
            }
            if request
                .asked
                .replace(request.asked.unwrap_or(now))
                .is_some()
            {
                self.resent.insert(*id, 1);
            }
            self.commands.push(Command::Acquire(*id));
        }
        self.commands
            .extend(self.extensions.keys().map(|id| Command::Extend(*id)));
        if self.session.compare && !fresh {
            self.commands.push(Command::Mine(0));
        } else {
            self.session.compare = false;
        }
        if !self.unclaimed.is_empty() {
            self.session.hurry(now);
        }
    }

    /// The server does not know the session. It is opened anew, and what is held is taken back if that can be.
    fn session_gone(&mut self, now: Micros) {
        let held: Vec<_> = self.leases.values().cloned().collect();
        for lease in held {
            self.freeze(&lease);
            self.asserting.insert(lease.id);
        }
        // They were held until they were given back: it is the server that did not know it any more.
        for doubt in std::mem::take(&mut self.doubts).into_values() {
            if let Some(token) = doubt.token {
                self.events
                    .push(Event::Released(token, doubt.offer.is_none()));
            }
        }
        self.unclaimed.clear();
        self.later.clear();
        self.session.renew();
        self.sid = self.session.sid().into();
        // What was not given back yet still is to be: a fixed lease may outlive its session.
        self.heartbeat(now, Mode::Open);
    }
}
