//! Following one service: which answers of the server are believed, and when.
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::record::{Entry, Instance};
use super::snapshot::Snapshot;

/// An answer of the server about one service.
#[derive(Debug, Clone, Default)]
pub struct Offer {
    /// Which life of the server's data it comes from.
    pub epoch: String,
    /// The server's count of changes to the service.
    pub revision: String,
    /// The live instances, in the order of their ids.
    pub entries: Vec<Entry>,
}

/// How an answer came to be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reading {
    /// Because something may have changed.
    First,
    /// To confirm a first one, or after a change of our own: that nothing is left is believed.
    Second,
    /// After the grace of a server that lost its data: whatever it says is believed.
    Settled,
}

/// What became of an offer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is the snapshot now, or the snapshot already said the same.
    Accepted,
    /// It says that everything has gone: read a second time, at once.
    Confirm,
    /// The server lost its data, and others are still registering again: what was known is kept beside what
    /// is new. Read again after the server's grace.
    AfterGrace,
}

/// The snapshot of one service, replaced as a whole.
#[derive(Debug, Default)]
pub struct Watch {
    generation: AtomicU64,
    stale: AtomicBool,
    picks: AtomicU64,
    current: Mutex<Arc<Snapshot>>,
}

impl Watch {
    /// Counts the snapshots; a reader compares it before it looks at anything else.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// The snapshot of now, with a generation that is not newer than it.
    pub fn current(&self) -> (u64, Arc<Snapshot>) {
        let generation = self.generation();
        (
            generation,
            Arc::clone(&self.current.lock().unwrap_or_else(PoisonError::into_inner)),
        )
    }

    /// Whether the snapshot may be out of date, because the server is away or lost its data.
    pub fn is_stale(&self) -> bool {
        self.stale.load(Ordering::Relaxed)
    }

    /// One of its instances was chosen.
    pub fn count_pick(&self) {
        self.picks.fetch_add(1, Ordering::Relaxed);
    }

    /// How often one of its instances was chosen.
    pub fn picks(&self) -> u64 {
        self.picks.load(Ordering::Relaxed)
    }

    /// The server went away: what is known still serves, and is marked.
    pub fn mark_stale(&self) {
        self.stale.store(true, Ordering::Relaxed);
    }

    /// Whether a change announced with this revision is news.
    pub fn is_news(&self, revision: &str) -> bool {
        self.current
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .revision
            != revision
    }

    /// Judges an answer.
    pub fn offer(&self, offer: &Offer, reading: Reading) -> Verdict {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let known = !current.instances.is_empty();
        let lost = known && current.epoch != offer.epoch;
        let gone = known && offer.entries.is_empty();
        let verdict = match reading {
            Reading::First | Reading::Second if lost => Verdict::AfterGrace,
            Reading::First if gone => Verdict::Confirm,
            _ => Verdict::Accepted,
        };
        if verdict == Verdict::Confirm {
            return verdict;
        }
        let next = merge(&current, offer, verdict == Verdict::AfterGrace);
        let same = next.epoch == current.epoch
            && next.revision == current.revision
            && next.instances.len() == current.instances.len()
            && next
                .instances
                .iter()
                .zip(&current.instances)
                .all(|(a, b)| Arc::ptr_eq(a, b));
        if !same {
            *current = Arc::new(next);
            self.generation.fetch_add(1, Ordering::Release);
        }
        self.stale
            .store(verdict == Verdict::AfterGrace, Ordering::Relaxed);
        verdict
    }
}

/// The next snapshot: what is unchanged stays the same object, and load counters stay with their id.
fn merge(current: &Snapshot, offer: &Offer, keep: bool) -> Snapshot {
    let known: HashMap<&str, &Arc<Instance>> = current
        .instances
        .iter()
        .map(|i| (i.record.id.as_str(), i))
        .collect();
    let (mut instances, mut malformed) = (Vec::with_capacity(offer.entries.len()), 0);
    for entry in &offer.entries {
        let decoded = entry.decode(|id| {
            known
                .get(id)
                .map(|i| Arc::clone(&i.load))
                .unwrap_or_default()
        });
        match decoded {
            Ok(new) => match known.get(new.record.id.as_str()) {
                Some(old) if same(old, &new) => instances.push(Arc::clone(old)),
                _ => instances.push(Arc::new(new)),
            },
            Err(_) => malformed += 1,
        }
    }
    // Until the grace is over the old epoch stays: the next answer is judged against it again.
    let epoch = if keep {
        current.epoch.clone()
    } else {
        offer.epoch.clone()
    };
    if keep {
        let new: std::collections::HashSet<String> =
            instances.iter().map(|i| i.record.id.clone()).collect();
        instances.extend(
            current
                .instances
                .iter()
                .filter(|i| !new.contains(&i.record.id))
                .map(Arc::clone),
        );
    }
    instances.sort_by(|a, b| a.record.id.cmp(&b.record.id));
    Snapshot::new(epoch, offer.revision.clone(), instances, malformed)
}

fn same(a: &Instance, b: &Instance) -> bool {
    a.json == b.json && a.status == b.status && a.epoch == b.epoch && a.session == b.session
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
