//! `dotmac.platform._native`: translation between Python and the Rust crates, no ideas of its own.
use pyo3::prelude::*;

mod anomaly;
mod balance;
mod bridge;
mod engine;
mod lease;
mod outcome;
mod registry;

#[pymodule(gil_used = false)]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    anomaly::register(module)?;
    balance::register(module)?;
    bridge::register(module)?;
    engine::register(module)?;
    lease::register(module)?;
    registry::register(module)?;
    Ok(())
}
