//! What Python asks of the registry.
use bytes::Bytes;
use dotmac_engine::registry::Request;
use pyo3::prelude::*;

/// One request, for `Bridge.registry`, `Engine.registry` and `Engine.tell`.
#[pyclass(frozen, module = "dotmac.platform._native")]
pub struct RegistryRequest(pub Request);

#[pymethods]
impl RegistryRequest {
    /// Keep an instance registered; `ttl` in milliseconds, `record` is JSON.
    #[staticmethod]
    #[pyo3(signature = (service, instance_id, epoch, ttl, replace, record))]
    fn register(
        service: String,
        instance_id: String,
        epoch: u64,
        ttl: u64,
        replace: bool,
        record: String,
    ) -> Self {
        Self(Request::Register {
            service,
            id: instance_id,
            epoch,
            ttl,
            replace,
            record,
        })
    }

    /// Take an instance out; repeated by the engine until it is answered.
    #[staticmethod]
    fn deregister(service: String, instance_id: String) -> Self {
        Self(Request::Deregister {
            service,
            id: instance_id,
        })
    }

    /// Follow a service, and read it now.
    #[staticmethod]
    fn follow(service: String, changed: bool) -> Self {
        Self(Request::Follow { service, changed })
    }

    /// A page of all instances.
    #[staticmethod]
    fn list(after: &[u8], count: u32) -> Self {
        Self(Request::List {
            after: Bytes::copy_from_slice(after),
            count,
        })
    }

    /// What a health check found.
    #[staticmethod]
    fn status(service: String, instance_id: String, epoch: u64, up: bool) -> Self {
        Self(Request::Status {
            service,
            id: instance_id,
            epoch,
            up,
        })
    }

    /// Meet the other monitors; `live` in milliseconds, 0 leaves.
    #[staticmethod]
    fn monitors(monitor: String, live: u64) -> Self {
        Self(Request::Monitors { monitor, live })
    }
}

/// Adds this module's names to `_native`.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<RegistryRequest>()
}
