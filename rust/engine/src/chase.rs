//! Cycles of waiters over several partitions of a cluster.
//!
//! The script that enters a request into a queue sees its own partition only. So the engine of whoever waits for longer
//! than a moment chases: it notes in partition 0 that it waits, reads who holds what it waits for, asks partition 0 where
//! these wait, reads there, and so on, until nobody new is met. Whoever notes its wait last meets all others of a cycle,
//! so that none is missed; stale notes only cost a look. What was read at different times may never have been true
//! at once: what looks like a cycle is read a second time, and counts as far as nothing of it has changed. Then the one
//! that all who see it choose has to give up.
//!
//! What can't be read in time is left out, which can hide a cycle until the next try but never make one.

mod reading;

use crate::node::chased::Waiting;
use crate::node::{Arg, Call, REQUESTS};
use crate::partitions::Partitions;
use crate::ring::Sink;
use crate::scripts::{NOTES_SUFFIXES, SUFFIXES, Script};
use crate::wire::Value;
use crate::{Outcome, clock};
use bytes::Bytes;
use dotmac_core::lease::Micros;
use dotmac_core::locks::graph::{self, Graph, Wait};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::sync::mpsc::unbounded_channel;
use tokio::time::{Instant, sleep, timeout, timeout_at};

/// Times from one try to the next, the first from when the request began to wait; the last one goes on.
const PAUSES: [Micros; 9] = [
    20_000, 30_000, 50_000, 100_000, 200_000, 400_000, 800_000, 1_600_000, 2_000_000,
];
/// Requests that one pass starts from.
const TOGETHER: usize = 500;
/// Owners that one pass follows.
const OWNERS: usize = 10_000;
/// Notes to take back that are remembered; others are swept on the server some time later.
const STALE: usize = 10_000;
/// For the answers of one round.
const ROUND: Duration = Duration::from_secs(1);
/// For a whole pass.
const PASS: Duration = Duration::from_secs(5);
/// Between two passes, at least; else for as long as the last one took.
const REST: Duration = Duration::from_millis(20);
/// Who is due within this time goes with a pass that begins.
const NEAR: Micros = 5_000;

/// Requests that have come to wait.
#[derive(Debug, Default)]
pub struct Waits {
    fresh: Mutex<Vec<u64>>,
    notify: Notify,
}

impl Waits {
    /// One more.
    pub fn add(&self, request: u64) {
        let mut fresh = self.fresh.lock().unwrap_or_else(PoisonError::into_inner);
        fresh.push(request);
        if fresh.len() == 1 {
            self.notify.notify_one();
        }
    }

    fn take(&self) -> Vec<u64> {
        std::mem::take(&mut self.fresh.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// When which request is chased next.
#[derive(Debug, Default)]
struct Schedule {
    due: BTreeSet<(Micros, u64)>,
    /// How often each was.
    tries: HashMap<u64, usize>,
}

impl Schedule {
    fn add(&mut self, now: Micros, id: u64) {
        // One that is asked again, after a reconnection, is told again.
        if let std::collections::hash_map::Entry::Vacant(place) = self.tries.entry(id) {
            place.insert(0);
            self.due.insert((now + PAUSES[0], id));
        }
    }

    fn next(&self) -> Option<Micros> {
        self.due.first().map(|(at, _)| *at)
    }

    fn take(&mut self, now: Micros) -> Option<u64> {
        let (at, id) = *self.due.first()?;
        (at <= now).then(|| {
            self.due.pop_first();
            id
        })
    }

    fn again(&mut self, now: Micros, id: u64) {
        let tries = self.tries.entry(id).or_default();
        *tries += 1;
        let pause = PAUSES[(*tries).min(PAUSES.len() - 1)];
        self.due.insert((now + pause, id));
    }

    fn forget(&mut self, id: u64) {
        self.tries.remove(&id);
    }
}

/// Chases until it is dropped.
pub async fn run(partitions: Arc<Partitions>, waits: Arc<Waits>) {
    let chaser = Chaser { partitions };
    let mut schedule = Schedule::default();
    let mut noted: HashMap<u64, Vec<String>> = HashMap::new();
    let mut stale: Vec<String> = Vec::new();
    loop {
        let now = clock::now();
        for id in waits.take() {
            schedule.add(now, id);
        }
        match schedule.next() {
            Some(at) if at <= now => {}
            Some(at) => {
                tokio::select! {
                    () = sleep(clock::until(at)) => {}
                    () = waits.notify.notified() => {}
                }
                continue;
            }
            None => {
                waits.notify.notified().await;
                continue;
            }
        }
        let mut own = Vec::new();
        while own.len() < TOGETHER
            && let Some(id) = schedule.take(now + NEAR)
        {
            if let Some(waiting) = chaser.waiting(id) {
                noted.insert(id, notes(&waiting));
                own.push(waiting);
                schedule.again(now, id);
            } else {
                schedule.forget(id);
                stale.extend(noted.remove(&id).into_iter().flatten());
            }
        }
        stale.truncate(STALE);
        if own.is_empty() && stale.is_empty() {
            continue;
        }
        let begun = Instant::now();
        if let Ok(Some(())) = timeout(PASS, chaser.pass(&own, &stale)).await {
            stale.clear();
        }
        sleep(begun.elapsed().max(REST)).await;
    }
}

/// What partition 0 is told of a request that waits.
fn notes(waiting: &Waiting) -> Vec<String> {
    let note = |owner: &String| format!("{owner}\0{}", waiting.request);
    waiting.owners.iter().map(note).collect()
}

/// The partition that a request's number names.
fn partition_of(request: &str) -> Option<usize> {
    let number: u64 = request.rsplit_once(':')?.1.parse().ok()?;
    usize::try_from(number >> REQUESTS).ok()
}

fn texts<'a>(texts: impl IntoIterator<Item = &'a str>) -> Vec<Arg> {
    let arg = |text: &str| Arg::Bytes(Bytes::copy_from_slice(text.as_bytes()));
    texts.into_iter().map(arg).collect()
}

/// Owners by the partition in which they are to be looked for.
type Asked = BTreeMap<usize, BTreeSet<Arc<str>>>;

struct Chaser {
    partitions: Arc<Partitions>,
}

impl Chaser {
    fn waiting(&self, id: u64) -> Option<Waiting> {
        let partition = usize::try_from(id >> REQUESTS).ok()?;
        let node = self.partitions.node(partition);
        node.lock().waiting_request(id)
    }

    /// Looks for cycles through these requests of ours, and ends them. Nothing where partition 0 did not answer.
    async fn pass(&self, own: &[Waiting], stale: &[String]) -> Option<()> {
        let graph = self.collect(own, stale).await?;
        let mut again = Asked::new();
        {
            let (stuck, mut covered) = (graph.stuck(), HashSet::new());
            for waiting in own {
                if covered.contains(&*waiting.request) || stuck.cycle(&waiting.request).is_none() {
                    continue;
                }
                for wait in stuck.support(&waiting.request) {
                    covered.insert(&*wait.request);
                    if let (Some(at), Some(owner)) =
                        (partition_of(&wait.request), wait.owners.first())
                    {
                        again.entry(at).or_default().insert(owner.clone());
                    }
                }
                tokio::task::yield_now().await;
            }
        }
        if again.is_empty() {
            return Some(());
        }
        let mut later = Graph::default();
        self.read(&mut later, &again).await;
        let mut both = graph.common(&later);
        for waiting in own {
            while let Some((loser, cycle)) = loser(&both, &waiting.request) {
                self.end(&loser, &cycle).await;
                both.remove(&loser.request);
            }
            tokio::task::yield_now().await;
        }
        Some(())
    }

    /// Everybody on whom these requests depend, as far as they wait themselves.
    async fn collect(&self, own: &[Waiting], stale: &[String]) -> Option<Graph> {
        let mut asked = Asked::new();
        for waiting in own {
            if let (Some(at), Some(owner)) =
                (partition_of(&waiting.request), waiting.owners.first())
            {
                asked.entry(at).or_default().insert(owner.as_str().into());
            }
        }
        // Noted before anybody else is looked for, or two who come at the same time might miss each other.
        let told: Vec<String> = own.iter().flat_map(notes).collect();
        let count = told.len().to_string();
        let lines = std::iter::once(&count).chain(&told).chain(stale);
        let note = Call {
            script: Script::ChaseNote,
            keys: &NOTES_SUFFIXES,
            args: texts(lines.map(String::as_str)),
        };
        let mut graph = Graph::default();
        let (noted, ()) = tokio::join!(self.ask(vec![(0, note)]), self.read(&mut graph, &asked));
        noted.into_iter().next().flatten()?;
        let mut met: HashSet<Arc<str>> = HashSet::new();
        loop {
            let new: Vec<Arc<str>> = graph
                .holders()
                .filter(|owner| met.insert((*owner).clone()))
                .cloned()
                .collect();
            if new.is_empty() || met.len() > OWNERS {
                return Some(graph);
            }
            let next = self.find(&new, &mut asked).await?;
            self.read(&mut graph, &next).await;
        }
    }

    /// Where these owners wait, as far as they were not asked for there.
    async fn find(&self, owners: &[Arc<str>], asked: &mut Asked) -> Option<Asked> {
        let call = Call {
            script: Script::ChaseFind,
            keys: &NOTES_SUFFIXES[..1],
            args: texts(owners.iter().map(|owner| &**owner)),
        };
        let found = self
            .ask(vec![(0, call)])
            .await
            .into_iter()
            .next()
            .flatten()?;
        let mut next = Asked::new();
        for note in found.items().iter().filter_map(Value::text) {
            if let Some((owner, request)) = note.split_once('\0')
                && let Some(at) = partition_of(request)
                && at < self.partitions.count()
            {
                let owner: Arc<str> = owner.into();
                if asked.entry(at).or_default().insert(owner.clone()) {
                    next.entry(at).or_default().insert(owner);
                }
            }
        }
        Some(next)
    }

    /// Adds what these owners wait for, and who holds that.
    async fn read(&self, graph: &mut Graph, asked: &Asked) {
        let call = |owners: &BTreeSet<Arc<str>>| Call {
            script: Script::Chase,
            keys: &SUFFIXES,
            args: texts(owners.iter().map(|owner| &**owner)),
        };
        let calls = asked.iter().map(|(at, owners)| (*at, call(owners)));
        for answer in self.ask(calls.collect()).await.into_iter().flatten() {
            reading::add(graph, &answer);
        }
    }

    /// The answers to calls of these partitions, as far as they come in time.
    async fn ask(&self, calls: Vec<(usize, Call)>) -> Vec<Option<Value>> {
        let (sender, mut answers) = unbounded_channel();
        let mut values: Vec<Option<Value>> = Vec::new();
        for (number, (partition, call)) in calls.into_iter().enumerate() {
            let node = self.partitions.node(partition);
            let mut state = node.lock();
            state.call(call, Sink::Task(sender.clone(), number));
            node.settle(state, true);
            values.push(None);
        }
        drop(sender);
        let end = Instant::now() + ROUND;
        while let Ok(Some((number, outcome))) = timeout_at(end, answers.recv()).await {
            if let Outcome::Reply(value) = outcome {
                values[number] = Some(value);
            }
        }
        values
    }

    /// False if it is not one of ours that waits.
    fn end_here(&self, partition: usize, request: &str, cycle: &[String]) -> bool {
        let node = self.partitions.node(partition);
        let mut state = node.lock();
        let ended = state.give_up(request, cycle);
        node.settle(state, true);
        ended
    }

    /// Ends the wait of a request, ours or another's. If it has ended meanwhile, nothing happens.
    async fn end(&self, loser: &Wait, cycle: &[String]) {
        let Some(partition) = partition_of(&loser.request) else {
            return;
        };
        if self.end_here(partition, &loser.request, cycle) {
            return;
        }
        let cells = cycle.iter().map(String::as_str);
        let mut args = texts([&*loser.request, &*loser.lock].into_iter().chain(cells));
        args.push(Arg::Inbox);
        let call = Call {
            script: Script::ChaseEnd,
            keys: &SUFFIXES,
            args,
        };
        self.ask(vec![(partition, call)]).await;
    }
}

/// Who has to give up in a cycle through the request, and the cycle in words.
fn loser(graph: &Graph, request: &str) -> Option<(Wait, Vec<String>)> {
    let cycle = graph.stuck().cycle(request)?;
    let loser = graph::victim(&cycle)?;
    Some((loser.clone(), graph::rows(&cycle)))
}
