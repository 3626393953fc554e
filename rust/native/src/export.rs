//! Translation of the core module of the same name.
use std::sync::{Mutex, MutexGuard, PoisonError};

use dotmac_core::error::CoreError;
use dotmac_core::export::{Decoder, Format, Formatter, Kind, Place, Value, shown_address};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList};

/// Rows of COPY in binary format as text; see the core crate.
#[pyclass(module = "dotmac.platform._native", frozen)]
pub struct RowFormatter(Mutex<Formatter>);

impl RowFormatter {
    fn state(&self) -> MutexGuard<'_, Formatter> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl RowFormatter {
    #[new]
    #[pyo3(signature = (name, columns, rows = 0))]
    fn new(name: &str, columns: Vec<(String, String)>, rows: u64) -> PyResult<Self> {
        let columns = named(columns).map_err(refused)?;
        let format = Format::named(name).map_err(refused)?;
        Ok(Self(Mutex::new(Formatter::new(format, &columns, rows))))
    }

    /// Another statement begins.
    fn restart(&self) {
        self.state().restart();
    }

    /// The rows that are whole once this piece is taken in.
    fn feed<'py>(&self, py: Python<'py>, piece: &[u8]) -> PyResult<Bound<'py, PyBytes>> {
        let rows = py.detach(|| self.state().feed(piece)).map_err(refused)?;
        Ok(PyBytes::new(py, &rows))
    }

    /// How many rows were written.
    #[getter]
    fn rows(&self) -> u64 {
        self.state().rows()
    }

    /// Time (microseconds since 1970) and id of the first one of this object's.
    #[getter]
    fn first<'py>(&self, py: Python<'py>) -> Option<(i64, Bound<'py, PyBytes>)> {
        shown(py, self.state().first())
    }

    /// Time and id of the last one.
    #[getter]
    fn last<'py>(&self, py: Python<'py>) -> Option<(i64, Bound<'py, PyBytes>)> {
        shown(py, self.state().last())
    }
}

/// Rows of COPY in binary format as columns of Python values.
#[pyclass(module = "dotmac.platform._native", frozen)]
pub struct RowReader {
    decoder: Mutex<Decoder>,
    columns: usize,
}

#[pymethods]
impl RowReader {
    #[new]
    fn new(columns: Vec<(String, String)>) -> PyResult<Self> {
        let kinds: Vec<Kind> = named(columns)
            .map_err(refused)?
            .into_iter()
            .map(|(_, kind)| kind)
            .collect();
        Ok(Self {
            columns: kinds.len(),
            decoder: Mutex::new(Decoder::new(kinds)),
        })
    }

    /// Another statement begins.
    fn restart(&self) {
        self.decoder
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .restart();
    }

    /// The rows that are whole once this piece is taken in, column by column.
    fn feed<'py>(&self, py: Python<'py>, piece: &[u8]) -> PyResult<Vec<Bound<'py, PyList>>> {
        let columns: Vec<_> = (0..self.columns).map(|_| PyList::empty(py)).collect();
        let mut decoder = self.decoder.lock().unwrap_or_else(PoisonError::into_inner);
        decoder
            .feed(piece, |values| {
                for (column, value) in columns.iter().zip(values) {
                    append(column, value).map_err(Failure::Python)?;
                }
                Ok(())
            })
            .map_err(Failure::into_py)?;
        Ok(columns)
    }
}

fn shown(py: Python<'_>, place: Option<Place>) -> Option<(i64, Bound<'_, PyBytes>)> {
    place.map(|(time, id)| (time, PyBytes::new(py, &id)))
}

enum Failure {
    Core(CoreError),
    Python(PyErr),
}

impl From<CoreError> for Failure {
    fn from(error: CoreError) -> Self {
        Self::Core(error)
    }
}

impl Failure {
    fn into_py(self) -> PyErr {
        match self {
            Self::Core(error) => refused(error),
            Self::Python(error) => error,
        }
    }
}

fn append(column: &Bound<'_, PyList>, value: &Value<'_>) -> PyResult<()> {
    match value {
        Value::Null => column.append(column.py().None()),
        Value::Text(text) | Value::Json(text) => column.append(text),
        Value::Micros(time) => column.append(time),
        Value::Uuid(id) => column.append(PyBytes::new(column.py(), id)),
        Value::Float(number) => column.append(number),
        Value::Address(address) => column.append(shown_address(*address)),
    }
}

fn named(columns: Vec<(String, String)>) -> Result<Vec<(String, Kind)>, CoreError> {
    columns
        .into_iter()
        .map(|(name, kind)| Ok((name, Kind::named(&kind)?)))
        .collect()
}

#[allow(clippy::needless_pass_by_value)] // as map_err hands it over
fn refused(error: CoreError) -> PyErr {
    PyValueError::new_err(error.to_string())
}

/// Adds this module's names to `_native`.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<RowFormatter>()?;
    module.add_class::<RowReader>()
}
