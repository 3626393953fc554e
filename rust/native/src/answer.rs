//! What a task awaits: a request on its way to the engine, and what becomes of its result.
//!
//! It does what a future and two coroutines around it would do, at a fraction of their cost: it is awaited by one
//! task, whose wake-up it calls itself, and it knows how to withdraw what it asked for.

use crate::bridge::Bridge;
use crate::engine::Owner;
use crate::outcome;
use dotmac_engine::Outcome;
use pyo3::exceptions::{PyRuntimeError, PyStopIteration};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::mem::replace;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How far it has come.
#[derive(Default)]
enum Progress {
    /// Nobody waits yet.
    #[default]
    Asked,
    /// The task has been given it, and is about to say how it is woken.
    Yielded,
    /// The task's wake-up, and the context in which to call it.
    Waiting(Py<PyAny>, Py<PyAny>),
    /// The result is here.
    Came(Outcome),
    /// The task was cancelled while it waited; its message.
    Cancelled(Option<Py<PyAny>>),
    /// The result was taken, or is not wanted any more.
    Over,
}

/// A function, and what it is called with before and after the result: a method and its object would be one object
/// more for each request.
pub type Told = (Py<PyAny>, Py<PyAny>, Py<PyAny>);

/// A request and the result that will come. Awaited once, by a task of the bridge's loop; it gives what `told`
/// makes of the result. Where `told` only wants to know of failures, success gives nothing.
#[pyclass(frozen, module = "dotmac.platform._native")]
pub struct Answer {
    bridge: Py<Bridge>,
    /// What makes something of the result, until it has: whoever goes on then may be the last to hold what it belongs to.
    told: Mutex<Option<Told>>,
    failures_only: bool,
    /// Number by which it is withdrawn; zero where it can't be.
    request: AtomicU64,
    slot: AtomicU64,
    progress: Mutex<Progress>,
}

impl Answer {
    /// An answer that has not been asked for.
    pub fn new(bridge: Py<Bridge>, told: Told, failures_only: bool) -> Self {
        Self {
            bridge,
            told: Mutex::new(Some(told)),
            failures_only,
            request: AtomicU64::new(0),
            slot: AtomicU64::new(0),
            progress: Mutex::default(),
        }
    }

    /// Where its result will come, and the number of the request, are known.
    pub fn requested(&self, slot: u64, request: u64) {
        self.slot.store(slot, Ordering::Release);
        self.request.store(request, Ordering::Release);
    }

    /// The number of a request whose result has not come.
    pub fn unanswered(&self) -> Option<u64> {
        let request = self.request.load(Ordering::Acquire);
        let open = !matches!(*self.progress(), Progress::Came(_) | Progress::Over);
        (open && request != 0).then_some(request)
    }

    /// The loop is closed, so that nobody comes for it: the task that waits is let go of.
    pub fn forget(&self) {
        // Dropped when the lock is free again, for that may run anything.
        let _before = replace(&mut *self.progress(), Progress::Over);
    }

    /// The result has come: the task goes on at once, within this call, instead of in the loop's next turn.
    pub fn came(slf: &Bound<'_, Self>, outcome: Outcome) -> PyResult<()> {
        let this = slf.get();
        let mut progress = this.progress();
        match &*progress {
            Progress::Asked | Progress::Yielded => *progress = Progress::Came(outcome),
            Progress::Waiting(..) => {
                let before = replace(&mut *progress, Progress::Came(outcome));
                drop(progress);
                if let Progress::Waiting(wake, context) = before {
                    let run = intern!(slf.py(), "run");
                    context.bind(slf.py()).call_method1(run, (wake, slf))?;
                }
            }
            _ => {
                drop(progress);
                this.unwanted(slf.py(), &outcome)?;
            }
        }
        Ok(())
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nobody waits any more: the request is withdrawn, or what it was granted given back.
    fn leave(&self, py: Python<'_>, now: Progress) -> PyResult<()> {
        let before = replace(&mut *self.progress(), now);
        let bridge = self.bridge.get();
        match &before {
            Progress::Asked | Progress::Yielded | Progress::Waiting(..) => {
                match self.request.load(Ordering::Acquire) {
                    0 => Ok(()),
                    request => bridge.withdraw(py, self.slot.load(Ordering::Acquire), request),
                }
            }
            Progress::Came(outcome) => self.unwanted(py, outcome),
            Progress::Cancelled(_) | Progress::Over => Ok(()),
        }
    }

    fn unwanted(&self, py: Python<'_>, outcome: &Outcome) -> PyResult<()> {
        match outcome {
            Outcome::Granted(lease) => self.bridge.get().give_back(py, lease),
            _ => Ok(()),
        }
    }

    fn conclude(&self, py: Python<'_>, outcome: Outcome) -> PyResult<Option<Py<PyAny>>> {
        let told = self
            .told
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if self.failures_only && matches!(outcome, Outcome::Released(true)) {
            return Ok(None);
        }
        let result = outcome::to_py(py, outcome, self.bridge.get().engine(py))?;
        let Some((told, whose, detail)) = told else {
            return Ok(None);
        };
        let made = told.call1(py, (whose, result, detail))?;
        if made.is_none(py) {
            return Ok(None);
        }
        Err(PyStopIteration::new_err(made))
    }

    fn cancelled(py: Python<'_>, message: Option<Py<PyAny>>) -> PyErr {
        let made = py
            .import("asyncio")
            .and_then(|asyncio| asyncio.getattr("CancelledError"))
            .and_then(|class| match message {
                Some(message) => class.call1((message,)),
                None => class.call0(),
            });
        made.map_or_else(|failed| failed, PyErr::from_value)
    }
}

// What a coroutine does with what it awaits, and a task with what its coroutine yields.
#[pymethods]
impl Answer {
    fn __await__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __iter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __next__(slf: &Bound<'_, Self>) -> PyResult<Option<Py<PyAny>>> {
        let this = slf.get();
        let mut progress = this.progress();
        match replace(&mut *progress, Progress::Over) {
            Progress::Asked => {
                *progress = Progress::Yielded;
                Ok(Some(slf.clone().into_any().unbind()))
            }
            Progress::Came(outcome) => {
                drop(progress);
                this.conclude(slf.py(), outcome)
            }
            Progress::Cancelled(message) => Err(Self::cancelled(slf.py(), message)),
            other => {
                *progress = other;
                Err(PyRuntimeError::new_err(
                    "it is awaited already; await it once, in one task",
                ))
            }
        }
    }

    /// So that a task can be made of it.
    fn send(slf: &Bound<'_, Self>, _value: Py<PyAny>) -> PyResult<Py<PyAny>> {
        Self::__next__(slf)?.ok_or_else(|| PyStopIteration::new_err(()))
    }

    /// The coroutine that awaits it is told of an error, a cancellation for example.
    #[pyo3(signature = (kind, value = None, trace = None))]
    fn throw(
        &self,
        py: Python<'_>,
        kind: Bound<'_, PyAny>,
        value: Option<Bound<'_, PyAny>>,
        trace: Option<Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        self.leave(py, Progress::Over)?;
        let error = match value {
            Some(value) if value.is_instance(&kind)? => value,
            Some(value) => kind.call1((value,))?,
            None if kind.is_callable() => kind.call0()?,
            None => kind,
        };
        if let Some(trace) = trace {
            error.setattr(intern!(py, "__traceback__"), trace)?;
        }
        Err(PyErr::from_value(error))
    }

    /// The coroutine that awaits it is closed.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        self.leave(py, Progress::Over)
    }

    /// By this a task knows what it can wait for; nothing at any other time, so that nobody takes it for a future.
    #[getter(_asyncio_future_blocking)]
    fn blocking(&self) -> Option<bool> {
        matches!(*self.progress(), Progress::Yielded).then_some(true)
    }

    #[setter(_asyncio_future_blocking)]
    #[allow(clippy::unused_self)] // said by the callback that the task adds next
    fn set_blocking(&self, _blocking: bool) {}

    /// These scopes (task numbers or names) have come to wait for this request's owner, so they wait for what it waits for.
    /// False once it was answered.
    fn awaited(&self, py: Python<'_>, by: Vec<Owner>) -> PyResult<bool> {
        let Some(request) = self.unanswered() else {
            return Ok(false);
        };
        if !by.is_empty() {
            self.bridge.get().awaited(py, request, by)?;
        }
        Ok(true)
    }

    fn get_loop(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        self.bridge.get().event_loop(py)
    }

    #[pyo3(signature = (callback, *, context))]
    fn add_done_callback(&self, callback: Py<PyAny>, context: Py<PyAny>) {
        *self.progress() = Progress::Waiting(callback, context);
    }

    /// The task that waits is cancelled: it hears of it in the loop's next turn. True if it waited.
    #[pyo3(signature = (msg = None))]
    fn cancel(slf: &Bound<'_, Self>, msg: Option<Py<PyAny>>) -> PyResult<bool> {
        let (py, this) = (slf.py(), slf.get());
        let (wake, context) = match &*this.progress() {
            Progress::Waiting(wake, context) => (wake.clone_ref(py), context.clone_ref(py)),
            _ => return Ok(false),
        };
        this.leave(py, Progress::Cancelled(msg))?;
        let details = PyDict::new(py);
        details.set_item(intern!(py, "context"), context)?;
        this.bridge.get().soon(py, (wake, slf), Some(&details))?;
        Ok(true)
    }

    /// Asked by the task before it goes on.
    fn result(&self, py: Python<'_>) -> PyResult<()> {
        match &*self.progress() {
            Progress::Cancelled(message) => Err(Self::cancelled(
                py,
                message.as_ref().map(|message| message.clone_ref(py)),
            )),
            _ => Ok(()),
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        // Never awaited; this runs where the interpreter drops the object.
        let progress = self
            .progress
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        if let Progress::Came(outcome) = replace(progress, Progress::Over) {
            Python::try_attach(|py| self.unwanted(py, &outcome));
        }
    }
}

/// Adds this module's names to `_native`.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Answer>()
}
