//! Leases held, and the indexes that find the next one to end.

use super::{Client, Command, Event, Giveback};
use crate::lease::{Lease, LossReason, Micros};
use std::sync::Arc;

impl Client {
    pub(super) fn give_back(&mut self, now: Micros, lease: &Arc<Lease>, token: Option<u64>) {
        let mut tries = 0;
        if self.session.open {
            tries = 1;
            self.commands.push(Command::Release {
                name: lease.name.clone(),
                fence: lease.fence,
            });
        }
        self.releases.insert(
            lease.fence,
            Giveback {
                name: lease.name.clone(),
                token,
                since: now,
                tries,
            },
        );
    }

    /// Takes a lease out of every index.
    pub(super) fn forget(&mut self, lease: &Arc<Lease>) {
        if self.leases.remove(&lease.id).is_none() {
            return;
        }
        self.by_fence.remove(&lease.fence);
        self.unwatch(lease);
        self.unclaimed.remove(&lease.id);
        self.session.remove(lease.timeout());
        if self.resent.contains(&lease.id) {
            self.cancel_on_server(lease.id, self.sid.clone(), lease.name.clone());
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
            if reason == LossReason::Deadline {
                // The server may still think that it is held; `now` only serves a caller's timeout, and none waits.
                self.give_back(0, lease, None);
            }
            self.events.push(Event::Lost(lease.clone()));
        }
    }

    pub(super) fn lose_all(&mut self, reason: LossReason) {
        let all: Vec<_> = self.leases.values().cloned().collect();
        for lease in all {
            self.lose(&lease, reason);
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
