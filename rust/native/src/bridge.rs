//! One event loop's side of the engine: futures go out, one descriptor wakes the loop for a whole batch of results.

use crate::engine::{EngineHandle, ask, check_process};
use crate::lease::LeaseHandle;
use crate::outcome;
use crate::registry::RegistryRequest;
use dotmac_engine::node::State;
use dotmac_engine::ring::{Ring, Sink};
use dotmac_engine::{Outcome, clock};
use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

#[derive(Default)]
struct Slots {
    /// A future, and the number of its request where it can be withdrawn.
    futures: Vec<Option<(Py<PyAny>, u64)>>,
    free: Vec<usize>,
}

impl Slots {
    fn put(&mut self, future: Py<PyAny>) -> u64 {
        if let Some(slot) = self.free.pop() {
            self.futures[slot] = Some((future, 0));
            return slot as u64;
        }
        self.futures.push(Some((future, 0)));
        self.futures.len() as u64 - 1
    }

    fn take(&mut self, slot: u64) -> Option<Py<PyAny>> {
        let (future, _) = self.futures.get_mut(slot as usize)?.take()?;
        self.free.push(slot as usize);
        Some(future)
    }

    fn requested(&mut self, slot: u64, request: u64) {
        if let Some(Some((_, number))) = self.futures.get_mut(slot as usize) {
            *number = request;
        }
    }
}

/// The bridge between one event loop and one engine. Used in that loop's thread only.
#[pyclass(frozen, module = "dotmac.platform._native")]
pub struct Bridge {
    engine: Py<EngineHandle>,
    ring: Arc<Ring>,
    slots: Mutex<Slots>,
    create_future: Py<PyAny>,
    call_soon: Py<PyAny>,
    /// Lease number to the callable that is told of its loss.
    watchers: Py<PyDict>,
    flush_due: AtomicBool,
    pid: u32,
}

impl Bridge {
    fn submit<'py>(
        slf: &Bound<'py, Self>,
        submit: impl FnOnce(&mut State, Sink) -> u64,
    ) -> PyResult<(Bound<'py, PyAny>, u64)> {
        let py = slf.py();
        let this = slf.get();
        let node = this.engine.get().node(py)?;
        let future = this.create_future.bind(py).call0()?;
        let slot = this
            .slots
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .put(future.clone().unbind());
        let mut state = node.lock();
        let request = submit(&mut state, Sink::Ring(this.ring.clone(), slot));
        // Under load the bytes of one turn of the loop go out in one write, at its end.
        if node.settle(state, false) && !this.flush_due.swap(true, Ordering::AcqRel) {
            this.call_soon.call1(py, (slf.getattr("flush")?,))?;
        }
        this.slots
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .requested(slot, request);
        Ok((future, request))
    }

    fn deliver(&self, py: Python<'_>, slot: u64, outcome: Outcome) -> PyResult<()> {
        if let Outcome::Lost(lease) = &outcome {
            let watchers = self.watchers.bind(py);
            if let Some(told) = watchers.get_item(lease.id)? {
                watchers.del_item(lease.id)?;
                told.call1((lease.loss().map(dotmac_core::lease::LossReason::text),))?;
            }
            return Ok(());
        }
        let Some(future) = self
            .slots
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take(slot)
        else {
            return Ok(());
        };
        let future = future.bind(py);
        if future
            .call_method0(pyo3::intern!(py, "done"))?
            .is_truthy()?
        {
            // Its caller was cancelled. A lease that came after all is given back when this value is dropped.
            drop(outcome::to_py(py, outcome, self.engine.bind(py))?);
            return Ok(());
        }
        let value = outcome::to_py(py, outcome, self.engine.bind(py))?;
        future.call_method1(pyo3::intern!(py, "set_result"), (value,))?;
        Ok(())
    }
}

#[pymethods]
impl Bridge {
    /// A bridge for a loop: its `create_future` and `call_soon`, and the dict of loss watchers.
    #[new]
    fn new(
        py: Python<'_>,
        engine: Py<EngineHandle>,
        create_future: Py<PyAny>,
        call_soon: Py<PyAny>,
        watchers: Py<PyDict>,
    ) -> PyResult<Self> {
        let ring = Arc::new(Ring::new().map_err(|e| PyOSError::new_err(e.to_string()))?);
        engine.get().node(py)?.lock().add_ring(&ring);
        let pid = std::process::id();
        let slots = Mutex::default();
        Ok(Self {
            engine,
            ring,
            slots,
            create_future,
            call_soon,
            watchers,
            flush_due: AtomicBool::new(false),
            pid,
        })
    }

    /// The descriptor for the loop's `add_reader`.
    fn fileno(&self) -> i32 {
        self.ring.fileno()
    }

    /// Hands every result that has come to its future.
    fn drain(&self, py: Python<'_>) -> PyResult<()> {
        check_process(py, self.pid)?;
        for (slot, outcome) in self.ring.drain() {
            // One callback's error must not keep the results of others from them.
            if let Err(error) = self.deliver(py, slot, outcome) {
                error.write_unraisable(py, None);
            }
        }
        Ok(())
    }

    /// The loop is closed: what it asked for is withdrawn, what it was granted and never saw is given back.
    fn abandon(&self, py: Python<'_>) -> PyResult<()> {
        let node = self.engine.get().node(py)?;
        let slots = std::mem::take(&mut *self.slots.lock().unwrap_or_else(PoisonError::into_inner));
        let mut state = node.lock();
        for (_, request) in slots.futures.iter().flatten() {
            state.cancel(*request);
        }
        for (_, outcome) in self.ring.drain() {
            if let Outcome::Granted(lease) = outcome {
                state.drop_lease(&lease);
            }
        }
        node.settle(state, true);
        Ok(())
    }

    /// Writes what this turn of the loop has submitted.
    fn flush(&self, py: Python<'_>) -> PyResult<()> {
        self.flush_due.store(false, Ordering::Release);
        self.engine.get().node(py)?.flush();
        Ok(())
    }

    /// Asks for a lock: the future of a `Lease` or of a tuple of what happened instead, and the request's number.
    #[pyo3(signature = (name, owner, timeout, fixed, wait, patience))]
    fn acquire<'py>(
        slf: &Bound<'py, Self>,
        name: &str,
        owner: &str,
        timeout: u64,
        fixed: bool,
        wait: bool,
        patience: Option<u64>,
    ) -> PyResult<(Bound<'py, PyAny>, u64)> {
        let ask = ask(name, owner, timeout, fixed, wait, patience);
        Self::submit(slf, |state, sink| state.acquire(ask, sink))
    }

    /// Withdraws a request.
    fn cancel(&self, py: Python<'_>, request: u64) -> PyResult<()> {
        let node = self.engine.get().node(py)?;
        let mut state = node.lock();
        state.cancel(request);
        node.settle(state, true);
        Ok(())
    }

    /// Gives a lease back: the future of True if it was still held.
    fn release<'py>(slf: &Bound<'py, Self>, lease: &LeaseHandle) -> PyResult<Bound<'py, PyAny>> {
        let lease = lease.own(slf.py())?;
        Ok(Self::submit(slf, |state, sink| {
            state.release(lease, sink);
            0
        })?
        .0)
    }

    /// Changes a lease's length: the future of True if it was still held.
    fn extend<'py>(
        slf: &Bound<'py, Self>,
        lease: &LeaseHandle,
        timeout: u64,
    ) -> PyResult<Bound<'py, PyAny>> {
        let lease = lease.own(slf.py())?;
        Ok(Self::submit(slf, |state, sink| {
            state.extend(lease, timeout, sink);
            0
        })?
        .0)
    }

    /// One page of the locks that are held.
    fn list_locks<'py>(
        slf: &Bound<'py, Self>,
        cursor: &str,
        count: u32,
    ) -> PyResult<Bound<'py, PyAny>> {
        let call = outcome::list_call(cursor, count);
        Ok(Self::submit(slf, |state, sink| {
            state.call(call, sink);
            0
        })?
        .0)
    }

    /// Asks something of the registry: the future of the server's reply, or of a tuple of what happened instead.
    fn registry<'py>(
        slf: &Bound<'py, Self>,
        request: &RegistryRequest,
    ) -> PyResult<Bound<'py, PyAny>> {
        Ok(Self::submit(slf, |state, sink| {
            state.registry(&request.0, sink);
            0
        })?
        .0)
    }

    /// A future that the engine thread resolves at once: the cost of the bridge alone.
    fn echo<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let mut first = false;
        let (future, _) = Self::submit(slf, |state, sink| {
            first = state.echo(sink);
            0
        })?;
        if first {
            slf.get().engine.get().node(slf.py())?.notify.notify_one();
        }
        Ok(future)
    }
}

/// The monotonic clock by which leases are judged, in seconds.
#[pyfunction]
fn monotonic() -> f64 {
    clock::now() as f64 / 1e6
}

/// Adds this module's names to `_native`.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Bridge>()?;
    module.add_function(wrap_pyfunction!(monotonic, module)?)
}
