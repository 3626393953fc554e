//! The services that this process follows: what was asked for, and what has to be read again when.
use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use dotmac_core::lease::Micros;
use dotmac_core::registry::{Entry, Offer, Reading, Verdict, Watch};

use super::{Task, call};
use crate::node::{Arg, Call};
use crate::scripts::Script;
use crate::wire::Value;

/// As long as sessions have to come back to a server that lost its data, and a little more.
const GRACE: Micros = 3_500_000;

#[derive(Debug, Default)]
struct Following {
    watch: Arc<Watch>,
    /// Number of the last call that reads it.
    fetch: u64,
    /// It changed again while that call was on its way.
    again: bool,
    confirm_at: Option<Micros>,
}

/// All watches of this process. One that nobody holds any more is dropped at the next [`Watches::tidy`].
#[derive(Debug)]
pub struct Watches {
    followed: HashMap<String, Following>,
    /// Not later than the earliest `confirm_at`, so that the engine need not look at every watch in each turn.
    confirm_due: Micros,
    /// Picks from watches that were dropped.
    picks_before: u64,
}

impl Default for Watches {
    fn default() -> Self {
        Self {
            followed: HashMap::new(),
            confirm_due: Micros::MAX,
            picks_before: 0,
        }
    }
}

impl Watches {
    /// The watch of a service, followed from now on.
    pub fn watch(&mut self, service: &str) -> Arc<Watch> {
        if let Some(following) = self.followed.get(service) {
            return Arc::clone(&following.watch);
        }
        Arc::clone(&self.followed.entry(service.to_owned()).or_default().watch)
    }

    /// Whether a service is followed.
    pub fn follows(&self, service: &str) -> bool {
        self.followed.contains_key(service)
    }

    /// How many are followed.
    pub fn len(&self) -> usize {
        self.followed.len()
    }

    /// How often an instance was chosen, over all services.
    pub fn picks(&self) -> u64 {
        self.picks_before + self.followed.values().map(|f| f.watch.picks()).sum::<u64>()
    }

    /// Drops what nobody holds any more.
    pub fn tidy(&mut self) {
        let dropped = &mut self.picks_before;
        self.followed.retain(|_, following| {
            let held = Arc::strong_count(&following.watch) > 1;
            if !held {
                *dropped += following.watch.picks();
            }
            held
        });
    }

    /// The call that reads the same service, if there was one.
    pub fn fetching(&self, service: &str) -> Option<u64> {
        self.followed.get(service).map(|f| f.fetch)
    }

    /// The service changed while it is being read.
    pub fn again(&mut self, service: &str) {
        if let Some(following) = self.followed.get_mut(service) {
            following.again = true;
        }
    }

    /// The call that reads it is on its way under this number.
    pub fn sent(&mut self, service: &str, id: u64) {
        if let Some(following) = self.followed.get_mut(service) {
            following.fetch = id;
        }
    }

    /// Everything is read again.
    pub fn fetch_all(&mut self) -> Vec<(Call, Task)> {
        self.tidy();
        let services = self.followed.keys();
        services.map(|s| fetch(s, Reading::First)).collect()
    }

    /// The connection is gone: what is known still serves, and is marked.
    pub fn disconnected(&mut self) {
        for following in self.followed.values_mut() {
            following.watch.mark_stale();
            following.confirm_at = None;
        }
        self.confirm_due = Micros::MAX;
    }

    /// The server announced that a service has this revision.
    pub fn on_change(&self, service: &str, revision: &str) -> Vec<(Call, Task)> {
        match self.followed.get(service) {
            Some(following) if following.watch.is_news(revision) => {
                vec![fetch(service, Reading::First)]
            }
            _ => Vec::new(),
        }
    }

    /// When something has to be read again by itself.
    pub fn next_due(&self) -> Micros {
        self.confirm_due
    }

    /// Reads what is due.
    pub fn tick(&mut self, now: Micros) -> Vec<(Call, Task)> {
        let mut steps = Vec::new();
        if self.confirm_due > now {
            return steps;
        }
        self.confirm_due = Micros::MAX;
        for (service, following) in &mut self.followed {
            match following.confirm_at {
                Some(at) if at <= now => {
                    following.confirm_at = None;
                    steps.push(fetch(service, Reading::Settled));
                }
                Some(at) => self.confirm_due = self.confirm_due.min(at),
                None => {}
            }
        }
        steps
    }

    /// An answer about one service; what has to be read next.
    pub fn on_fetch(
        &mut self,
        now: Micros,
        service: &str,
        reading: Reading,
        value: &Value,
    ) -> Vec<(Call, Task)> {
        let Some(following) = self.followed.get_mut(service) else {
            return Vec::new();
        };
        let mut steps = Vec::new();
        if let [epoch, revision, entries @ ..] = value.items() {
            let offer = Offer {
                epoch: epoch.text().unwrap_or_default(),
                revision: revision.text().unwrap_or_default(),
                entries: entries
                    .iter()
                    .filter_map(Value::text)
                    .map(Entry::from)
                    .collect(),
            };
            match following.watch.offer(&offer, reading) {
                Verdict::Accepted => following.confirm_at = None,
                Verdict::Confirm => steps.push(fetch(service, Reading::Second)),
                Verdict::AfterGrace => {
                    let at = *following.confirm_at.get_or_insert(now + GRACE);
                    self.confirm_due = self.confirm_due.min(at);
                }
            }
        }
        if std::mem::take(&mut following.again) && steps.is_empty() {
            steps.push(fetch(service, Reading::First));
        }
        steps
    }
}

/// The call that reads a service.
pub fn fetch(service: &str, reading: Reading) -> (Call, Task) {
    let name = Arg::Bytes(Bytes::copy_from_slice(service.as_bytes()));
    (
        call(Script::Fetch, vec![name]),
        Task::Fetch(service.to_owned(), reading),
    )
}
