//! Leases held, and the indexes that find the next one to end.

use super::{Client, Command, Event, Giveback};
use crate::lease::{Lease, LossReason, Micros};
use std::sync::Arc;

impl Client {
    pub(super) fn give_back(
        &mut self,
        now: Micros,
        lease: &Arc<Lease>,
        token: Option<u64>,
        offer: Option<Micros>,
    ) {
        let giveback = Giveback {
            name: lease.name().clone(),
            token,
            since: now,
            tries: u32::from(self.session.open),
            offer,
            // What the server has lost with its data hangs on no session that it knows.
            sid: if self.asserting.contains(&lease.id) {
                "".into()
            } else {
                self.sid.clone()
            },
            overtaken: false,
        };
        if self.session.open {
            self.commands.push(giveback.command(lease.fence));
        }
        self.releases.insert(lease.fence, giveback);
    }

    /// Puts a lease into every index.
    pub(super) fn keep(&mut self, now: Micros, lease: &Arc<Lease>) {
        self.session.last_number = self.session.last_number.max(lease.fence);
        self.by_fence.insert(lease.fence, lease.id);
        self.leases.insert(lease.id, lease.clone());
        *self.owners.entry(lease.ask.owner.clone()).or_default() += 1;
        if let Some(longest) = lease.ask.max_hold {
            self.limits.insert((now + longest, lease.id));
            self.limit_of.insert(lease.id, now + longest);
        }
        self.watch(lease);
    }

    /// Takes a lease out of every index.
    pub(super) fn forget(&mut self, lease: &Arc<Lease>) {
        if self.leases.remove(&lease.id).is_none() {
            return;
        }
        self.by_fence.remove(&lease.fence);
        self.unwatch(lease);
        self.unclaimed.remove(&lease.id);
        self.asserting.remove(&lease.id);
        if let Some(at) = self.limit_of.remove(&lease.id) {
            self.limits.remove(&(at, lease.id));
        }
        if let Some(count) = self.owners.get_mut(&lease.ask.owner) {
            *count -= 1;
            if *count == 0 {
                self.owners.remove(&lease.ask.owner);
            }
        }
        self.session.remove(lease.timeout());
        if self.resent.contains_key(&lease.id) {
            self.cancel_on_server(lease.id, self.sid.clone(), lease.name().clone());
        }
    }

    /// Enters the end of a lease into the index that fits it.
    pub(super) fn watch(&mut self, lease: &Lease) {
        if lease.renewed() {
            let group = self.groups.entry(lease.timeout()).or_default();
            group.members.insert(lease.id);
            group.look_again = 0;
        } else {
            self.ends.insert((lease.valid_until(), lease.id));
        }
    }

    /// Takes it out again; to be done before anything that it follows from is changed.
    pub(super) fn unwatch(&mut self, lease: &Lease) {
        if !lease.renewed() {
            self.ends.remove(&(lease.valid_until(), lease.id));
        } else if let Some(group) = self.groups.get_mut(&lease.timeout()) {
            group.members.remove(&lease.id);
            if group.members.is_empty() {
                self.groups.remove(&lease.timeout());
            }
        }
    }

    pub(super) fn lose(&mut self, lease: &Arc<Lease>, reason: LossReason) {
        if !self.leases.contains_key(&lease.id) {
            return;
        }
        self.forget(lease);
        if lease.lose(reason) {
            if matches!(reason, LossReason::Deadline | LossReason::HeldTooLong) {
                // The server may still think that it is held; `now` only serves a caller's timeout, and none waits.
                self.give_back(0, lease, None, None);
            }
            self.events.push(Event::Lost(lease.clone()));
        }
    }

    /// Heartbeats extend it no longer, until the server has said that it knows it.
    pub(super) fn freeze(&mut self, lease: &Arc<Lease>) {
        if lease.renewed() {
            self.unwatch(lease);
            lease.freeze();
            self.watch(lease);
        }
    }

    /// The server knows it by what was sent at `stamp`.
    pub(super) fn confirm(&mut self, lease: &Arc<Lease>, stamp: Micros) {
        self.unclaimed.remove(&lease.id);
        self.asserting.remove(&lease.id);
        if !lease.renewed() {
            self.unwatch(lease);
            lease.claimed(stamp);
            self.watch(lease);
        }
    }

    /// Takes back what the server has lost, where it lets us; else it is lost to its holders, too.
    pub(super) fn take_back(&mut self, possible: bool) {
        if possible {
            let all: Vec<u64> = self.asserting.iter().copied().collect();
            for some in all.chunks(super::ASSERTS) {
                self.commands.push(Command::Assert(some.to_vec()));
            }
            return;
        }
        for id in std::mem::take(&mut self.asserting) {
            if let Some(lease) = self.leases.get(&id).cloned() {
                self.lose(&lease, LossReason::Forgotten);
            }
        }
    }

    pub(super) fn reshape(&mut self, lease: &Arc<Lease>, timeout: Micros, base: Option<Micros>) {
        if !self.leases.contains_key(&lease.id) {
            return;
        }
        let before = lease.timeout();
        self.session.add(0, timeout);
        self.session.remove(before);
        self.unwatch(lease);
        lease.resize(timeout, base);
        self.watch(lease);
    }

    pub(super) fn group_end(&self, timeout: Micros) -> Micros {
        (self.session.clock.confirmed() + timeout).saturating_sub(crate::lease::drift(timeout))
    }
}
