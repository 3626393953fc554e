//! Translation of the core module of the same name.
use std::sync::{Mutex, MutexGuard, PoisonError};

use dotmac_core::anomaly::{self, Facts};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// Streaming scores from the rates of users, addresses, tenants and actions; see the core crate.
#[pyclass(module = "dotmac.platform._native", frozen)]
pub struct RateDetector(Mutex<anomaly::RateDetector>);

impl RateDetector {
    fn state(&self) -> MutexGuard<'_, anomaly::RateDetector> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl RateDetector {
    #[new]
    #[pyo3(signature = (*, capacity = 16_384, seed = 0))]
    fn new(capacity: usize, seed: u64) -> PyResult<Self> {
        let made = anomaly::RateDetector::new(capacity, seed);
        made.map(|state| Self(Mutex::new(state)))
            .map_err(|error| PyValueError::new_err(error.to_string()))
    }

    /// Takes one event in; returns its score in [0, 1] and the reasons, the strongest first.
    #[pyo3(signature = (time_us, /, *, failed, noun = "", user = None, address = None, tenant = None, action = None))]
    #[allow(clippy::too_many_arguments)] // one per field of the event; a dict would cost more than the scoring
    fn score(
        &self,
        time_us: i64,
        failed: bool,
        noun: &str,
        user: Option<&str>,
        address: Option<&str>,
        tenant: Option<&str>,
        action: Option<&str>,
    ) -> (f64, Vec<String>) {
        let facts = Facts {
            time_us,
            noun,
            failed,
            user,
            address,
            tenant,
            action,
        };
        let verdict = self.state().score(&facts);
        (
            verdict.score,
            verdict
                .reasons
                .into_iter()
                .map(|reason| reason.text)
                .collect(),
        )
    }

    /// Entities remembered now.
    #[getter]
    fn entities(&self) -> usize {
        self.state().entities()
    }
}

/// Adds this module's names to `_native`.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<RateDetector>()
}
