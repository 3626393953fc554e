//! What can be asked for about locks, as Python says it.

use crate::engine::Owner;
use bytes::Bytes;
use dotmac_core::locks::{Ask, HIGHEST_PRIORITY, Kind, Victim};
use dotmac_engine::node::{Arg, Call, Node};
use dotmac_engine::scripts::{SUFFIXES, Script};
use dotmac_engine::{Engine, clock};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use std::sync::Arc;

/// What is not usual about a request; made once for many.
#[pyclass(frozen, module = "dotmac.platform._native")]
pub struct Asking {
    kind: Kind,
    priority: i16,
    victim: Victim,
    max_hold: Option<u64>,
    offered: Option<u64>,
    numbered: bool,
}

#[pymethods]
impl Asking {
    /// `kind` and `victim` are words of the facade; `max_hold` in seconds; `offered` the fence under which a lock is taken
    /// over, `numbered` where its place in the queue is wanted.
    #[new]
    #[pyo3(signature = (kind, permits, priority, victim, max_hold, offered = None, numbered = false))]
    #[allow(clippy::too_many_arguments)] // Each is a word of one request.
    fn new(
        kind: &str,
        permits: u32,
        priority: i16,
        victim: &str,
        max_hold: Option<f64>,
        offered: Option<u64>,
        numbered: bool,
    ) -> PyResult<Self> {
        let kind = match kind {
            "exclusive" => Kind::Exclusive,
            "shared" => Kind::Shared,
            "semaphore" => Kind::Semaphore(permits),
            other => return Err(PyValueError::new_err(format!("kind {other:?}"))),
        };
        let victim = match victim {
            "youngest" => Victim::Youngest,
            "lowest_priority" => Victim::LowestPriority,
            "fewest_locks" => Victim::FewestLocks,
            "self" => Victim::Closer,
            other => return Err(PyValueError::new_err(format!("victim {other:?}"))),
        };
        Ok(Self {
            kind,
            priority: priority.clamp(-HIGHEST_PRIORITY, HIGHEST_PRIORITY),
            victim,
            max_hold: max_hold.map(micros),
            offered,
            numbered,
        })
    }
}

fn micros(seconds: f64) -> u64 {
    (seconds * 1e6) as u64
}

/// A request as the engine takes it; times in seconds. Without patience it waits for ever, with none left not at all.
pub fn ask(
    name: &str,
    owner: Owner,
    (timeout, fixed, patience): (f64, bool, Option<f64>),
    place: &str,
    unusual: Option<&Asking>,
) -> Ask {
    let mut ask = Ask {
        name: name.into(),
        owner: owner.into(),
        timeout: micros(timeout),
        fixed,
        wait: patience.is_none_or(|patience| patience > 0.0),
        patience: patience.filter(|patience| *patience > 0.0).map(micros),
        since: clock::wall_ms(),
        place: place.into(),
        ..Ask::default()
    };
    if let Some(unusual) = unusual {
        ask.kind = unusual.kind;
        ask.priority = unusual.priority;
        ask.victim = unusual.victim;
        ask.max_hold = unusual.max_hold;
        ask.offered = unusual.offered;
        ask.numbered = unusual.numbered;
    }
    ask
}

/// Where a call goes.
enum At {
    Partition(usize),
    Lock(String),
}

/// Something that administrators want of the server. It can be said twice without harm.
#[pyclass(frozen, module = "dotmac.platform._native")]
pub struct LockCall {
    at: At,
    call: Call,
}

impl LockCall {
    fn made(script: Script, at: At, args: Vec<Arg>) -> Self {
        let keys = &SUFFIXES;
        Self {
            at,
            call: Call { script, keys, args },
        }
    }

    /// The partition that it is for.
    pub fn at<'a>(&self, engine: &'a Engine) -> &'a Arc<Node> {
        match &self.at {
            At::Partition(number) => engine.numbered(*number),
            At::Lock(name) => engine.of(name),
        }
    }

    /// What is to be sent.
    pub fn call(&self) -> Call {
        self.call.clone()
    }
}

fn said(text: &str) -> Arg {
    Arg::Bytes(Bytes::copy_from_slice(text.as_bytes()))
}

#[pymethods]
impl LockCall {
    /// One page of the holders in a partition.
    #[staticmethod]
    fn holders(partition: usize, cursor: &str, count: u32) -> Self {
        let args = vec![said(cursor), said(&count.to_string())];
        Self::made(Script::List, At::Partition(partition), args)
    }

    /// One page of those who wait in a partition.
    #[staticmethod]
    fn waiters(partition: usize, cursor: &str, count: u32) -> Self {
        let args = vec![said(cursor), said(&count.to_string())];
        Self::made(Script::Waits, At::Partition(partition), args)
    }

    /// The holders of one lock.
    #[staticmethod]
    fn holders_of(name: &str) -> Self {
        let args = vec![said("="), said("0"), said(name)];
        Self::made(Script::List, At::Lock(name.to_owned()), args)
    }

    /// The first in the queue of one lock.
    #[staticmethod]
    fn queue_of(name: &str, count: u32) -> Self {
        let args = vec![said("="), said(&count.to_string()), said(name)];
        Self::made(Script::Waits, At::Lock(name.to_owned()), args)
    }

    /// Takes a lock away from the one who holds it under a fence.
    #[staticmethod]
    fn force(name: &str, fence: u64) -> Self {
        let args = vec![said(name), said(&fence.to_string()), Arg::Inbox];
        Self::made(Script::Force, At::Lock(name.to_owned()), args)
    }
}

/// Adds this module's names to `_native`.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Asking>()?;
    module.add_class::<LockCall>()
}
