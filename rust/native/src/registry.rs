//! What Python asks of the registry.
use bytes::Bytes;
use dotmac_engine::Engine;
use dotmac_engine::node::Node;
use dotmac_engine::registry::Request;
use pyo3::prelude::*;
use std::sync::Arc;

/// One request, for `Bridge.registry`, `Engine.registry` and `Engine.tell`.
#[pyclass(frozen, module = "dotmac.platform._native")]
pub struct RegistryRequest(pub Request, At);

/// Which partition it goes to.
enum At {
    /// The one of this service.
    Service(String),
    /// The one of this number.
    Number(usize),
}

impl RegistryRequest {
    /// The partition that it goes to.
    pub fn at<'e>(&self, engine: &'e Engine) -> &'e Arc<Node> {
        match &self.1 {
            At::Service(name) => engine.of(name),
            At::Number(partition) => engine.numbered(*partition),
        }
    }
}

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
        let at = At::Service(service.clone());
        let request = Request::Register {
            service,
            id: instance_id,
            epoch,
            ttl,
            replace,
            record,
        };
        Self(request, at)
    }

    /// Take an instance out; repeated by the engine until it is answered.
    #[staticmethod]
    fn deregister(service: String, instance_id: String) -> Self {
        let at = At::Service(service.clone());
        let request = Request::Deregister {
            service,
            id: instance_id,
        };
        Self(request, at)
    }

    /// Follow a service, and read it now.
    #[staticmethod]
    fn follow(service: String, changed: bool) -> Self {
        let at = At::Service(service.clone());
        Self(Request::Follow { service, changed }, at)
    }

    /// A page of all instances of a partition.
    #[staticmethod]
    #[pyo3(signature = (after, count, partition=0))]
    fn list(after: &[u8], count: u32, partition: usize) -> Self {
        let after = Bytes::copy_from_slice(after);
        Self(Request::List { after, count }, At::Number(partition))
    }

    /// What a health check found.
    #[staticmethod]
    fn status(service: String, instance_id: String, epoch: u64, up: bool) -> Self {
        let at = At::Service(service.clone());
        let request = Request::Status {
            service,
            id: instance_id,
            epoch,
            up,
        };
        Self(request, at)
    }

    /// Meet the other monitors of a partition; `live` in milliseconds, 0 leaves.
    #[staticmethod]
    #[pyo3(signature = (monitor, live, partition=0))]
    fn monitors(monitor: String, live: u64, partition: usize) -> Self {
        Self(Request::Monitors { monitor, live }, At::Number(partition))
    }
}

/// Adds this module's names to `_native`.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<RegistryRequest>()
}
