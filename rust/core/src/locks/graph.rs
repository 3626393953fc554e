//! Who waits for whom, collected over partitions: what is stuck, in which cycle, and who has to give up.
//!
//! A request waits for all holders of its lock, and for any one of a semaphore's. One reading of several partitions may
//! show edges that never existed at the same time; what two readings have in [common](Graph::common) did.

#[cfg(test)]
mod tests;

use super::Victim;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;

/// Somebody holds a lock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holding {
    /// Who.
    pub owner: Arc<str>,
    /// Its fencing token.
    pub fence: u64,
    /// When it was asked for, wall-clock milliseconds.
    pub since: u64,
    /// Where in the code it was asked for.
    pub place: Arc<str>,
}

/// A lock that somebody waits for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Taken {
    /// How many may hold it, where it is a semaphore.
    pub permits: Option<usize>,
    /// Its holders.
    pub by: Vec<Holding>,
}

/// A request that waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wait {
    /// Its number, with its session.
    pub request: Arc<str>,
    /// What it waits for.
    pub lock: Arc<str>,
    /// Who asks, and who awaits that one.
    pub owners: Vec<Arc<str>>,
    /// Less for a higher priority.
    pub order: u32,
    /// Leases that its owner has.
    pub held: u32,
    /// Who shall give up, if it is up to this one.
    pub victim: Victim,
    /// Its process, as JSON.
    pub process: Arc<str>,
    /// Where in the code it was asked for.
    pub place: Arc<str>,
}

/// What was read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Graph {
    locks: BTreeMap<Arc<str>, Taken>,
    waits: BTreeMap<Arc<str>, Wait>,
}

/// One step of a cycle.
#[derive(Debug, Clone, Copy)]
pub struct Edge<'a> {
    /// The request that waits.
    pub wait: &'a Wait,
    /// Which of its owners holds what the one before waits for.
    pub waiter: &'a str,
    /// Who holds what it waits for.
    pub by: &'a Holding,
}

impl Graph {
    /// A lock and its holders.
    pub fn add_lock(&mut self, name: Arc<str>, taken: Taken) {
        self.locks.insert(name, taken);
    }

    /// A request that waits.
    pub fn add_wait(&mut self, wait: Wait) {
        self.waits.insert(wait.request.clone(), wait);
    }

    /// It waits no more.
    pub fn remove(&mut self, request: &str) {
        self.waits.remove(request);
    }

    /// Everybody who holds something.
    pub fn holders(&self) -> impl Iterator<Item = &Arc<str>> {
        self.locks
            .values()
            .flat_map(|taken| taken.by.iter().map(|by| &by.owner))
    }

    /// What was there the whole time from this reading to a later one: requests that wait under the same number, leases
    /// with the same fence. A semaphore that changed hands meanwhile had a permit to give.
    #[must_use]
    pub fn common(&self, later: &Self) -> Self {
        let mut both = Self::default();
        for (name, before) in &self.locks {
            let Some(after) = later.locks.get(name) else {
                continue;
            };
            // An offered lease keeps its fence, under another owner.
            let known: HashSet<_> = before.by.iter().map(|by| (by.fence, &by.owner)).collect();
            let stayed = |by: &&Holding| known.contains(&(by.fence, &by.owner));
            let by: Vec<Holding> = after.by.iter().filter(stayed).cloned().collect();
            let whole = by.len() == before.by.len() && by.len() == after.by.len();
            if before.permits == after.permits && (whole || before.permits.is_none()) {
                let permits = before.permits;
                both.add_lock(name.clone(), Taken { permits, by });
            }
        }
        for (request, wait) in &later.waits {
            if let Some(before) = self.waits.get(request)
                && before.lock == wait.lock
            {
                let mut wait = wait.clone();
                wait.owners.retain(|owner| before.owners.contains(owner));
                both.add_wait(wait);
            }
        }
        both
    }

    /// Takes out whoever can go on until nobody is left who can (Holt 1972, "Some deadlock properties of computer
    /// systems").
    pub fn stuck(&self) -> Stuck<'_> {
        let mut owners: HashMap<&str, Owner<'_>> = HashMap::new();
        let mut waiting: HashMap<&str, Vec<&Wait>> = HashMap::new();
        // Of each lock: how many of its holders are stuck.
        let mut blocked: HashMap<&str, usize> = HashMap::new();
        for (name, taken) in &self.locks {
            if taken.by.len() >= taken.permits.unwrap_or(1) {
                blocked.insert(name, taken.by.len());
            }
            for by in &taken.by {
                owners.entry(&by.owner).or_default().holds.push(name);
            }
        }
        for wait in self.waits.values() {
            if blocked.contains_key(&*wait.lock) {
                waiting.entry(&wait.lock).or_default().push(wait);
                for owner in &wait.owners {
                    owners.entry(owner).or_default().waits.push(wait);
                }
            }
        }
        for owner in owners.values_mut() {
            owner.blocked = owner.waits.len();
        }
        let mut free: Vec<&str> = owners
            .iter()
            .filter(|(_, owner)| owner.blocked == 0)
            .map(|(name, _)| *name)
            .collect();
        while let Some(name) = free.pop() {
            let holds = owners
                .get_mut(name)
                .map(|owner| std::mem::take(&mut owner.holds))
                .unwrap_or_default();
            for lock in holds {
                let Some(left) = blocked.get_mut(lock) else {
                    continue;
                };
                *left -= 1;
                let any = self
                    .locks
                    .get(lock)
                    .is_some_and(|taken| taken.permits.is_some());
                if *left > 0 && !any {
                    continue;
                }
                blocked.remove(lock);
                for owner in waiting
                    .remove(lock)
                    .into_iter()
                    .flatten()
                    .flat_map(owners_of)
                {
                    if let Some(owner_of) = owners.get_mut(owner) {
                        owner_of.blocked -= 1;
                        if owner_of.blocked == 0 {
                            free.push(owner);
                        }
                    }
                }
            }
        }
        let waits = owners
            .into_iter()
            .filter(|(_, owner)| owner.blocked > 0)
            .map(|(name, owner)| (name, owner.waits))
            .collect();
        let blocked = blocked.into_keys().collect();
        Stuck {
            graph: self,
            blocked,
            waits,
        }
    }
}

fn owners_of(wait: &Wait) -> impl Iterator<Item = &str> {
    wait.owners.iter().map(|owner| &**owner)
}

#[derive(Debug, Default)]
struct Owner<'a> {
    waits: Vec<&'a Wait>,
    holds: Vec<&'a str>,
    /// How many of the waits can't end.
    blocked: usize,
}

/// Those who can't go on.
#[derive(Debug)]
pub struct Stuck<'a> {
    graph: &'a Graph,
    /// Locks that nobody will get.
    blocked: HashSet<&'a str>,
    /// By owner: what it waits for.
    waits: HashMap<&'a str, Vec<&'a Wait>>,
}

impl<'a> Stuck<'a> {
    /// The request, if it can't be granted any more.
    fn request(&self, request: &str) -> Option<&'a Wait> {
        let wait = self.graph.waits.get(request)?;
        self.blocked.contains(&*wait.lock).then_some(wait)
    }

    fn holders(&self, wait: &Wait) -> impl Iterator<Item = &'a Holding> {
        let taken = self.graph.locks.get(&wait.lock);
        taken
            .into_iter()
            .flat_map(|taken| &taken.by)
            .filter(|by| self.waits.contains_key(&*by.owner))
    }

    /// What else is stuck and keeps it so; the request first. Empty if it can be granted some day.
    pub fn support(&self, request: &str) -> Vec<&'a Wait> {
        let mut found: Vec<&Wait> = self.request(request).into_iter().collect();
        let mut known: BTreeSet<&str> = found.iter().map(|wait| &*wait.request).collect();
        let (mut locks, mut at) = (HashSet::new(), 0);
        while let Some(wait) = found.get(at).copied() {
            at += 1;
            if !locks.insert(&*wait.lock) {
                continue;
            }
            for by in self.holders(wait) {
                for next in self.waits.get(&*by.owner).into_iter().flatten() {
                    if self.blocked.contains(&*next.lock) && known.insert(&next.request) {
                        found.push(next);
                    }
                }
            }
        }
        found
    }

    /// A shortest cycle through the request, which comes first. Nothing if it can be granted some day, or only waits for
    /// others that are in a cycle.
    pub fn cycle(&self, request: &str) -> Option<Vec<Edge<'a>>> {
        let first = self.request(request)?;
        // How each request was come to: the step before, and the holder there.
        let mut steps: Vec<(&Wait, Option<(usize, &Holding)>)> = vec![(first, None)];
        let (mut known, mut locks) = (HashSet::new(), HashSet::new());
        let mut queue = VecDeque::from([0]);
        while let Some(at) = queue.pop_front() {
            let wait = steps[at].0;
            if !locks.insert(&*wait.lock) {
                continue;
            }
            if let Some(last) = self
                .holders(wait)
                .find(|by| first.owners.contains(&by.owner))
            {
                return Some(back(&steps, at, last));
            }
            for by in self.holders(wait) {
                if !known.insert(&*by.owner) {
                    continue;
                }
                for next in self.waits.get(&*by.owner).into_iter().flatten() {
                    if self.blocked.contains(&*next.lock) {
                        queue.push_back(steps.len());
                        steps.push((next, Some((at, by))));
                    }
                }
            }
        }
        None
    }
}

/// The way that led to a step, whose lock `last` holds.
fn back<'a>(
    steps: &[(&'a Wait, Option<(usize, &'a Holding)>)],
    mut at: usize,
    last: &'a Holding,
) -> Vec<Edge<'a>> {
    let (mut cycle, mut by) = (Vec::new(), last);
    loop {
        let (wait, before) = steps[at];
        let waiter = before.map_or(&*last.owner, |(_, holding)| &*holding.owner);
        cycle.push(Edge { wait, waiter, by });
        let Some((earlier, holding)) = before else {
            break;
        };
        (at, by) = (earlier, holding);
    }
    cycle.reverse();
    cycle
}

/// Who of a cycle has to give up: whoever sees it comes to the same one. Each of them holds the lock that the one before
/// waits for, and whoever asked for that last is the youngest: fences of different partitions are in no order of time. That
/// one's own rule decides, for each may have another; where
/// it says that whoever closes a cycle gives up, it is itself, as nobody knows who came last.
pub fn victim<'a>(cycle: &[Edge<'a>]) -> Option<&'a Wait> {
    let before = cycle.iter().cycle().skip(cycle.len().saturating_sub(1));
    let members: Vec<(&Wait, (u64, u64))> = cycle
        .iter()
        .zip(before)
        .map(|(edge, before)| (edge.wait, (before.by.since, before.by.fence)))
        .collect();
    let age = |(wait, age): &(&'a Wait, (u64, u64))| (*age, &wait.request);
    let youngest = members.iter().max_by_key(|member| age(member))?.0;
    let chosen = match youngest.victim {
        Victim::Youngest | Victim::Closer => return Some(youngest),
        Victim::LowestPriority => members
            .iter()
            .max_by_key(|member| (member.0.order, age(member))),
        Victim::FewestLocks => members
            .iter()
            .max_by_key(|member| (Reverse(member.0.held), age(member))),
    };
    chosen.map(|member| member.0)
}

/// A cycle in words, as [`Event::Deadlock`](super::Event::Deadlock) has it.
pub fn rows(cycle: &[Edge<'_>]) -> Vec<String> {
    cycle
        .iter()
        .flat_map(|edge| {
            let wait = edge.wait;
            [
                &*wait.lock,
                edge.waiter,
                &*wait.process,
                &*wait.place,
                &*edge.by.owner,
                &*edge.by.place,
            ]
        })
        .map(str::to_owned)
        .collect()
}
