//! All partitions of one engine. Those of a cluster begin when they are first used, each with a connection of its own.

use crate::chase::{self, Waits};
use crate::cluster::Cluster;
use crate::driver;
use crate::guide::Guide;
use crate::node::{Counts, Node, State};
use crate::ring::Ring;
use crate::sentinels::Sentinels;
use crate::{Settings, node, registry};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::{JoinError, JoinSet};

const DEFECT: &str = "the engine thread has failed; this is a defect of dotmac-platform";

/// More would not be told apart by the numbers of their requests in every language that may read them.
pub const MOST: usize = 1 << (53 - node::REQUESTS);

/// What partitions that begin later have to know.
struct Cradle {
    /// Where the engine's thread hears of them; nothing when it shall end.
    births: Option<UnboundedSender<Arc<Node>>>,
    /// The thread has failed.
    failed: bool,
    rings: Vec<Weak<Ring>>,
}

/// What was counted, over all partitions in use.
#[derive(Debug, Clone, Default)]
pub struct Stats {
    /// Partitions in use.
    pub partitions: usize,
    /// All of them are connected, their sessions confirmed.
    pub open: bool,
    /// Name of the session with the first one.
    pub session: String,
    /// Leases held.
    pub held: usize,
    /// Releases and cancellations that were not answered.
    pub unanswered: usize,
    /// What the engine counts.
    pub counts: Counts,
    /// What the registry counts.
    pub registry: registry::Counts,
    /// Instances kept registered.
    pub registered: usize,
    /// Services followed.
    pub followed: usize,
    /// Times that an instance was chosen.
    pub picks: u64,
}

impl Stats {
    /// Adds a partition.
    pub fn add(&mut self, state: &State) {
        if self.partitions == 0 {
            self.open = true;
            self.session = state.client.session.sid();
        }
        self.partitions += 1;
        self.open &= state.open();
        self.held += state.client.held();
        self.unanswered += state.client.unanswered();
        let (counts, registry) = (&state.counts, &state.registry);
        self.counts.heartbeats += counts.heartbeats;
        self.counts.late_heartbeats += counts.late_heartbeats;
        self.counts.losses += counts.losses;
        self.counts.connections += counts.connections;
        self.counts.sessions += counts.sessions;
        self.registry.reregistered += registry.counts.reregistered;
        self.registry.taken_over += registry.counts.taken_over;
        self.registry.fetches += registry.counts.fetches;
        self.registry.swept += registry.counts.swept;
        self.registered += registry.registered();
        self.followed += registry.followed();
        self.picks += registry.picks();
    }
}

/// The partitions.
pub struct Partitions {
    settings: Settings,
    nodes: Box<[OnceLock<Arc<Node>>]>,
    /// Requests that wait, where a cycle may go over several partitions.
    waits: Option<Arc<Waits>>,
    cradle: Mutex<Cradle>,
}

impl Partitions {
    /// The first one begins at once: in a cluster it keeps the number of all.
    pub fn new(settings: &Settings) -> (Arc<Self>, UnboundedReceiver<Arc<Node>>) {
        let (births, born) = unbounded_channel();
        let count = if settings.target.clustered() {
            settings.target.partitions.clamp(1, MOST)
        } else {
            1
        };
        let partitions = Self {
            settings: settings.clone(),
            nodes: (0..count).map(|_| OnceLock::new()).collect(),
            waits: (count > 1).then(Arc::default),
            cradle: Mutex::new(Cradle {
                births: Some(births),
                failed: false,
                rings: Vec::new(),
            }),
        };
        partitions.node(0);
        (Arc::new(partitions), born)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.nodes.len()
    }

    /// One of them, begun if it was not.
    pub fn node(&self, partition: usize) -> &Arc<Node> {
        let place = &self.nodes[partition];
        if let Some(node) = place.get() {
            return node;
        }
        // Held until it can be seen by those who close all, or add a ring to each.
        let cradle = self.cradle();
        place.get_or_init(|| {
            let node = Arc::new(Node::new(&self.settings, partition));
            let mut state = node.lock();
            state.tell_waits(self.waits.as_ref());
            for ring in cradle.rings.iter().filter_map(Weak::upgrade) {
                state.add_ring(&ring);
            }
            if let Some(births) = &cradle.births {
                // Whoever would receive it goes on as long as it can be sent.
                let _ = births.send(node.clone());
            } else {
                if cradle.failed {
                    state.denied(DEFECT);
                }
                state.close();
            }
            drop(state);
            node
        })
    }

    /// Those that were begun.
    pub fn begun(&self) -> impl Iterator<Item = &Arc<Node>> {
        self.nodes.iter().filter_map(OnceLock::get)
    }

    /// Results for this loop, and losses, go to `ring`, from partitions that begin later too.
    pub fn add_ring(&self, ring: &Arc<Ring>) {
        let mut cradle = self.cradle();
        cradle.rings.retain(|known| known.strong_count() > 0);
        cradle.rings.push(Arc::downgrade(ring));
        for node in self.begun() {
            node.lock().add_ring(ring);
        }
    }

    /// Begins the end of all of them.
    pub fn close(&self) {
        let mut cradle = self.cradle();
        cradle.births = None;
        for node in self.begun() {
            let mut state = node.lock();
            state.close();
            let _ = node.settle(state, true);
            node.notify.notify_one();
        }
    }

    /// The thread has failed: nobody is to wait for it.
    pub fn failed(&self) {
        let mut cradle = self.cradle();
        cradle.births = None;
        cradle.failed = true;
        for node in self.begun() {
            let mut state = node.lock();
            state.denied(DEFECT);
            state.close();
            let wake = state.take_wake();
            drop(state);
            for ring in wake {
                ring.signal();
            }
        }
    }

    /// The engine's thread: ends when it was closed and everything is said.
    pub async fn drive(self: &Arc<Self>, mut births: UnboundedReceiver<Arc<Node>>) {
        let target = &self.settings.target;
        let (mut tasks, mut asking) = (JoinSet::new(), JoinSet::new());
        let cluster = target
            .clustered()
            .then(|| Cluster::follow(target, &self.settings.namespace, &mut asking));
        if let Some(waits) = &self.waits {
            asking.spawn(chase::run(self.clone(), waits.clone()));
        }
        let mut closing = false;
        loop {
            tokio::select! {
                born = births.recv(), if !closing => match born {
                    Some(node) => {
                        let slot = cluster.as_ref().map(|cluster| cluster.slot(node.partition));
                        tasks.spawn(async move {
                            let guide = match slot {
                                Some(slot) => Guide::Slot(slot),
                                None => Sentinels::follow(&node.target)
                                    .map_or(Guide::Target, Guide::Sentinels),
                            };
                            driver::run(&node, guide).await;
                        });
                    }
                    None => closing = true,
                },
                Some(ended) = tasks.join_next() => go_on(ended),
                Some(ended) = asking.join_next() => go_on(ended),
                else => break,
            }
            if closing && tasks.is_empty() {
                break;
            }
        }
    }

    fn cradle(&self) -> MutexGuard<'_, Cradle> {
        self.cradle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A defect of ours is the engine's to report, not to go on without that task.
fn go_on(ended: Result<(), JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        std::panic::resume_unwind(error.into_panic());
    }
}
