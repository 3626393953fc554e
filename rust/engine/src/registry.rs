//! The process's side of the registry: instances that it keeps registered, and services that it follows.
//!
//! No sockets here: requests, pushes, answers and time come in, calls to make come out. What is registered is
//! told again whenever a session opens, and whenever heartbeats failed for so long that the server may have
//! dropped it; what is deregistered is told until it is answered.
mod watches;

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use dotmac_core::lease::Micros;
use dotmac_core::registry::{Reading, Watch};

use crate::Outcome;
use crate::node::{Arg, Call};
use crate::scripts::{REGISTRY_SUFFIXES, Script};
use crate::wire::Value;
use watches::{Watches, fetch};

/// Dead registrations are looked for this often, by every process that uses the registry.
const SWEEP: Micros = 1_000_000;
/// As many are looked at in one step.
const SWEEP_STEP: i64 = 100;

/// What a caller may ask of the registry.
#[derive(Debug, Clone)]
pub enum Request {
    /// Keep an instance registered from now on.
    Register {
        /// Name of the service.
        service: String,
        /// Name of the instance, unique in the service.
        id: String,
        /// Counts up with each registration of the same id.
        epoch: u64,
        /// Milliseconds that it outlives the session's last heartbeat.
        ttl: u64,
        /// Take the id over from a live session.
        replace: bool,
        /// The record, JSON.
        record: String,
    },
    /// Take it out, and tell the server until it has answered.
    Deregister {
        /// Name of the service.
        service: String,
        /// Name of the instance.
        id: String,
    },
    /// Follow a service from now on, and read it now.
    Follow {
        /// Name of the service.
        service: String,
        /// The caller changed it: that nothing is left is believed.
        changed: bool,
    },
    /// A page of all instances.
    List {
        /// Where the last page ended.
        after: Bytes,
        /// At most as many.
        count: u32,
    },
    /// What a health check found.
    Status {
        /// Name of the service.
        service: String,
        /// Name of the instance.
        id: String,
        /// Which registration of it was checked.
        epoch: u64,
        /// Whether it is well.
        up: bool,
    },
    /// Meet the others who check health.
    Monitors {
        /// Who asks.
        monitor: String,
        /// Milliseconds that it is believed to live; 0 leaves.
        live: u64,
    },
}

/// What the engine does with an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Task {
    /// Keep the registration, unless it was refused. True: it was there before.
    Keep(String, u64, bool),
    /// Forget it.
    Leave(String, u64),
    /// Offer it to the watch of a service.
    Fetch(String, Reading),
    /// See whether there is more to sweep.
    Sweep,
    /// Nothing but handing it on.
    Hand,
}

impl Task {
    /// Whether the answer 0 means that the session has gone, and the call has to wait for the next one.
    pub fn needs_session(&self) -> bool {
        matches!(self, Self::Keep(..))
    }
}

/// What a request leads to.
#[derive(Debug)]
pub enum Step {
    /// Nothing has to be asked.
    Answer(Outcome),
    /// Make this call.
    Call(Call, Task),
}

#[derive(Debug)]
struct Bound {
    register: Call,
    deregister: Call,
    epoch: u64,
    ttl: Micros,
    leaving: bool,
}

/// Counters.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counts {
    /// Registrations that the server had lost and was told again.
    pub reregistered: u64,
    /// Registrations that another session has taken over.
    pub taken_over: u64,
    /// Times that a service was read.
    pub fetches: u64,
    /// Dead registrations that this process removed.
    pub swept: u64,
}

/// Instances of this process, and services that it follows.
#[derive(Debug, Default)]
pub struct Registry {
    bound: BTreeMap<String, Bound>,
    watches: Watches,
    sweep_due: Micros,
    /// Somebody looks at all instances of the partition, which this process need not use itself.
    looked_at: bool,
    added: Option<Micros>,
    removed: Vec<Micros>,
    /// What was counted since the start.
    pub counts: Counts,
}

impl Registry {
    // ---- callers

    /// The watch of a service; it stays empty until the service is read. It is followed while it is held.
    pub fn watch(&mut self, service: &str) -> Arc<Watch> {
        self.watches.watch(service)
    }

    /// Whether a service is followed.
    pub fn follows(&self, service: &str) -> bool {
        self.watches.follows(service)
    }

    /// How many services are followed.
    pub fn followed(&self) -> usize {
        self.watches.len()
    }

    /// How many instances are kept registered.
    pub fn registered(&self) -> usize {
        self.bound.values().filter(|b| !b.leaving).count()
    }

    /// How often an instance was chosen, over all services.
    pub fn picks(&self) -> u64 {
        self.watches.picks()
    }

    /// What a request leads to.
    pub fn request(&mut self, request: &Request) -> Step {
        match request {
            Request::Register {
                service,
                id,
                epoch,
                ttl,
                replace,
                record,
            } => {
                let (key, ttl_us) = (key(service, id), ttl * 1000);
                let register = call(
                    Script::Register,
                    vec![
                        text(service),
                        text(id),
                        Arg::Sid,
                        Arg::Gen,
                        number(*epoch),
                        number(*ttl),
                        text(if *replace { "1" } else { "0" }),
                        text(record),
                        Arg::Channel,
                    ],
                );
                let deregister = call(
                    Script::Deregister,
                    vec![
                        text(service),
                        text(id),
                        Arg::Sid,
                        number(*epoch),
                        Arg::Channel,
                    ],
                );
                let bound = Bound {
                    register: register.clone(),
                    deregister,
                    epoch: *epoch,
                    ttl: ttl_us,
                    leaving: false,
                };
                self.added = Some(ttl_us);
                if let Some(before) = self.bound.insert(key.clone(), bound) {
                    self.removed.push(before.ttl);
                }
                Step::Call(register, Task::Keep(key, *epoch, false))
            }
            Request::Deregister { service, id } => {
                let key = key(service, id);
                match self.bound.get_mut(&key) {
                    None => Step::Answer(Outcome::Reply(Value::List(vec![Value::Int(0)]))),
                    Some(bound) => {
                        bound.leaving = true;
                        Step::Call(bound.deregister.clone(), Task::Leave(key, bound.epoch))
                    }
                }
            }
            Request::Follow { service, changed } => {
                self.watches.watch(service);
                let reading = if *changed {
                    Reading::Second
                } else {
                    Reading::First
                };
                let (call, task) = fetch(service, reading);
                Step::Call(call, task)
            }
            Request::List { after, count } => {
                self.looked_at = true;
                let args = vec![Arg::Bytes(after.clone()), number(u64::from(*count))];
                Step::Call(call(Script::Instances, args), Task::Hand)
            }
            Request::Status {
                service,
                id,
                epoch,
                up,
            } => {
                let status = text(if *up { "up" } else { "down" });
                let args = vec![
                    text(service),
                    text(id),
                    number(*epoch),
                    status,
                    Arg::Channel,
                ];
                Step::Call(call(Script::Status, args), Task::Hand)
            }
            Request::Monitors { monitor, live } => Step::Call(
                call(Script::Monitors, vec![text(monitor), number(*live)]),
                Task::Hand,
            ),
        }
    }

    /// Time to live of a registration that the last request has added.
    pub fn take_added(&mut self) -> Option<Micros> {
        self.added.take()
    }

    /// Times to live of registrations that are not kept any more.
    pub fn take_removed(&mut self) -> Vec<Micros> {
        std::mem::take(&mut self.removed)
    }

    // ---- the engine thread

    /// The call that reads the same service, if there was one.
    pub fn fetching(&self, task: &Task) -> Option<u64> {
        let Task::Fetch(service, _) = task else {
            return None;
        };
        self.watches.fetching(service)
    }

    /// The service changed while it is being read.
    pub fn again(&mut self, task: &Task) {
        if let Task::Fetch(service, _) = task {
            self.watches.again(service);
        }
    }

    /// A task's call is on its way under this number.
    pub fn sent(&mut self, task: &Task, id: u64) {
        if let Task::Fetch(service, _) = task {
            self.watches.sent(service, id);
        }
    }

    /// A session has opened, or was silent for long: everything is told and read again.
    pub fn opened(&mut self) -> Vec<(Call, Task)> {
        let mut steps: Vec<_> = self
            .bound
            .iter()
            .map(|(key, bound)| {
                if bound.leaving {
                    (
                        bound.deregister.clone(),
                        Task::Leave(key.clone(), bound.epoch),
                    )
                } else {
                    (
                        bound.register.clone(),
                        Task::Keep(key.clone(), bound.epoch, true),
                    )
                }
            })
            .collect();
        // What this process follows itself shows what it registers itself: hence the order.
        steps.extend(self.watches.fetch_all());
        steps
    }

    /// Whether the server may have dropped a registration after a silence of the session.
    pub fn may_have_died(&self, silence: Micros) -> bool {
        self.bound.values().any(|b| silence > b.ttl / 2)
    }

    /// The connection is gone: what is known still serves, and is marked.
    pub fn disconnected(&mut self) {
        self.watches.disconnected();
    }

    /// The server announced a change.
    pub fn on_change(&mut self, payload: &str) -> Vec<(Call, Task)> {
        match payload.split_once('\0') {
            Some((service, revision)) => self.watches.on_change(service, revision),
            None => Vec::new(),
        }
    }

    /// When the registry has something to do by itself.
    pub fn next_due(&self) -> Micros {
        if self.bound.is_empty() && self.watches.len() == 0 && !self.looked_at {
            return Micros::MAX;
        }
        self.sweep_due.min(self.watches.next_due())
    }

    /// Time passes.
    pub fn tick(&mut self, now: Micros) -> Vec<(Call, Task)> {
        let mut steps = Vec::new();
        if self.next_due() > now {
            return steps;
        }
        if self.sweep_due <= now {
            self.sweep_due = now + SWEEP;
            self.looked_at = false;
            self.watches.tidy();
            steps.push((
                call(
                    Script::Sweep,
                    vec![number(SWEEP_STEP.unsigned_abs()), Arg::Channel],
                ),
                Task::Sweep,
            ));
        }
        steps.extend(self.watches.tick(now));
        steps
    }

    /// An answer; what has to be called next.
    pub fn reply(&mut self, now: Micros, task: &Task, value: &Value) -> Vec<(Call, Task)> {
        let code = value.items().first().and_then(Value::int);
        match task {
            Task::Keep(key, epoch, again) => match code {
                Some(1) => self.counts.reregistered += u64::from(*again),
                Some(2) => {}
                _ => {
                    self.counts.taken_over += u64::from(*again);
                    self.forget(key, *epoch, false);
                }
            },
            Task::Leave(key, epoch) => self.forget(key, *epoch, true),
            Task::Fetch(service, reading) => {
                self.counts.fetches += 1;
                return self.watches.on_fetch(now, service, *reading, value);
            }
            Task::Sweep => {
                let swept = value.int().unwrap_or(0);
                self.counts.swept += swept.unsigned_abs();
                if swept == SWEEP_STEP {
                    self.looked_at = true;
                    self.sweep_due = now;
                }
            }
            Task::Hand => {}
        }
        Vec::new()
    }

    /// What says goodbye for everything that is registered.
    pub fn farewells(&self) -> Vec<Call> {
        self.bound.values().map(|b| b.deregister.clone()).collect()
    }

    fn forget(&mut self, key: &str, epoch: u64, leaving: bool) {
        // A newer registration of the same id, or a wish that came after this answer was sent for, stays.
        if self
            .bound
            .get(key)
            .is_some_and(|b| b.epoch == epoch && (b.leaving || !leaving))
            && let Some(bound) = self.bound.remove(key)
        {
            self.removed.push(bound.ttl);
        }
    }
}

fn key(service: &str, id: &str) -> String {
    format!("{service}\0{id}")
}

fn text(value: &str) -> Arg {
    Arg::Bytes(Bytes::copy_from_slice(value.as_bytes()))
}

fn number(value: u64) -> Arg {
    Arg::Bytes(Bytes::from(value.to_string()))
}

fn call(script: Script, args: Vec<Arg>) -> Call {
    Call {
        script,
        keys: &REGISTRY_SUFFIXES,
        args,
    }
}
