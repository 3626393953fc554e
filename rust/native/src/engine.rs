//! The engine for Python: starting and closing it, and the calls of blocked threads.

use crate::balance::Service;
use crate::lease::LeaseHandle;
use crate::locks::{Asking, LockCall, ask};
use crate::outcome;
use crate::registry::RegistryRequest;
use crate::target;
use dotmac_engine::node::{Node, State};
use dotmac_engine::ring::{Parker, Sink};
use dotmac_engine::{Engine, Outcome, Settings, process};
use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A blocked thread looks for signals this often.
const SIGNALS: Duration = Duration::from_millis(50);

/// An engine and the process that it belongs to.
#[pyclass(name = "Engine", frozen, module = "dotmac.platform._native")]
pub struct EngineHandle {
    engine: Engine,
    /// How many releases that nobody waited for have failed.
    pub failed_releases: Arc<AtomicU64>,
}

/// Who asks for a lock: a task by its number, or anything else by its name.
pub enum Owner {
    /// Written in hexadecimal.
    Task(u64),
    /// As it is.
    Named(String),
}

impl<'py> FromPyObject<'_, 'py> for Owner {
    type Error = PyErr;

    fn extract(given: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        // Not by trying one after the other: a failed attempt costs more than all the rest.
        match given.cast::<PyString>() {
            Ok(name) => Ok(Self::Named(name.to_cow()?.into_owned())),
            Err(_) => Ok(Self::Task(given.extract()?)),
        }
    }
}

impl From<Owner> for Arc<str> {
    fn from(owner: Owner) -> Self {
        match owner {
            Owner::Task(number) => hexadecimal(number, &mut [0; 16]).into(),
            Owner::Named(name) => name.into(),
        }
    }
}

/// Refuses a use in another process than the one that made the object.
pub fn check_process(py: Python<'_>, made_in: u32) -> PyResult<()> {
    let here = process::id();
    if here == made_in {
        return Ok(());
    }
    let text = format!(
        "this object belongs to process {made_in} and was used in its forked child {here}; make locks, registries and \
         sessions after the fork, or use the manager, which starts anew in the child"
    );
    Err(outcome::error(py, "ForkedHandle", &text))
}

impl EngineHandle {
    /// The engine, if this is the process that it belongs to.
    pub fn engine(&self, py: Python<'_>) -> PyResult<&Engine> {
        check_process(py, self.engine.pid)?;
        Ok(&self.engine)
    }

    /// Submits from a thread that then waits, without the interpreter, for the result.
    fn wait(
        &self,
        py: Python<'_>,
        at: impl FnOnce(&Engine) -> &Arc<Node>,
        submit: impl FnOnce(&mut State, Sink) -> Option<u64>,
    ) -> PyResult<Outcome> {
        let node = at(self.engine(py)?);
        let parker = Arc::new(Parker::default());
        let mut state = node.lock();
        let request = submit(&mut state, Sink::Parker(parker.clone()));
        node.settle(state, true);
        loop {
            if let Some(outcome) = py.detach(|| parker.wait(SIGNALS)) {
                return Ok(outcome);
            }
            if let Err(interrupt) = py.check_signals() {
                Self::abandon(node, &parker, request);
                return Err(interrupt);
            }
        }
    }

    /// The thread was interrupted: what it asked for is withdrawn, and given back if it came after all.
    fn abandon(node: &Node, parker: &Parker, request: Option<u64>) {
        let mut state = node.lock();
        if let Some(request) = request {
            state.cancel(request);
        }
        node.settle(state, true);
        if let Some(Outcome::Granted(lease)) = parker.wait(Duration::ZERO) {
            let mut state = node.lock();
            state.drop_lease(&lease);
            node.settle(state, true);
        }
    }
}

#[pymethods]
impl EngineHandle {
    /// Starts the engine's thread.
    #[new]
    #[pyo3(signature = (target, *, namespace, session, who, chance))]
    fn new(
        target: &Bound<'_, PyDict>,
        namespace: String,
        session: String,
        who: String,
        chance: u64,
    ) -> PyResult<Self> {
        let settings = Settings {
            target: target::read(target)?,
            namespace,
            session,
            who,
            chance,
        };
        let engine = Engine::start(&settings).map_err(|e| PyOSError::new_err(e.to_string()))?;
        Ok(Self {
            engine,
            failed_releases: Arc::default(),
        })
    }

    /// Process that the engine belongs to.
    #[getter]
    fn pid(&self) -> u32 {
        self.engine.pid
    }

    /// How many partitions there are: one, unless it is the engine of a cluster.
    #[getter]
    fn partitions(&self) -> usize {
        self.engine.count()
    }

    /// Gives everything back and ends the thread; true if the server heard all of it within `limit` seconds.
    fn close(&self, py: Python<'_>, limit: f64) -> PyResult<bool> {
        self.engine(py)?;
        let limit =
            Duration::try_from_secs_f64(limit).map_err(|e| PyValueError::new_err(e.to_string()))?;
        Ok(py.detach(|| self.engine.close(limit)))
    }

    /// Asks for a lock and waits; a `Lease`, or a tuple of what happened instead. Times in seconds.
    #[pyo3(signature = (name, owner, timeout, fixed, patience, place, unusual))]
    #[allow(clippy::too_many_arguments)] // Each is a word of one call.
    fn acquire(
        slf: &Bound<'_, Self>,
        name: &str,
        owner: Owner,
        timeout: f64,
        fixed: bool,
        patience: Option<f64>,
        place: &str,
        unusual: Option<&Asking>,
    ) -> PyResult<Py<PyAny>> {
        let ask = ask(name, owner, (timeout, fixed, patience), place, unusual);
        let outcome = slf.get().wait(
            slf.py(),
            |engine| engine.of(name),
            |state, sink| Some(state.acquire(ask, sink)),
        )?;
        outcome::to_py(slf.py(), outcome, slf)
    }

    /// Gives a lease back and waits for the server's word; true if it was still held.
    fn release(slf: &Bound<'_, Self>, lease: &LeaseHandle) -> PyResult<Py<PyAny>> {
        let lease = lease.own(slf.py())?;
        let outcome = slf.get().wait(
            slf.py(),
            |engine| engine.of(lease.name()),
            |state, sink| {
                state.release(lease, sink);
                None
            },
        )?;
        outcome::to_py(slf.py(), outcome, slf)
    }

    /// Changes a lease's length and waits for the server's word; true if it was still held.
    fn extend(slf: &Bound<'_, Self>, lease: &LeaseHandle, timeout: u64) -> PyResult<Py<PyAny>> {
        let lease = lease.own(slf.py())?;
        let outcome = slf.get().wait(
            slf.py(),
            |engine| engine.of(lease.name()),
            |state, sink| {
                state.extend(lease, timeout, sink);
                None
            },
        )?;
        outcome::to_py(slf.py(), outcome, slf)
    }

    /// Asks something about locks and waits: the server's reply, or a tuple of what happened instead.
    fn call(slf: &Bound<'_, Self>, call: &LockCall) -> PyResult<Py<PyAny>> {
        let outcome = slf.get().wait(
            slf.py(),
            |engine| call.at(engine),
            |state, sink| {
                state.call(call.call(), sink);
                None
            },
        )?;
        outcome::to_py(slf.py(), outcome, slf)
    }

    /// Gives a lease up to whoever takes it over within so many seconds; true if it was still held.
    fn offer(slf: &Bound<'_, Self>, lease: &LeaseHandle, within: f64) -> PyResult<Py<PyAny>> {
        let lease = lease.own(slf.py())?;
        let outcome = slf.get().wait(
            slf.py(),
            |engine| engine.of(lease.name()),
            |state, sink| {
                state.offer(lease, (within * 1e6) as u64, sink);
                None
            },
        )?;
        outcome::to_py(slf.py(), outcome, slf)
    }

    /// Waits a moment for so many replicas to know the grant of a lease; how many do.
    fn replicas(
        slf: &Bound<'_, Self>,
        lease: &LeaseHandle,
        count: u32,
        again: bool,
    ) -> PyResult<Py<PyAny>> {
        let lease = lease.own(slf.py())?;
        let outcome = slf.get().wait(
            slf.py(),
            |engine| engine.of(lease.name()),
            |state, sink| {
                state.replicas(count, again, sink);
                None
            },
        )?;
        outcome::to_py(slf.py(), outcome, slf)
    }

    /// Asks something of the registry and waits: the server's reply, or a tuple of what happened instead.
    fn registry(slf: &Bound<'_, Self>, request: &RegistryRequest) -> PyResult<Py<PyAny>> {
        let outcome = slf.get().wait(
            slf.py(),
            |engine| request.at(engine),
            |state, sink| {
                state.registry(&request.0, sink);
                None
            },
        )?;
        outcome::to_py(slf.py(), outcome, slf)
    }

    /// Asks something of the registry without waiting for an answer.
    fn tell(&self, py: Python<'_>, request: &RegistryRequest) -> PyResult<()> {
        let node = request.at(self.engine(py)?);
        let mut state = node.lock();
        state.registry(&request.0, Sink::Nobody);
        node.settle(state, true);
        Ok(())
    }

    /// What is known of a service; `make` turns a stored record into the object that callers get.
    fn service(&self, py: Python<'_>, name: &str, make: Py<PyAny>) -> PyResult<Service> {
        let watch = self.engine(py)?.of(name).lock().registry.watch(name);
        Ok(Service::new(watch, make))
    }

    /// Whether this process follows a service.
    fn follows(&self, py: Python<'_>, name: &str) -> PyResult<bool> {
        Ok(self.engine(py)?.of(name).lock().registry.follows(name))
    }

    /// Counters since the start, over all partitions in use.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let all = self.engine(py)?.stats();
        let found = PyDict::new(py);
        found.set_item("registered", all.registered)?;
        found.set_item("followed", all.followed)?;
        found.set_item("picks", all.picks)?;
        found.set_item("reregistered", all.registry.reregistered)?;
        found.set_item("taken_over", all.registry.taken_over)?;
        found.set_item("registry_fetches", all.registry.fetches)?;
        found.set_item("swept", all.registry.swept)?;
        found.set_item("open", all.open)?;
        found.set_item("session", all.session)?;
        found.set_item("held", all.held)?;
        found.set_item("unanswered", all.unanswered)?;
        found.set_item("heartbeats", all.counts.heartbeats)?;
        found.set_item("late_heartbeats", all.counts.late_heartbeats)?;
        found.set_item("losses", all.counts.losses)?;
        let failed = self.failed_releases.load(Ordering::Relaxed);
        found.set_item("failed_releases", failed)?;
        found.set_item("connections", all.counts.connections)?;
        found.set_item("sessions", all.counts.sessions)?;
        found.set_item("partitions", all.partitions)?;
        Ok(found)
    }
}

/// Digits without the formatter, which would be a good part of what a request costs.
fn hexadecimal(mut number: u64, room: &mut [u8; 16]) -> &str {
    let mut at = room.len();
    loop {
        at -= 1;
        room[at] = b"0123456789abcdef"[(number & 15) as usize];
        number >>= 4;
        if number == 0 || at == 0 {
            return std::str::from_utf8(&room[at..]).unwrap_or_default();
        }
    }
}

/// Adds this module's names to `_native`.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<EngineHandle>()
}
