//! Results of the engine as Python values; what is not a success is a tuple that the facade turns into an error.

use crate::engine::EngineHandle;
use crate::lease::LeaseHandle;
use dotmac_core::locks::Failure;
use dotmac_engine::Outcome;
use dotmac_engine::wire::Value;
use pyo3::IntoPyObjectExt;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList};

/// An error of `dotmac.platform.errors` by its name.
pub fn error(py: Python<'_>, class: &str, text: &str) -> PyErr {
    let made = py
        .import("dotmac.platform.errors")
        .and_then(|errors| errors.getattr(class))
        .and_then(|class| class.call1((text,)));
    match made {
        Ok(value) => PyErr::from_value(value),
        Err(failed) => failed,
    }
}

/// One result.
pub fn to_py(
    py: Python<'_>,
    outcome: Outcome,
    engine: &Bound<'_, EngineHandle>,
) -> PyResult<Py<PyAny>> {
    match outcome {
        Outcome::Granted(lease) => LeaseHandle::new(lease, engine).into_py_any(py),
        Outcome::Released(held) | Outcome::Extended(held) => held.into_py_any(py),
        Outcome::NotFree(left) => ("not_free", left as f64 / 1e3).into_py_any(py),
        Outcome::Deadlock(cycle) => ("deadlock", cycle).into_py_any(py),
        Outcome::Mismatch(kind) => ("mismatch", kind).into_py_any(py),
        Outcome::NotOffered => ("not_offered", py.None()).into_py_any(py),
        Outcome::TimedOut => ("timed_out", py.None()).into_py_any(py),
        Outcome::Cancelled => ("cancelled", py.None()).into_py_any(py),
        Outcome::Failed(Failure::Unavailable(why)) => ("unavailable", why).into_py_any(py),
        Outcome::Failed(Failure::NoAnswer) => ("no_answer", py.None()).into_py_any(py),
        Outcome::Failed(Failure::Refused(why)) => ("refused", why).into_py_any(py),
        Outcome::Failed(Failure::Denied(why)) => ("denied", why).into_py_any(py),
        Outcome::Failed(Failure::Stalled) => ("stalled", py.None()).into_py_any(py),
        Outcome::Failed(Failure::Closed) => ("closed", py.None()).into_py_any(py),
        Outcome::Misconfigured(why) => ("misconfigured", why).into_py_any(py),
        Outcome::Reply(value) => value_to_py(py, value),
        Outcome::Echo | Outcome::Lost(_) | Outcome::NotGivenBack(..) => Ok(py.None()),
    }
}

/// A server's reply as Python values: bytes stay bytes.
pub fn value_to_py(py: Python<'_>, value: Value) -> PyResult<Py<PyAny>> {
    match value {
        Value::Nil => Ok(py.None()),
        Value::Int(n) => n.into_py_any(py),
        Value::Double(x) => x.into_py_any(py),
        Value::Bool(b) => b.into_py_any(py),
        Value::Bytes(b) => Ok(PyBytes::new(py, &b).into_any().unbind()),
        Value::List(items) => {
            let list = PyList::empty(py);
            for item in items {
                list.append(value_to_py(py, item)?)?;
            }
            Ok(list.into_any().unbind())
        }
        Value::Error(text) => ("refused", text).into_py_any(py),
    }
}
