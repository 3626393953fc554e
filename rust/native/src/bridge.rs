//! One event loop's side of the engine: requests go out, one descriptor wakes the loop for a whole batch of results.
//!
//! The file is long because `PyO3` takes the methods of a class in one block.

use crate::answer::{Answer, Told};
use crate::engine::{EngineHandle, Owner};
use crate::lease::LeaseHandle;
use crate::locks::{Asking, LockCall, ask};
use crate::outcome;
use crate::registry::RegistryRequest;
use dotmac_core::lease::Lease;
use dotmac_engine::node::{Node, State};
use dotmac_engine::ring::{GivenBack, Ring, Sink};
use dotmac_engine::{Engine, Outcome, clock};
use pyo3::call::PyCallArgs;
use pyo3::exceptions::{PyException, PyOSError, PyRuntimeError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyTuple};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Who a result is for.
enum Waiter {
    /// A lock's task.
    Task(Py<Answer>),
    /// Anybody who can wait for a future.
    Anybody(Py<PyAny>),
}

#[derive(Default)]
struct Slots {
    waiters: Vec<Option<Waiter>>,
    free: Vec<usize>,
}

impl Slots {
    fn put(&mut self, waiter: Waiter) -> u64 {
        if let Some(slot) = self.free.pop() {
            self.waiters[slot] = Some(waiter);
            return slot as u64;
        }
        self.waiters.push(Some(waiter));
        self.waiters.len() as u64 - 1
    }

    fn take(&mut self, slot: u64) -> Option<Waiter> {
        let waiter = self.waiters.get_mut(slot as usize)?.take()?;
        self.free.push(slot as usize);
        Some(waiter)
    }
}

/// The bridge between one event loop and one engine. Used in that loop's thread only; one that belongs to no loop
/// only tells threads of releases that failed.
#[pyclass(frozen, module = "dotmac.platform._native")]
pub struct Bridge {
    engine: Py<EngineHandle>,
    ring: Arc<Ring>,
    slots: Mutex<Slots>,
    /// Taken from the ring and not handed on yet; a loop that runs inside of a callback goes on with them.
    results: Mutex<VecDeque<(u64, Outcome)>>,
    event_loop: Option<Loop>,
    /// Lease number to the holding that is told of its loss.
    holdings: Py<PyDict>,
    /// Number of a user of the engine to the callable that is told of a release that failed.
    reports: Py<PyDict>,
    flush_due: AtomicBool,
}

struct Loop {
    itself: Py<PyAny>,
    create_future: Py<PyAny>,
    call_soon: Py<PyAny>,
}

impl Bridge {
    fn submit(
        slf: &Bound<'_, Self>,
        waiter: Waiter,
        at: impl FnOnce(&Engine) -> &Arc<Node>,
        submit: impl FnOnce(&mut State, Sink) -> u64,
    ) -> PyResult<(u64, u64)> {
        let (py, this) = (slf.py(), slf.get());
        this.engine.get().engine(py)?;
        let slot = this.slots().put(waiter);
        let request = Self::send(slf, at, |state| {
            submit(state, Sink::Ring(this.ring.clone(), slot))
        })?;
        Ok((slot, request))
    }

    fn send<T>(
        slf: &Bound<'_, Self>,
        at: impl FnOnce(&Engine) -> &Arc<Node>,
        submit: impl FnOnce(&mut State) -> T,
    ) -> PyResult<T> {
        let (py, this) = (slf.py(), slf.get());
        let node = at(this.engine.get().engine(py)?);
        let mut state = node.lock();
        // Under load the bytes of one turn of the loop go out in one write, at its end.
        let alone =
            this.event_loop.is_none() || (state.idle() && !this.flush_due.load(Ordering::Acquire));
        let submitted = submit(&mut state);
        if node.settle(state, alone) && !this.flush_due.swap(true, Ordering::AcqRel) {
            this.soon(py, (slf.getattr(intern!(py, "flush"))?,), None)?;
        }
        Ok(submitted)
    }

    /// A request whose future anybody may wait for.
    fn future<'py>(
        slf: &Bound<'py, Self>,
        at: impl FnOnce(&Engine) -> &Arc<Node>,
        submit: impl FnOnce(&mut State, Sink),
    ) -> PyResult<Bound<'py, PyAny>> {
        let future = slf.get().of_loop()?.create_future.bind(slf.py()).call0()?;
        let waiter = Waiter::Anybody(future.clone().unbind());
        Self::submit(slf, waiter, at, |state, sink| {
            submit(state, sink);
            0
        })?;
        Ok(future)
    }

    /// A request for one task.
    fn answer<'py>(
        slf: &Bound<'py, Self>,
        told: Told,
        failures_only: bool,
        at: impl FnOnce(&Engine) -> &Arc<Node>,
        submit: impl FnOnce(&mut State, Sink) -> u64,
    ) -> PyResult<Bound<'py, Answer>> {
        let answer = Answer::new(slf.clone().unbind(), told, failures_only);
        let answer = Bound::new(slf.py(), answer)?;
        let waiter = Waiter::Task(answer.clone().unbind());
        let (slot, request) = Self::submit(slf, waiter, at, submit)?;
        answer.get().requested(slot, request);
        Ok(answer)
    }

    /// The engine that it leads to.
    pub fn engine<'a, 'py>(&'a self, py: Python<'py>) -> &'a Bound<'py, EngineHandle> {
        self.engine.bind(py)
    }

    /// The loop that it belongs to.
    pub fn event_loop(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        self.event_loop
            .as_ref()
            .map(|known| known.itself.clone_ref(py))
    }

    /// Lets the loop call something in its next turn.
    pub fn soon<'py>(
        &self,
        py: Python<'py>,
        call: impl PyCallArgs<'py>,
        details: Option<&Bound<'py, PyDict>>,
    ) -> PyResult<()> {
        self.of_loop()?.call_soon.bind(py).call(call, details)?;
        Ok(())
    }

    /// Gives back what was granted to somebody who does not want it any more.
    pub fn give_back(&self, py: Python<'_>, lease: &Arc<Lease>) -> PyResult<()> {
        let node = self.engine.get().engine(py)?.of(lease.name());
        let mut state = node.lock();
        state.drop_lease(lease);
        node.settle(state, true);
        Ok(())
    }

    /// These scopes have come to wait for the owner of a request.
    pub fn awaited(&self, py: Python<'_>, request: u64, by: Vec<Owner>) -> PyResult<()> {
        let node = self.engine.get().engine(py)?.of_request(request);
        let mut state = node.lock();
        let by: Vec<Arc<str>> = by.into_iter().map(Into::into).collect();
        state.awaited(request, &by);
        node.settle(state, true);
        Ok(())
    }

    /// Withdraws a request. One that was granted and not handed on yet is given back now, ahead of whatever its task
    /// asks for next.
    pub fn withdraw(&self, py: Python<'_>, slot: u64, request: u64) -> PyResult<()> {
        let node = self.engine.get().engine(py)?.of_request(request);
        let mut state = node.lock();
        state.cancel(request);
        node.settle(state, true);
        let mut results = self.results();
        results.extend(self.ring.take());
        let granted = results
            .iter()
            .position(|(of, outcome)| *of == slot && matches!(outcome, Outcome::Granted(_)))
            .and_then(|at| results.remove(at));
        drop(results);
        if let Some((_, Outcome::Granted(lease))) = granted {
            self.slots().take(slot);
            self.give_back(py, &lease)?;
        }
        Ok(())
    }

    fn of_loop(&self) -> PyResult<&Loop> {
        self.event_loop
            .as_ref()
            .ok_or_else(|| PyRuntimeError::new_err("this bridge belongs to no event loop"))
    }

    fn deliver(&self, py: Python<'_>, slot: u64, outcome: Outcome) -> PyResult<()> {
        if let Outcome::Lost(lease) = &outcome {
            let holdings = self.holdings.bind(py);
            if let Some(holding) = holdings.get_item(lease.id)? {
                holdings.del_item(lease.id)?;
                let reason = lease.loss().map(dotmac_core::lease::LossReason::text);
                holding.call_method1(intern!(py, "tell"), (reason,))?;
            }
            return Ok(());
        }
        if let Outcome::NotGivenBack(lease, why) = outcome {
            if let Some(told) = self.reports.bind(py).get_item(slot)? {
                let why = outcome::to_py(py, *why, self.engine.bind(py))?;
                told.call1((&**lease.name(), lease.fence, why))?;
            }
            return Ok(());
        }
        let waiter = self.slots().take(slot);
        match waiter {
            None => Ok(()),
            Some(Waiter::Task(answer)) => Answer::came(answer.bind(py), outcome),
            Some(Waiter::Anybody(future)) => {
                let future = future.bind(py);
                let value = outcome::to_py(py, outcome, self.engine.bind(py))?;
                if future.call_method0(intern!(py, "done"))?.is_truthy()? {
                    return Ok(()); // its caller was cancelled
                }
                complete(future, value)
            }
        }
    }

    /// Ends early where the interpreter is to exit; then the loop is woken for the rest, should it go on.
    fn deliver_all(&self, py: Python<'_>) -> PyResult<()> {
        loop {
            let Some((slot, outcome)) = self.results().pop_front() else {
                return Ok(());
            };
            let Err(error) = self.deliver(py, slot, outcome) else {
                continue;
            };
            // One callback's error must not keep the results of others from them.
            if error.is_instance_of::<PyException>(py) {
                error.write_unraisable(py, None);
            } else {
                self.ring.signal();
                return Err(error);
            }
        }
    }

    fn results(&self) -> MutexGuard<'_, VecDeque<(u64, Outcome)>> {
        self.results.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl Bridge {
    /// A bridge for a loop, if any: who is told of losses, and who of releases that failed.
    #[new]
    fn new(
        py: Python<'_>,
        engine: Py<EngineHandle>,
        event_loop: Option<Bound<'_, PyAny>>,
        holdings: Py<PyDict>,
        reports: Py<PyDict>,
    ) -> PyResult<Self> {
        let ring = Arc::new(Ring::new().map_err(|e| PyOSError::new_err(e.to_string()))?);
        engine.get().engine(py)?.add_ring(&ring);
        let event_loop = event_loop.map(|itself| {
            Ok::<_, PyErr>(Loop {
                create_future: itself.getattr("create_future")?.unbind(),
                call_soon: itself.getattr("call_soon")?.unbind(),
                itself: itself.unbind(),
            })
        });
        Ok(Self {
            engine,
            ring,
            slots: Mutex::default(),
            results: Mutex::default(),
            event_loop: event_loop.transpose()?,
            holdings,
            reports,
            flush_due: AtomicBool::new(false),
        })
    }

    /// The descriptor for the loop's `add_reader`.
    fn fileno(&self) -> i32 {
        self.ring.fileno()
    }

    /// Hands every result that has come to its future. What the tasks that go on submit is written at the end.
    fn drain(&self, py: Python<'_>) -> PyResult<()> {
        let engine = self.engine.get().engine(py)?;
        self.results().extend(self.ring.drain());
        self.flush_due.store(true, Ordering::Release);
        let done = self.deliver_all(py);
        self.flush_due.store(false, Ordering::Release);
        engine.flush();
        done
    }

    /// The loop is closed: what it asked for is withdrawn, what it was granted and never saw is given back.
    fn abandon(&self, py: Python<'_>) -> PyResult<()> {
        let engine = self.engine.get().engine(py)?;
        let slots = std::mem::take(&mut *self.slots());
        for waiter in slots.waiters.iter().flatten() {
            if let Waiter::Task(answer) = waiter
                && let Some(request) = answer.get().unanswered()
            {
                let node = engine.of_request(request);
                let mut state = node.lock();
                state.cancel(request);
                node.settle(state, false);
            }
        }
        let unseen = std::mem::take(&mut *self.results());
        for (_, outcome) in unseen.into_iter().chain(self.ring.drain()) {
            if let Outcome::Granted(lease) = outcome {
                let node = engine.of(lease.name());
                let mut state = node.lock();
                state.drop_lease(&lease);
                node.settle(state, false);
            }
        }
        engine.flush();
        for waiter in slots.waiters.into_iter().flatten() {
            if let Waiter::Task(answer) = waiter {
                answer.get().forget();
            }
        }
        Ok(())
    }

    /// Writes what this turn of the loop has submitted.
    fn flush(&self, py: Python<'_>) -> PyResult<()> {
        self.flush_due.store(false, Ordering::Release);
        self.engine.get().engine(py)?.flush();
        Ok(())
    }

    /// Asks for a lock: what is to be awaited is `told(whose, result, detail)`, the result being a `Lease` or a tuple of what
    /// happened instead. Times in seconds.
    #[pyo3(signature = (name, owner, timeout, fixed, patience, place, unusual, told, whose, detail))]
    #[allow(clippy::too_many_arguments)] // of a call that is made for each lock
    fn acquire<'py>(
        slf: &Bound<'py, Self>,
        name: &str,
        owner: Owner,
        timeout: f64,
        fixed: bool,
        patience: Option<f64>,
        place: &str,
        unusual: Option<&Asking>,
        told: Py<PyAny>,
        whose: Py<PyAny>,
        detail: Py<PyAny>,
    ) -> PyResult<Bound<'py, Answer>> {
        let ask = ask(name, owner, (timeout, fixed, patience), place, unusual);
        Self::answer(
            slf,
            (told, whose, detail),
            false,
            |engine| engine.of(name),
            |state, sink| state.acquire(ask, sink),
        )
    }

    /// Gives a lease back: what is to be awaited is `told(whose, result, detail)` where it was not held any more, or where
    /// that could not be found out; nothing otherwise.
    fn release<'py>(
        slf: &Bound<'py, Self>,
        lease: &LeaseHandle,
        told: Py<PyAny>,
        whose: Py<PyAny>,
        detail: Py<PyAny>,
    ) -> PyResult<Bound<'py, Answer>> {
        let lease = lease.own(slf.py())?;
        Self::answer(
            slf,
            (told, whose, detail),
            true,
            |engine| engine.of(lease.name()),
            |state, sink| {
                state.release(lease, sink);
                0
            },
        )
    }

    /// Gives a lease back without waiting: whoever reports under the number `whose` is told where that failed.
    fn release_soon(slf: &Bound<'_, Self>, lease: &LeaseHandle, whose: u64) -> PyResult<()> {
        let (this, lease) = (slf.get(), lease.own(slf.py())?);
        let release = GivenBack {
            lease: lease.clone(),
            told: (this.ring.clone(), whose),
            failures: this.engine.get().failed_releases.clone(),
        };
        Self::send(
            slf,
            |engine| engine.of(lease.name()),
            |state| state.release(lease, Sink::Unless(Arc::new(release))),
        )
    }

    /// Changes a lease's length: the future of True if it was still held.
    fn extend<'py>(
        slf: &Bound<'py, Self>,
        lease: &LeaseHandle,
        timeout: u64,
    ) -> PyResult<Bound<'py, PyAny>> {
        let lease = lease.own(slf.py())?;
        Self::future(
            slf,
            |engine| engine.of(lease.name()),
            |state, sink| state.extend(lease, timeout, sink),
        )
    }

    /// Asks something about locks: the future of the server's reply, or of a tuple of what happened instead.
    fn call<'py>(slf: &Bound<'py, Self>, call: &LockCall) -> PyResult<Bound<'py, PyAny>> {
        Self::future(
            slf,
            |engine| call.at(engine),
            |state, sink| state.call(call.call(), sink),
        )
    }

    /// Gives a lease up to whoever takes it over within so many seconds: the future of True if it was still held.
    fn offer<'py>(
        slf: &Bound<'py, Self>,
        lease: &LeaseHandle,
        within: f64,
    ) -> PyResult<Bound<'py, PyAny>> {
        let lease = lease.own(slf.py())?;
        Self::future(
            slf,
            |engine| engine.of(lease.name()),
            |state, sink| state.offer(lease, (within * 1e6) as u64, sink),
        )
    }

    /// The future of the number of replicas that know the grant of a lease, or of a tuple of what happened instead.
    fn replicas<'py>(
        slf: &Bound<'py, Self>,
        lease: &LeaseHandle,
        count: u32,
        again: bool,
    ) -> PyResult<Bound<'py, PyAny>> {
        let lease = lease.own(slf.py())?;
        Self::future(
            slf,
            |engine| engine.of(lease.name()),
            |state, sink| state.replicas(count, again, sink),
        )
    }

    /// From here on the loop has to turn at least every so many seconds, or the process's leases run out; 0 ends that.
    fn guard(&self, limit: f64) {
        self.ring.guard((limit * 1e6) as u64);
    }

    /// The loop has turned.
    fn turned(&self) {
        self.ring.turned();
    }

    /// Asks something of the registry: the future of the server's reply, or of a tuple of what happened instead.
    fn registry<'py>(
        slf: &Bound<'py, Self>,
        request: &RegistryRequest,
    ) -> PyResult<Bound<'py, PyAny>> {
        Self::future(
            slf,
            |engine| request.at(engine),
            |state, sink| state.registry(&request.0, sink),
        )
    }

    /// A future that the engine thread resolves at once: the cost of the bridge alone.
    fn echo<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let mut first = false;
        let future = Self::future(
            slf,
            |engine| engine.numbered(0),
            |state, sink| first = state.echo(sink),
        )?;
        if first {
            let engine = slf.get().engine.get().engine(slf.py())?;
            engine.numbered(0).notify.notify_one();
        }
        Ok(future)
    }
}

/// Sets a future's result. A task that awaits it goes on at once instead of in the loop's next turn, for this is
/// called by the loop itself: that saves a handle and a turn for each.
fn complete(future: &Bound<'_, PyAny>, value: Py<PyAny>) -> PyResult<()> {
    let py = future.py();
    let set_result = intern!(py, "set_result");
    let waiting = future.getattr(intern!(py, "_callbacks"))?;
    let only = waiting
        .cast::<PyList>()
        .ok()
        .filter(|callbacks| callbacks.len() == 1);
    let Some(only) = only else {
        future.call_method1(set_result, (value,))?;
        return Ok(());
    };
    let only = only.get_item(0)?;
    let only = only.cast::<PyTuple>()?;
    let (callback, context) = (only.get_item(0)?, only.get_item(1)?);
    future.call_method1(intern!(py, "remove_done_callback"), (&callback,))?;
    future.call_method1(set_result, (value,))?;
    context.call_method1(intern!(py, "run"), (callback, future))?;
    Ok(())
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
