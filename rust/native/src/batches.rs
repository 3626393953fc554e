//! From events to what one commit stores: translation of the core module `audit::batch`.
use std::sync::Mutex;

use dotmac_core::audit::Hash;
use dotmac_core::audit::batch::{Batch, Chain, Form, Head};
use dotmac_core::audit::event::Event;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::events::{Entry, lock, now_us, wrong};

/// What one commit stores; see the core crate.
#[pyclass(module = "dotmac.platform._native", name = "AuditBatch", frozen)]
pub struct PyBatch(Batch);

#[pymethods]
impl PyBatch {
    /// The first segment's id as a number; None without segments.
    #[getter]
    fn first_segment(&self) -> Option<u128> {
        self.0.first_segment.map(u128::from_be_bytes)
    }

    /// Few events, as JSON.
    #[getter]
    fn json(&self) -> Option<&str> {
        match &self.0.events {
            Form::Json(text) => Some(text),
            Form::Copy(_) => None,
        }
    }

    /// More events, as COPY takes them.
    #[getter]
    fn copy<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyBytes>> {
        match &self.0.events {
            Form::Json(_) => None,
            Form::Copy(bytes) => Some(PyBytes::new(py, bytes)),
        }
    }

    #[getter]
    fn segments(&self) -> &str {
        &self.0.segments
    }

    /// The leaf hashes of all segments, one after another.
    #[getter]
    fn leaves<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.0.leaves)
    }

    #[getter]
    fn rollup(&self) -> String {
        self.0.rollup()
    }

    #[getter]
    fn tenants(&self) -> Vec<String> {
        self.0.tenants().to_vec()
    }

    /// Tenants, and the number of each one's segment.
    #[getter]
    fn places(&self) -> Vec<(&str, i64)> {
        self.0.places().collect()
    }

    /// Events by day (since 1970), category and level.
    #[getter]
    fn counts(&self) -> Vec<(i64, &str, &str, i64)> {
        let counts = self.0.counts.iter();
        counts
            .map(|count| {
                (
                    count.day,
                    count.category.as_str(),
                    count.level.as_str(),
                    count.events,
                )
            })
            .collect()
    }
}

/// The segments of one writer; see the core crate.
#[pyclass(module = "dotmac.platform._native", name = "AuditChain", frozen)]
pub struct PyChain(Mutex<Chain>);

#[pymethods]
impl PyChain {
    #[new]
    #[pyo3(signature = (writer, /, *, seed))]
    fn new(writer: [u8; 16], seed: u64) -> Self {
        Self(Mutex::new(Chain::new(writer, seed)))
    }

    /// Makes what one commit stores of these events.
    #[pyo3(signature = (entries, few, /))]
    #[allow(clippy::needless_pass_by_value)] // as PyO3 makes it
    fn pack(&self, entries: Vec<PyRef<'_, Entry>>, few: usize) -> PyResult<PyBatch> {
        let events: Vec<&Event> = entries.iter().map(|entry| &entry.event).collect();
        let packed = lock(&self.0).pack(&events, now_us(), few);
        packed.map(PyBatch).map_err(wrong)
    }

    /// The batch is stored.
    #[pyo3(signature = (batch, /))]
    fn commit(&self, batch: &PyBatch) {
        lock(&self.0).commit(&batch.0);
    }

    /// The last stored segment of a tenant, as the database has it.
    #[pyo3(signature = (tenant, seq, link, /))]
    fn note(&self, tenant: &str, seq: i64, link: Hash) {
        lock(&self.0).note(tenant, Head { seq, link });
    }

    #[getter]
    fn tenants(&self) -> usize {
        lock(&self.0).tenants()
    }

    #[getter]
    fn segments(&self) -> i64 {
        lock(&self.0).segments()
    }
}

/// Adds this module's names to `_native`.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyBatch>()?;
    module.add_class::<PyChain>()
}
