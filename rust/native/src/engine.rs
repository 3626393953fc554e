//! The engine for Python: starting and closing it, and the calls of blocked threads.

use crate::balance::Service;
use crate::lease::LeaseHandle;
use crate::outcome;
use crate::registry::RegistryRequest;
use dotmac_core::locks::Ask;
use dotmac_engine::node::{Node, State};
use dotmac_engine::ring::{Parker, Sink};
use dotmac_engine::transport::Target;
use dotmac_engine::{Engine, Outcome, Settings, clock};
use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::sync::Arc;
use std::time::Duration;

/// A blocked thread looks for signals this often.
const SIGNALS: Duration = Duration::from_millis(50);

/// An engine and the process that it belongs to.
#[pyclass(name = "Engine", frozen, module = "dotmac.platform._native")]
pub struct EngineHandle {
    engine: Engine,
}

/// Refuses a use in another process than the one that made the object.
pub fn check_process(py: Python<'_>, made_in: u32) -> PyResult<()> {
    let here = std::process::id();
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
    /// The node, if this is the process that it belongs to.
    pub fn node(&self, py: Python<'_>) -> PyResult<&Arc<Node>> {
        check_process(py, self.engine.pid)?;
        Ok(&self.engine.node)
    }

    /// Submits from a thread that then waits, without the interpreter, for the result.
    fn wait(
        &self,
        py: Python<'_>,
        submit: impl FnOnce(&mut State, Sink) -> Option<u64>,
    ) -> PyResult<Outcome> {
        let node = self.node(py)?;
        let parker = Arc::new(Parker::default());
        let mut state = node.lock();
        let request = submit(&mut state, Sink::Parker(parker.clone()));
        node.settle(state, true);
        loop {
            if let Some(outcome) = py.detach(|| parker.wait(SIGNALS)) {
                return Ok(outcome);
            }
            if let Err(interrupt) = py.check_signals() {
                self.abandon(&parker, request);
                return Err(interrupt);
            }
        }
    }

    /// The thread was interrupted: what it asked for is withdrawn, and given back if it came after all.
    fn abandon(&self, parker: &Parker, request: Option<u64>) {
        let mut state = self.engine.node.lock();
        if let Some(request) = request {
            state.cancel(request);
        }
        self.engine.node.settle(state, true);
        if let Some(Outcome::Granted(lease)) = parker.wait(Duration::ZERO) {
            let mut state = self.engine.node.lock();
            state.drop_lease(&lease);
            self.engine.node.settle(state, true);
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
            target: read_target(target)?,
            namespace,
            session,
            who,
            chance,
        };
        let engine = Engine::start(&settings).map_err(|e| PyOSError::new_err(e.to_string()))?;
        Ok(Self { engine })
    }

    /// Process that the engine belongs to.
    #[getter]
    fn pid(&self) -> u32 {
        self.engine.pid
    }

    /// Gives everything back and ends the thread; true if the server heard all of it within `limit` seconds.
    fn close(&self, py: Python<'_>, limit: f64) -> PyResult<bool> {
        self.node(py)?;
        let limit =
            Duration::try_from_secs_f64(limit).map_err(|e| PyValueError::new_err(e.to_string()))?;
        Ok(py.detach(|| self.engine.close(limit)))
    }

    /// Asks for a lock and waits; a `Lease`, or a tuple of what happened instead.
    #[pyo3(signature = (name, owner, timeout, fixed, wait, patience))]
    fn acquire(
        slf: &Bound<'_, Self>,
        name: &str,
        owner: &str,
        timeout: u64,
        fixed: bool,
        wait: bool,
        patience: Option<u64>,
    ) -> PyResult<Py<PyAny>> {
        let ask = ask(name, owner, timeout, fixed, wait, patience);
        let outcome = slf
            .get()
            .wait(slf.py(), |state, sink| Some(state.acquire(ask, sink)))?;
        outcome::to_py(slf.py(), outcome, slf)
    }

    /// Gives a lease back and waits for the server's word; true if it was still held.
    fn release(slf: &Bound<'_, Self>, lease: &LeaseHandle) -> PyResult<Py<PyAny>> {
        let lease = lease.own(slf.py())?;
        let outcome = slf.get().wait(slf.py(), |state, sink| {
            state.release(lease, sink);
            None
        })?;
        outcome::to_py(slf.py(), outcome, slf)
    }

    /// Changes a lease's length and waits for the server's word; true if it was still held.
    fn extend(slf: &Bound<'_, Self>, lease: &LeaseHandle, timeout: u64) -> PyResult<Py<PyAny>> {
        let lease = lease.own(slf.py())?;
        let outcome = slf.get().wait(slf.py(), |state, sink| {
            state.extend(lease, timeout, sink);
            None
        })?;
        outcome::to_py(slf.py(), outcome, slf)
    }

    /// One page of the locks that are held.
    fn list_locks(slf: &Bound<'_, Self>, cursor: &str, count: u32) -> PyResult<Py<PyAny>> {
        let call = outcome::list_call(cursor, count);
        let outcome = slf.get().wait(slf.py(), |state, sink| {
            state.call(call, sink);
            None
        })?;
        outcome::to_py(slf.py(), outcome, slf)
    }

    /// Asks something of the registry and waits: the server's reply, or a tuple of what happened instead.
    fn registry(slf: &Bound<'_, Self>, request: &RegistryRequest) -> PyResult<Py<PyAny>> {
        let outcome = slf.get().wait(slf.py(), |state, sink| {
            state.registry(&request.0, sink);
            None
        })?;
        outcome::to_py(slf.py(), outcome, slf)
    }

    /// Asks something of the registry without waiting for an answer.
    fn tell(&self, py: Python<'_>, request: &RegistryRequest) -> PyResult<()> {
        let node = self.node(py)?;
        let mut state = node.lock();
        state.registry(&request.0, Sink::Nobody);
        node.settle(state, true);
        Ok(())
    }

    /// What is known of a service; `make` turns a stored record into the object that callers get.
    fn service(&self, py: Python<'_>, name: &str, make: Py<PyAny>) -> PyResult<Service> {
        let watch = self.node(py)?.lock().registry.watch(name);
        Ok(Service::new(watch, make))
    }

    /// Whether this process follows a service.
    fn follows(&self, py: Python<'_>, name: &str) -> PyResult<bool> {
        Ok(self.node(py)?.lock().registry.follows(name))
    }

    /// Counters since the start.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let state = self.node(py)?.lock();
        let (counts, open, held) = (state.counts, state.open(), state.client.held());
        let (unanswered, sid) = (state.client.unanswered(), state.client.session.sid());
        let (registered, registry) = (state.registry.registered(), state.registry.counts);
        let (picks, followed) = (state.registry.picks(), state.registry.followed());
        drop(state);
        let found = PyDict::new(py);
        found.set_item("registered", registered)?;
        found.set_item("followed", followed)?;
        found.set_item("picks", picks)?;
        found.set_item("reregistered", registry.reregistered)?;
        found.set_item("taken_over", registry.taken_over)?;
        found.set_item("registry_fetches", registry.fetches)?;
        found.set_item("swept", registry.swept)?;
        found.set_item("open", open)?;
        found.set_item("session", sid)?;
        found.set_item("held", held)?;
        found.set_item("unanswered", unanswered)?;
        found.set_item("heartbeats", counts.heartbeats)?;
        found.set_item("late_heartbeats", counts.late_heartbeats)?;
        found.set_item("losses", counts.losses)?;
        found.set_item("connections", counts.connections)?;
        found.set_item("sessions", counts.sessions)?;
        Ok(found)
    }
}

/// A request as the engine takes it.
pub fn ask(
    name: &str,
    owner: &str,
    timeout: u64,
    fixed: bool,
    wait: bool,
    patience: Option<u64>,
) -> Ask {
    Ask {
        name: name.into(),
        owner: owner.into(),
        timeout,
        fixed,
        wait,
        patience,
        since: clock::wall_ms(),
    }
}

fn read_target(target: &Bound<'_, PyDict>) -> PyResult<Target> {
    fn get<'py, T: FromPyObjectOwned<'py>>(from: &Bound<'py, PyDict>, key: &str) -> PyResult<T> {
        let value = from
            .get_item(key)?
            .ok_or_else(|| PyValueError::new_err(format!("target lacks {key}")))?;
        value.extract().map_err(Into::into)
    }
    Ok(Target {
        path: get(target, "path")?,
        host: get(target, "host")?,
        port: get(target, "port")?,
        db: get(target, "db")?,
        username: get(target, "username")?,
        password: get(target, "password")?,
        tls: get(target, "tls")?,
        tls_ca: get(target, "tls_ca")?,
        tls_cert: get(target, "tls_cert")?,
        tls_key: get(target, "tls_key")?,
        tls_server_name: get(target, "tls_server_name")?,
        tls_insecure: get(target, "tls_insecure")?,
        connect_timeout: get(target, "connect_timeout")?,
        request_timeout: get(target, "request_timeout")?,
    })
}

/// Adds this module's names to `_native`.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<EngineHandle>()
}
