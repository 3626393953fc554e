//! Where to connect to, as Python says it.

use dotmac_engine::transport::Target;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// The target that a dictionary describes, its sentinels or nodes included.
pub fn read(target: &Bound<'_, PyDict>) -> PyResult<Target> {
    fn get<'py, T: FromPyObjectOwned<'py>>(from: &Bound<'py, PyDict>, key: &str) -> PyResult<T> {
        let value = from
            .get_item(key)?
            .ok_or_else(|| PyValueError::new_err(format!("target lacks {key}")))?;
        value.extract().map_err(Into::into)
    }
    fn others(from: &Bound<'_, PyDict>, key: &str) -> PyResult<Vec<Target>> {
        let found = get::<Vec<Bound<'_, PyDict>>>(from, key)?;
        found.iter().map(read).collect()
    }
    Ok(Target {
        path: get(target, "path")?,
        host: get(target, "host")?,
        port: get(target, "port")?,
        db: get(target, "db")?,
        username: get(target, "username")?,
        password: get(target, "password")?,
        tls: get(target, "tls")?,
        tls_ca: get(target, "tls_ca")?,
        tls_cert: get(target, "tls_cert")?,
        tls_key: get(target, "tls_key")?,
        tls_server_name: get(target, "tls_server_name")?,
        tls_insecure: get(target, "tls_insecure")?,
        connect_timeout: get(target, "connect_timeout")?,
        request_timeout: get(target, "request_timeout")?,
        service: get(target, "service")?,
        sentinels: others(target, "sentinels")?,
        cluster: others(target, "cluster")?,
        partitions: get(target, "partitions")?,
    })
}
