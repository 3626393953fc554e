//! One process: what the model knows of the engine's own types, in one place.

use super::world::{MS, SECOND};
use crate::Settings;
use crate::node::{Node, State};
use crate::ring::{Ring, Sink};
use crate::transport::Target;
use dotmac_core::lease::{Lease, Micros};
use dotmac_core::locks::{Ask, Kind};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

const REQUEST_TIMEOUT: Micros = 5 * SECOND;

/// What a schedule asks for; times in milliseconds.
#[derive(Debug, Clone, Copy)]
pub struct Wish {
    pub lock: usize,
    pub timeout: u64,
    pub fixed: bool,
    pub wait: bool,
    pub patience: Option<u64>,
    pub owner: usize,
    /// Of the lock: the first is for one or many, the others as their kind says.
    pub shared: bool,
    pub priority: i16,
}

impl Wish {
    /// The same in the engine's words, for an owner of this name.
    pub fn ask(self, owner: &str) -> Ask {
        let kind = match self.lock {
            // Three locks of every schedule: readers and writers, two at once, one.
            0 if self.shared => Kind::Shared,
            1 => Kind::Semaphore(2),
            _ => Kind::Exclusive,
        };
        Ask {
            kind,
            priority: self.priority,
            name: format!("lock{}", self.lock).into(),
            owner: owner.into(),
            timeout: self.timeout * MS,
            fixed: self.fixed,
            wait: self.wait,
            patience: self.patience.map(|p| p * MS),
            ..Ask::default()
        }
    }
}

/// A node that nothing is connected to yet.
pub fn node(session: String, chance: u64) -> Node {
    let settings = Settings {
        target: Target {
            request_timeout: REQUEST_TIMEOUT,
            ..Target::default()
        },
        namespace: String::from("test"),
        session,
        who: String::from("{}"),
        chance,
    };
    Node::new(&settings, 0)
}

/// The handshake with the server's `starts`th process is done.
pub fn connect(state: &mut State, hashes: Vec<bytes::Bytes>, starts: u64) {
    state.connected(None, hashes, format!("run{starts}"));
}

/// A process with its machine.
pub struct Process {
    pub(super) node: Node,
    pub(super) ring: Arc<Ring>,
    /// Answers that are expected for what was sent.
    pub(super) expected: usize,
    pub(super) start: Micros,
    /// Microseconds of its clock per second.
    pub(super) rate: Micros,
    pub(super) paused_until: Micros,
    pub(super) connection: Option<u64>,
    pub(super) tick_at: Micros,
    pub(super) requests: Vec<(u64, u64)>,
    pub(super) leases: Vec<Arc<Lease>>,
    /// Owners that wait in a queue, by token: each waits for one at a time.
    pub(super) busy: BTreeMap<u64, usize>,
    pub(super) refuse: u8,
    /// The life of the server's data that it has last heard of.
    pub(super) heard_of: u64,
    /// Fences that were granted or named on the present connection: only these leases may be extended.
    pub(super) named: BTreeSet<u64>,
}

impl Process {
    /// The `i`th process; another `life` of it is a process of its own.
    pub fn new((i, life): (usize, u64), chance: &mut fastrand::Rng) -> Self {
        let node = node(format!("s{i}x{life}"), chance.u64(..));
        let ring = match Ring::new() {
            Ok(ring) => Arc::new(ring),
            Err(error) => panic!("no descriptor: {error}"),
        };
        node.lock().add_ring(&ring);
        Self {
            node,
            ring,
            expected: 0,
            start: chance.u64(0..1_000 * SECOND),
            rate: chance.u64(996_000..1_004_000),
            paused_until: 0,
            connection: None,
            tick_at: 0,
            requests: Vec::new(),
            leases: Vec::new(),
            busy: BTreeMap::new(),
            refuse: 0,
            heard_of: 0,
            named: BTreeSet::new(),
        }
    }

    /// A sink for the result of a call.
    pub(super) fn sink(&self, token: u64) -> Sink {
        Sink::Ring(self.ring.clone(), token)
    }

    pub(super) fn clock(&self, real: Micros) -> Micros {
        self.start + real * self.rate / SECOND
    }

    pub(super) fn real(&self, clock: Micros) -> Micros {
        let passed = u128::from(clock.saturating_sub(self.start)) * u128::from(SECOND);
        Micros::try_from(passed.div_ceil(u128::from(self.rate))).unwrap_or(Micros::MAX)
    }
}
