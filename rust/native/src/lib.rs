//! `dotmac.platform._native`: translation between Python and the Rust crates, no ideas of its own.
use pyo3::prelude::*;

mod anomaly;
mod answer;
mod audit;
mod balance;
mod batches;
mod bridge;
mod engine;
mod events;
mod export;
mod integrity;
mod lease;
mod locks;
mod outcome;
mod plain;
mod registry;
mod screen;
mod target;

#[pymodule(gil_used = false)]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    anomaly::register(module)?;
    answer::register(module)?;
    audit::register(module)?;
    balance::register(module)?;
    batches::register(module)?;
    bridge::register(module)?;
    engine::register(module)?;
    events::register(module)?;
    integrity::register(module)?;
    export::register(module)?;
    lease::register(module)?;
    locks::register(module)?;
    registry::register(module)?;
    screen::register(module)?;
    Ok(())
}
