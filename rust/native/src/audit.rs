//! Translation of the core module of the same name.
use dotmac_core::audit::segment::Segment;
use dotmac_core::audit::{canonical, merkle, row};
use dotmac_core::error::CoreError;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

#[allow(clippy::needless_pass_by_value)] // as map_err wants it
fn wrong(error: CoreError) -> PyErr {
    PyValueError::new_err(error.to_string())
}

/// The canonical bytes (RFC 8785) of a JSON text.
#[pyfunction]
#[pyo3(signature = (text, /))]
fn canonical_json<'py>(py: Python<'py>, text: &str) -> PyResult<Bound<'py, PyBytes>> {
    let bytes = canonical::canonicalize(text).map_err(wrong)?;
    Ok(PyBytes::new(py, &bytes))
}

/// The leaf hashes of stored events, 32 bytes each, one after another; `copied`: COPY … (FORMAT binary) of
/// the columns in `AUDIT_COLUMNS`.
#[pyfunction]
#[pyo3(signature = (copied, /))]
fn leaf_hashes<'py>(py: Python<'py>, copied: &[u8]) -> PyResult<Bound<'py, PyBytes>> {
    let hashed: Result<Vec<u8>, CoreError> = py.detach(|| {
        let (mut scratch, mut out) = (Vec::new(), Vec::new());
        for stored in row::read_stream(copied) {
            out.extend_from_slice(&stored?.event.hash(&mut scratch)?);
        }
        Ok(out)
    });
    Ok(PyBytes::new(py, &hashed.map_err(wrong)?))
}

/// The Merkle tree hash (RFC 6962) over leaf hashes, 32 bytes each, one after another.
#[pyfunction]
#[pyo3(signature = (hashes, /))]
fn merkle_root<'py>(py: Python<'py>, hashes: &[u8]) -> PyResult<Bound<'py, PyBytes>> {
    let (leaves, rest) = hashes.as_chunks::<32>();
    if !rest.is_empty() {
        return Err(PyValueError::new_err("hashes: give 32 bytes for each"));
    }
    let root = py.detach(|| merkle::root_of(leaves.iter().copied()));
    Ok(PyBytes::new(py, &root))
}

/// What ties a segment to the one before it of the same writer and tenant.
#[pyfunction]
#[pyo3(signature = (before, packed, tenant_id, root, /))]
fn segment_link<'py>(
    py: Python<'py>,
    before: &[u8],
    packed: &[u8],
    tenant_id: &str,
    root: &[u8],
) -> PyResult<Bound<'py, PyBytes>> {
    let (segment, _) = Segment::unpack(packed, tenant_id, root).map_err(wrong)?;
    Ok(PyBytes::new(py, &segment.link(before)))
}

/// A segment's leaf in its tenant's log; `packed`: its columns of fixed width, one after another.
#[pyfunction]
#[pyo3(signature = (packed, tenant_id, root, link, /))]
fn segment_leaf<'py>(
    py: Python<'py>,
    packed: &[u8],
    tenant_id: &str,
    root: &[u8],
    link: &[u8],
) -> PyResult<Bound<'py, PyBytes>> {
    let (segment, recorded_at) = Segment::unpack(packed, tenant_id, root).map_err(wrong)?;
    Ok(PyBytes::new(py, &segment.leaf(link, recorded_at)))
}

/// Adds this module's names to `_native`.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("AUDIT_COLUMNS", row::COLUMNS)?;
    module.add_function(wrap_pyfunction!(canonical_json, module)?)?;
    module.add_function(wrap_pyfunction!(leaf_hashes, module)?)?;
    module.add_function(wrap_pyfunction!(merkle_root, module)?)?;
    module.add_function(wrap_pyfunction!(segment_leaf, module)?)?;
    module.add_function(wrap_pyfunction!(segment_link, module)?)
}
