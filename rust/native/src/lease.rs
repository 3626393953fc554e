//! A held lock for Python: what it may believe is read without asking the engine.

use crate::engine::{EngineHandle, check_process};
use dotmac_core::lease::Lease;
use dotmac_engine::{clock, process};
use pyo3::prelude::*;
use std::sync::Arc;

/// One lease. Dropped while it is held, it is given back.
#[pyclass(name = "Lease", frozen, module = "dotmac.platform._native")]
pub struct LeaseHandle {
    /// What the engine shares.
    pub lease: Arc<Lease>,
    engine: Py<EngineHandle>,
    pid: u32,
}

impl LeaseHandle {
    /// A handle on a lease of this engine.
    pub fn new(lease: Arc<Lease>, engine: &Bound<'_, EngineHandle>) -> Self {
        Self {
            lease,
            engine: engine.clone().unbind(),
            pid: process::id(),
        }
    }

    /// The lease, if it belongs to this process: under its fence any process could give it back.
    pub fn own(&self, py: Python<'_>) -> PyResult<&Arc<Lease>> {
        check_process(py, self.pid)?;
        Ok(&self.lease)
    }
}

#[pymethods]
impl LeaseHandle {
    /// Number of the lease in this process.
    #[getter]
    fn id(&self) -> u64 {
        self.lease.id
    }

    /// Fencing token.
    #[getter]
    fn fence(&self) -> u64 {
        self.lease.fence
    }

    /// Place in the queue that it came from, from 1 on; 0 if it was granted at once.
    #[getter]
    fn place(&self) -> u32 {
        self.lease.place
    }

    /// True while it is held and its local deadline is ahead, judged now.
    #[getter]
    fn held(&self, py: Python<'_>) -> PyResult<bool> {
        check_process(py, self.pid)?;
        Ok(self.lease.held_at(clock::now()))
    }

    /// Seconds until the local deadline, as far as heartbeats have been confirmed.
    #[getter]
    fn remaining(&self) -> f64 {
        self.lease.valid_until().saturating_sub(clock::now()) as f64 / 1e6
    }

    /// Why it was lost: a sentence; nothing while it is held or when it was given back.
    #[getter]
    fn loss(&self) -> Option<&'static str> {
        use dotmac_core::lease::LossReason;
        if let Some(reason) = self.lease.loss() {
            return Some(reason.text());
        }
        let ended = !self.lease.released() && !self.lease.held_at(clock::now());
        ended.then(|| LossReason::Deadline.text())
    }

    /// Gives it back without waiting for the server's word; the engine repeats it until it is answered.
    fn drop(&self, py: Python<'_>) -> PyResult<()> {
        let node = self.engine.get().engine(py)?.of(self.lease.name());
        let mut state = node.lock();
        state.drop_lease(&self.lease);
        node.settle(state, true);
        Ok(())
    }
}

impl Drop for LeaseHandle {
    fn drop(&mut self) {
        if self.pid != process::id() || self.lease.released() || self.lease.loss().is_some() {
            return;
        }
        // Attached already: this runs where the interpreter drops the object. At the interpreter's end the engine
        // itself gives everything back.
        Python::try_attach(|py| {
            if let Ok(engine) = self.engine.get().engine(py) {
                let node = engine.of(self.lease.name());
                let mut state = node.lock();
                state.drop_lease(&self.lease);
                node.settle(state, true);
            }
        });
    }
}

/// Adds this module's names to `_native`.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<LeaseHandle>()
}
