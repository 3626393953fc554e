//! Translation of the core's audit proofs and checks.
use std::collections::HashMap;
use std::sync::Mutex;

use dotmac_core::audit::chains::{self, Broken, Chains, What};
use dotmac_core::audit::check::{Checker, EXPECTED_COLUMNS, Finding};
use dotmac_core::audit::copy::{Events, MORE, Pieces};
use dotmac_core::audit::log::{self, Claim, Logs};
use dotmac_core::audit::merkle::Tree;
use dotmac_core::audit::{Hash, proofs, row};
use dotmac_core::error::CoreError;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::PyBytes;

use crate::events::lock;

type Told = (
    &'static str,
    [u8; 16],
    Option<usize>,
    Option<[u8; 16]>,
    String,
    String,
);
type Outcome = (Vec<Told>, usize, Vec<([u8; 16], usize, [u8; 16])>, usize);

fn refused(error: &CoreError) -> PyErr {
    PyValueError::new_err(error.to_string())
}

/// What the check says to the next piece of a copy; the interpreter goes on meanwhile.
fn fed<Check: Send, Told: Send>(
    py: Python<'_>,
    check: &Mutex<Check>,
    piece: &[u8],
    feed: fn(&mut Check, &[u8]) -> Result<Told, CoreError>,
) -> PyResult<Told> {
    py.detach(|| feed(&mut lock(check), piece))
        .map_err(|error| refused(&error))
}

fn hashes(bytes: &[u8]) -> PyResult<&[Hash]> {
    match bytes.as_chunks() {
        (hashes, []) => Ok(hashes),
        _ => Err(PyValueError::new_err(
            "hashes of 32 bytes each are wanted, one after another",
        )),
    }
}

/// A Merkle tree (RFC 6962) that grows leaf by leaf.
#[pyclass(module = "dotmac.platform._native", frozen)]
pub struct MerkleTree(Mutex<Tree>);

#[pymethods]
impl MerkleTree {
    #[new]
    fn new() -> Self {
        Self(Mutex::new(Tree::new()))
    }

    /// Appends leaf hashes, one after another in `leaves`.
    fn extend(&self, leaves: &[u8]) -> PyResult<()> {
        let mut tree = lock(&self.0);
        tree.extend(hashes(leaves)?.iter().copied());
        Ok(())
    }

    /// The root so far.
    fn root<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        let tree = lock(&self.0);
        PyBytes::new(py, &tree.root())
    }

    /// The tree as it is now, which goes on by itself.
    fn copy(&self) -> Self {
        Self(Mutex::new(lock(&self.0).clone()))
    }

    fn __len__(&self) -> usize {
        lock(&self.0).size() as usize
    }
}

/// The proof that the leaf at `index` is in the tree (RFC 9162, section 2.1.3).
#[pyfunction]
#[pyo3(signature = (leaves, index, /))]
fn merkle_inclusion(py: Python<'_>, leaves: &[u8], index: usize) -> PyResult<Vec<Py<PyBytes>>> {
    let leaves = hashes(leaves)?;
    let path = py.detach(|| proofs::inclusion(leaves, index));
    path.map(|path| as_bytes(py, &path))
        .ok_or_else(|| PyValueError::new_err("there is no leaf of that index"))
}

/// The root that a leaf's proof leads to, or None where the proof has the wrong length.
#[pyfunction]
#[pyo3(signature = (leaf, index, size, path, /))]
#[allow(clippy::needless_pass_by_value)] // as PyO3 makes it
fn merkle_root_of_inclusion(
    py: Python<'_>,
    leaf: Hash,
    index: u64,
    size: u64,
    path: Vec<Hash>,
) -> Option<Py<PyBytes>> {
    let root = proofs::root_of_inclusion(leaf, index, size, &path);
    root.map(|root| PyBytes::new(py, &root).unbind())
}

/// The proof that the tree goes on from its first `old` leaves (RFC 9162, section 2.1.4).
#[pyfunction]
#[pyo3(signature = (leaves, old, /))]
fn merkle_consistency(py: Python<'_>, leaves: &[u8], old: usize) -> PyResult<Vec<Py<PyBytes>>> {
    let leaves = hashes(leaves)?;
    let path = py.detach(|| proofs::consistency(leaves, old));
    path.map(|path| as_bytes(py, &path))
        .ok_or_else(|| PyValueError::new_err("there are fewer leaves than that"))
}

/// Does the tree of the new size and root go on from the old one?
#[pyfunction]
#[pyo3(signature = (old_size, old_root, new_size, new_root, path, /))]
#[allow(clippy::needless_pass_by_value)] // as PyO3 makes it
fn merkle_is_consistent(
    old_size: u64,
    old_root: Hash,
    new_size: u64,
    new_root: Hash,
    path: Vec<Hash>,
) -> bool {
    proofs::is_consistent((old_size, old_root), (new_size, new_root), &path)
}

fn as_bytes(py: Python<'_>, path: &[Hash]) -> Vec<Py<PyBytes>> {
    let steps = path.iter();
    steps.map(|hash| PyBytes::new(py, hash).unbind()).collect()
}

/// Checks copied events against their segments; see the core crate.
#[pyclass(module = "dotmac.platform._native", frozen)]
pub struct SegmentCheck(Mutex<Checker>);

#[pymethods]
impl SegmentCheck {
    #[new]
    fn new() -> Self {
        Self(Mutex::new(Checker::default()))
    }

    /// Takes the next piece of `COPY (SELECT AUDIT_EXPECTED_COLUMNS …) TO STDOUT (FORMAT binary)`, which tells
    /// of the segments; returns how many have come so far.
    #[allow(clippy::needless_pass_by_value)] // it is handed to Rust whole, so that the interpreter may go on
    fn expect(&self, py: Python<'_>, piece: PyBackedBytes) -> PyResult<usize> {
        fed(py, &self.0, &piece, Checker::expect)
    }

    /// Takes the next piece of `COPY (SELECT AUDIT_CHECK_COLUMNS …) TO STDOUT (FORMAT binary)`.
    #[allow(clippy::needless_pass_by_value)] // as above
    fn feed(&self, py: Python<'_>, piece: PyBackedBytes) -> PyResult<()> {
        fed(py, &self.0, &piece, Checker::feed)
    }

    /// Findings (kind, segment, place, event, expected, found), how many more there are, events of other
    /// segments (segment, count, one event), events read. The check is empty then.
    fn finish(&self, py: Python<'_>) -> PyResult<Outcome> {
        let outcome = py
            .detach(|| {
                let mut checker = lock(&self.0);
                std::mem::take(&mut *checker).finish()
            })
            .map_err(|error| refused(&error))?;
        let told = outcome.findings.into_iter().map(told).collect();
        Ok((told, outcome.untold, outcome.strangers, outcome.events))
    }
}

type Link = (
    [u8; 16],
    [u8; 16],
    String,
    i64,
    Option<i64>,
    Option<(String, String)>,
);

/// Checks the chains of segments; see the core crate.
#[pyclass(module = "dotmac.platform._native", frozen)]
pub struct ChainCheck(Mutex<Chains>);

#[pymethods]
impl ChainCheck {
    /// `most`: findings of each kind that are kept; others are counted.
    #[new]
    fn new(most: usize) -> Self {
        Self(Mutex::new(Chains::new(most)))
    }

    /// Takes the next piece of `COPY (SELECT AUDIT_CHAIN_COLUMNS … ORDER BY writer, tenant_id, seq) TO STDOUT
    /// (FORMAT binary)`; returns how many segments have come so far.
    #[allow(clippy::needless_pass_by_value)] // as above
    fn feed(&self, py: Python<'_>, piece: PyBackedBytes) -> PyResult<usize> {
        fed(py, &self.0, &piece, Chains::feed)
    }

    /// Findings (segment, writer, tenant, number, the number that comes next or None, None or the link that
    /// is stored and the one that follows), how many gaps there are, how many wrong links. The check is empty
    /// then.
    fn finish(&self) -> PyResult<(Vec<Link>, usize, usize)> {
        let mut chains = lock(&self.0);
        let finished = std::mem::take(&mut *chains).finish();
        let (found, gaps, links) = finished.map_err(|error| refused(&error))?;
        Ok((found.into_iter().map(link).collect(), gaps, links))
    }
}

fn link(one: Broken) -> Link {
    let (gap, links) = match one.what {
        What::Gap(wanted) => (Some(wanted), None),
        What::Link(stored, follows) => (None, Some((stored, follows))),
    };
    (one.segment, one.writer, one.tenant_id, one.seq, gap, links)
}

type LogFinding = (
    &'static str,
    String,
    Option<[u8; 16]>,
    i64,
    String,
    String,
    String,
);

/// Checks the tenants' logs; see the core crate.
#[pyclass(module = "dotmac.platform._native", frozen)]
pub struct LogCheck(Mutex<Logs>);

#[pymethods]
impl LogCheck {
    /// `most`: findings of each kind that are kept; others are counted.
    #[new]
    fn new(most: usize) -> Self {
        Self(Mutex::new(Logs::new(most)))
    }

    /// A checkpoint's root, and who says so; by tenant and size, before the entry at that size.
    #[pyo3(signature = (tenant, size, root, source, /))]
    fn expect(&self, tenant: String, size: u64, root: Hash, source: String) {
        let mut logs = lock(&self.0);
        logs.expect(Claim {
            tenant,
            size,
            root,
            source,
        });
    }

    /// Takes the next piece of `COPY (SELECT AUDIT_LOG_COLUMNS … ORDER BY l.tenant_id, l.position) TO STDOUT
    /// (FORMAT binary)`; returns how many entries have come so far.
    #[allow(clippy::needless_pass_by_value)] // as above
    fn feed(&self, py: Python<'_>, piece: PyBackedBytes) -> PyResult<usize> {
        fed(py, &self.0, &piece, Logs::feed)
    }

    /// A copy has come to its end; another may go on from there. `upto`: of the tenants before that one there
    /// are no more entries.
    #[pyo3(signature = (upto, /))]
    fn end_copy(&self, upto: Option<&str>) -> PyResult<()> {
        let mut logs = lock(&self.0);
        logs.end_copy(upto).map_err(|error| refused(&error))
    }

    /// Findings (kind, tenant, segment, place, expected, found, source), and how many there are of each kind.
    /// The check is empty then.
    fn finish(&self) -> (Vec<LogFinding>, HashMap<&'static str, usize>) {
        let mut logs = lock(&self.0);
        let (found, counts) = std::mem::take(&mut *logs).finish();
        let counts = counts
            .into_iter()
            .map(|(kind, count)| (kind.name(), count))
            .collect();
        (found.into_iter().map(log_finding).collect(), counts)
    }
}

fn log_finding(one: log::Finding) -> LogFinding {
    (
        one.kind.name(),
        one.tenant,
        one.segment,
        one.place,
        one.expected,
        one.found,
        one.source,
    )
}

fn told(one: Finding) -> Told {
    (
        one.kind.name(),
        one.segment,
        one.place,
        one.event,
        one.expected,
        one.found,
    )
}

/// The events of a copy: place, id, canonical bytes (RFC 8785).
#[pyfunction]
#[pyo3(signature = (copied, /))]
#[allow(clippy::type_complexity)]
fn canonical_events(
    py: Python<'_>,
    copied: &[u8],
) -> PyResult<Vec<(Option<i32>, [u8; 16], Py<PyBytes>)>> {
    let mut found = Vec::new();
    let mut reader = Pieces::<Events>::default();
    let read = reader.feed(copied, |row| {
        let mut bytes = Vec::new();
        let written = row.fields.canonical(&mut bytes);
        found.push(written.map(|()| (row.leaf, row.fields.id, PyBytes::new(py, &bytes).unbind())));
    });
    read.map_err(|error| refused(&error))?;
    let found: Result<Vec<_>, _> = found.into_iter().collect();
    found.map_err(|error| refused(&error))
}

/// Adds this module's names to `_native`.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add(
        "AUDIT_CHECK_COLUMNS",
        [&row::COLUMNS[..], &MORE[..]].concat(),
    )?;
    module.add("AUDIT_EXPECTED_COLUMNS", EXPECTED_COLUMNS)?;
    module.add("AUDIT_CHAIN_COLUMNS", chains::COLUMNS)?;
    module.add("AUDIT_LOG_COLUMNS", log::COLUMNS)?;
    module.add_class::<MerkleTree>()?;
    module.add_class::<ChainCheck>()?;
    module.add_class::<LogCheck>()?;
    module.add_class::<SegmentCheck>()?;
    module.add_function(wrap_pyfunction!(merkle_inclusion, module)?)?;
    module.add_function(wrap_pyfunction!(merkle_root_of_inclusion, module)?)?;
    module.add_function(wrap_pyfunction!(merkle_consistency, module)?)?;
    module.add_function(wrap_pyfunction!(merkle_is_consistent, module)?)?;
    module.add_function(wrap_pyfunction!(canonical_events, module)?)
}
