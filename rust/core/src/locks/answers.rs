//! Answers of the server, handed in by the driver.

use super::{
    AcquireReply, CLAIMS, Client, Command, Event, Failure, Heartbeat, HeartbeatReply, Mode,
    REMEMBERED,
};
use crate::lease::{LossReason, Micros};
use std::collections::BTreeSet;

impl Client {
    /// Answer to an acquire.
    pub fn on_acquire(&mut self, now: Micros, id: u64, reply: AcquireReply) {
        self.resent.remove(&id);
        match reply {
            AcquireReply::Granted {
                fence,
                stamp,
                claimed,
            } => self.grant(now, id, fence, stamp, claimed),
            AcquireReply::Waiting => {
                if let Some(request) = self.requests.get_mut(&id) {
                    request.waiting = true;
                }
            }
            AcquireReply::NotFree(left) => {
                if let Some(request) = self.drop_request(id) {
                    self.events.push(Event::NotFree(request.token, left));
                }
            }
            AcquireReply::Deadlock(cycle) => {
                if let Some(request) = self.drop_request(id) {
                    self.events.push(Event::Deadlock(request.token, cycle));
                }
            }
            // Only the first of a pipeline: the others were asked under the session that is gone, too.
            AcquireReply::NoSession => {
                if self.session.open {
                    self.session_gone(now, LossReason::SessionEnded);
                }
            }
            AcquireReply::Superseded => {}
        }
    }

    /// A lock came out of the queue.
    pub fn on_grant(&mut self, now: Micros, sid: &str, id: u64, fence: u64, stamp: Micros) {
        if *sid == *self.sid {
            self.grant(now, id, fence, stamp, false);
        }
    }

    /// The server took a lease away, or, with the reason `dropped`, a place in a queue: its session had been silent for
    /// too long when its turn came. Then `fence` is the number of the request, which is made again under a new one.
    pub fn on_revoked(&mut self, fence: u64, reason: &str) {
        if reason == "dropped" {
            self.ask_again(self.session.last_sent(), fence);
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

    /// Answer to a release: true if the lease was held.
    pub fn on_release(&mut self, fence: u64, held: bool) {
        if let Some(giveback) = self.releases.remove(&fence)
            && let Some(token) = giveback.token
        {
            // An earlier try, whose answer was lost, may have done it.
            self.events
                .push(Event::Released(token, held || giveback.tries > 1));
        }
    }

    /// Answer to a cancellation.
    pub fn on_cancel(&mut self, id: u64) {
        self.cancels.remove(&id);
    }

    /// Answer to an extension: the stamp of the session's last heartbeat, or nothing if it is not held.
    pub fn on_extend(&mut self, id: u64, stamp: Option<Micros>) {
        let Some(extension) = self.drop_extension(id) else {
            return;
        };
        match stamp {
            Some(stamp) if self.leases.contains_key(&extension.lease.id) => {
                let lease = &extension.lease;
                let base = if lease.fixed && lease.whole() {
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
            Command::Release { fence, .. } => {
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
            Command::Cancel { .. } => self.again.push(command.clone()),
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
        } = reply
        else {
            self.session_gone(now, LossReason::SessionEnded);
            return;
        };
        let lost_data = self
            .session
            .epoch
            .as_ref()
            .is_some_and(|known| *known != epoch);
        self.session.epoch = Some(epoch);
        if lost_data && self.session.known {
            // It was an older command of ours that opened the session on the emptied server.
            self.session_gone(now, LossReason::Forgotten);
            return;
        }
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
                self.unclaimed.remove(&lease.id);
                if !lease.renewed() {
                    self.unwatch(&lease);
                    lease.claimed(sent.stamp);
                    self.watch(&lease);
                }
            } else {
                self.lose(&lease, LossReason::Forgotten);
            }
        }
        if !self.session.open && sent.mode != Mode::Keep {
            self.opened(now, sent.mode == Mode::Open);
        }
        if !self.unclaimed.is_empty() && sent.claims.len() >= CLAIMS && self.session.open {
            self.session.hurry(now);
        }
    }

    pub(super) fn opened(&mut self, now: Micros, fresh: bool) {
        self.session.open = true;
        self.session.known = true;
        self.events.push(Event::Opened(fresh));
        for (fence, giveback) in &mut self.releases {
            giveback.tries += 1;
            self.commands.push(Command::Release {
                name: giveback.name.clone(),
                fence: *fence,
            });
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
            if request
                .asked
                .replace(request.asked.unwrap_or(now))
                .is_some()
            {
                self.resent.insert(*id);
            }
            self.commands.push(Command::Acquire(*id));
        }
        self.commands
            .extend(self.extensions.keys().map(|id| Command::Extend(*id)));
        if !self.unclaimed.is_empty() {
            self.session.hurry(now);
        }
    }

    pub(super) fn session_gone(&mut self, now: Micros, reason: LossReason) {
        self.lose_all(reason);
        self.session.renew();
        self.sid = self.session.sid().into();
        // What was not given back yet still is to be: a fixed lease may outlive its session.
        self.heartbeat(now, Mode::Open);
    }
}
