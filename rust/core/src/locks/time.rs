//! What happens because time passes.

use super::{Client, Command, Event, Mode, OUTAGE_LIMIT};
use crate::lease::{LossReason, Micros};

impl Client {
    /// When requests are looked at next, or would be if there were any.
    pub fn next_look(&self) -> Micros {
        self.look_at_requests
    }

    /// When `tick` wants to be called next.
    pub fn next_tick(&self) -> Micros {
        let mut next = if self.session.open {
            self.session.next_due()
        } else {
            Micros::MAX
        };
        if let Some((at, _)) = self.patience.first() {
            next = next.min(*at);
        }
        if !(self.requests.is_empty()
            && self.releases.is_empty()
            && self.doubts.is_empty()
            && self.extensions.is_empty()
            && self.again.is_empty())
        {
            next = next.min(self.look_at_requests);
        }
        for (timeout, group) in &self.groups {
            let end = self.group_end(*timeout);
            if end >= next {
                break;
            }
            next = next.min(end.max(group.look_again));
        }
        let later = self.later.first().filter(|_| self.session.open);
        for (at, _) in [self.ends.first(), self.limits.first(), later]
            .into_iter()
            .flatten()
        {
            next = next.min(*at);
        }
        next
    }

    /// Lets time pass: heartbeats are sent, patience ends, leases that nobody confirmed are lost.
    pub fn tick(&mut self, now: Micros) {
        self.expire_leases(now);
        while let Some((at, id)) = self.patience.first().copied() {
            if at > now {
                break;
            }
            let answered = self
                .requests
                .get(&id)
                .is_some_and(|request| request.waiting)
                || self.connected;
            if let Some(token) = self.withdraw(id) {
                self.events.push(if answered {
                    Event::TimedOut(token)
                } else {
                    Event::Failed(token, self.absence())
                });
            }
        }
        if now >= self.look_at_requests {
            self.look_at_requests = now + (self.request_timeout / 10).clamp(20_000, 500_000);
            self.expire_requests(now);
            if self.session.open {
                self.commands.append(&mut self.again);
            }
        }
        // Before the session is open the opening heartbeat is on its way, and the driver's own timeout watches it.
        if self.session.open && now >= self.session.next_due() {
            if self.stalled {
                self.session.put_off(now);
            }
            self.heartbeat(now, Mode::Keep);
        }
        while let Some((at, id)) = self.later.first().copied() {
            if at > now || !self.session.open {
                break;
            }
            self.later.pop_first();
            if self.requests.contains_key(&id) {
                self.commands.push(Command::Acquire(id));
            }
        }
    }

    pub(super) fn expire_leases(&mut self, now: Micros) {
        while let Some((at, id)) = self.limits.first().copied() {
            if at > now {
                break;
            }
            self.limits.pop_first();
            if let Some(lease) = self.leases.get(&id).cloned() {
                self.lose(&lease, LossReason::HeldTooLong);
            }
        }
        let mut ended = Vec::new();
        while let Some((at, id)) = self.ends.first().copied() {
            if at > now {
                break;
            }
            self.ends.pop_first();
            ended.extend(self.leases.get(&id).cloned());
        }
        let due: Vec<Micros> = self
            .groups
            .iter()
            .take_while(|(timeout, _)| self.group_end(**timeout) <= now)
            .filter(|(_, group)| group.look_again <= now)
            .map(|(timeout, _)| *timeout)
            .collect();
        for timeout in due {
            let mut look_again = Micros::MAX;
            if let Some(group) = self.groups.get(&timeout) {
                for lease in group.members.iter().filter_map(|id| self.leases.get(id)) {
                    let end = lease.valid_until();
                    if end <= now {
                        ended.push(lease.clone());
                    } else {
                        look_again = look_again.min(end);
                    }
                }
            }
            if let Some(group) = self.groups.get_mut(&timeout) {
                group.look_again = if look_again == Micros::MAX {
                    0
                } else {
                    look_again
                };
            }
        }
        for lease in ended {
            self.lose(&lease, LossReason::Deadline);
        }
    }

    pub(super) fn expire_requests(&mut self, now: Micros) {
        let limit = self.request_timeout;
        let out = !self.connected && now.saturating_sub(self.away_since) > OUTAGE_LIMIT.max(limit);
        let late: Vec<u64> = self
            .requests
            .iter()
            .filter(|(_, r)| {
                if r.waiting {
                    out
                } else {
                    now.saturating_sub(r.first) > limit
                }
            })
            .map(|(id, _)| *id)
            .collect();
        for id in late {
            if let Some(token) = self.withdraw(id) {
                self.events.push(Event::Failed(token, self.absence()));
            }
        }
        let absence = self.absence();
        for giveback in self.releases.values_mut() {
            if now.saturating_sub(giveback.since) > limit
                && let Some(token) = giveback.token.take()
            {
                self.events.push(Event::Failed(token, absence.clone()));
            }
        }
        self.settle_doubts(now.saturating_sub(limit));
        let late: Vec<u64> = self
            .extensions
            .iter()
            .filter(|(_, e)| now.saturating_sub(e.since) > limit)
            .map(|(id, _)| *id)
            .collect();
        for id in late {
            if let Some(extension) = self.drop_extension(id) {
                self.events
                    .push(Event::Failed(extension.token, absence.clone()));
            }
        }
    }
}
