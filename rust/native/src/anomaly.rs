//! Translation of the core module of the same name.
use pyo3::prelude::*;

/// Adds this module's names to `_native`.
pub fn register(_module: &Bound<'_, PyModule>) -> PyResult<()> {
    Ok(())
}
