//! Requests from their grant or withdrawal on, and the ways in which all of them end.

use super::{Client, Command, Event, Extension, Failure, Mode, Request};
use crate::lease::{CLAIM_DELAY, Lease, Micros};
use std::sync::Arc;

impl Client {
    pub(super) fn grant(&mut self, now: Micros, id: u64, fence: u64, stamp: Micros, claimed: bool) {
        if self.by_fence.contains_key(&fence) {
            return;
        }
        let Some(request) = self.requests.get(&id) else {
            // Withdrawn: the cancellation that was sent then gives it back.
            return;
        };
        let ask = request.ask.clone();
        let base = if ask.fixed && claimed {
            request.asked.unwrap_or(request.first)
        } else {
            stamp
        };
        let place = request.place;
        let clock = self.session.clock.clone();
        let lease = Arc::new(Lease::new((id, fence, place), ask, base, claimed, clock));
        if self.revoked_early.remove(&fence) || !lease.held_at(now) {
            // Too late to be believed: it is given back, and the wait goes on under a new number.
            self.ask_again(now, id, false);
            return;
        }
        let Some(request) = self.requests.remove(&id) else {
            return;
        };
        if let Some(at) = request.gives_up {
            self.patience.remove(&(at, id));
        }
        if self.requests.is_empty() {
            self.revoked_early.clear();
        }
        self.keep(now, &lease);
        if !claimed {
            self.unclaimed.insert(id);
            // One heartbeat claims all grants of a moment, and those given back by then need none.
            self.session
                .hurry(now + (lease.valid_until().saturating_sub(now) / 8).min(CLAIM_DELAY));
        }
        self.events.push(Event::Granted(request.token, lease));
    }

    /// Asks under a new number. `now` may be early, but not before the last heartbeat.
    /// It keeps its rank in the queue only where it was passed over for its silence alone.
    pub(super) fn ask_again(&mut self, now: Micros, id: u64, keep_rank: bool) {
        let Some(mut request) = self.requests.remove(&id) else {
            return;
        };
        let fresh = self.fresh();
        if let Some(at) = request.gives_up
            && self.patience.remove(&(at, id))
        {
            self.patience.insert((at, fresh));
        }
        // Its old number may be in the queue again, or hold what came too late.
        self.cancel_on_server(id, request.sid.clone(), request.ask.name.clone());
        if request.waiting {
            request.first = now;
        }
        request.waiting = false;
        if !keep_rank {
            request.rank = None;
        }
        request.asked = self.session.open.then_some(now);
        self.requests.insert(fresh, request);
        if self.session.open {
            if self.session.last_sent() < now {
                self.heartbeat(now, Mode::Keep);
            }
            self.commands.push(Command::Acquire(fresh));
        }
    }

    pub(super) fn drop_request(&mut self, id: u64) -> Option<Request> {
        let request = self.requests.remove(&id)?;
        if let Some(at) = request.gives_up {
            self.patience.remove(&(at, id));
        }
        self.session.remove(request.ask.timeout);
        Some(request)
    }

    /// Ends a request on our side and sees to it that the server's side ends too.
    pub(super) fn withdraw(&mut self, id: u64) -> Option<u64> {
        let request = self.drop_request(id)?;
        if request.asked.is_some() {
            self.cancel_on_server(id, request.sid, request.ask.name.clone());
        }
        Some(request.token)
    }

    pub(super) fn cancel_on_server(&mut self, id: u64, sid: Arc<str>, name: Arc<str>) {
        self.resent.remove(&id);
        self.cancels.insert(id, (sid.clone(), name.clone()));
        if self.session.open {
            self.commands.push(Command::Cancel {
                request: id,
                sid,
                name,
            });
        }
    }

    pub(super) fn drop_extension(&mut self, id: u64) -> Option<Extension> {
        let extension = self.extensions.remove(&id)?;
        self.extending.remove(&(extension.lease.id, id));
        self.session.remove(extension.timeout);
        Some(extension)
    }

    /// Why an answer is missing.
    pub fn absence(&self) -> Failure {
        if self.session.open {
            Failure::NoAnswer
        } else if self.refused {
            Failure::Denied(self.last_error.clone())
        } else {
            Failure::Unavailable(self.last_error.clone())
        }
    }

    pub(super) fn fail_all(&mut self, failure: &Failure) {
        let all: Vec<u64> = self.requests.keys().copied().collect();
        for id in all {
            if let Some(token) = self.withdraw(id) {
                self.events.push(Event::Failed(token, failure.clone()));
            }
        }
        for giveback in self.releases.values_mut().chain(self.doubts.values_mut()) {
            if let Some(token) = giveback.token.take() {
                self.events.push(Event::Failed(token, failure.clone()));
            }
        }
        self.doubts.clear();
        let all: Vec<u64> = self.extensions.keys().copied().collect();
        for extension in all
            .into_iter()
            .filter_map(|id| self.drop_extension(id))
            .collect::<Vec<_>>()
        {
            self.events
                .push(Event::Failed(extension.token, failure.clone()));
        }
    }
}
