//! A quick look that tells of most events that nothing in them is to be redacted.
//!
//! What redaction rules look for in texts has hints (`=`, `://`, `eyJ` …): without any of them there is no such
//! place. Keys that no rule is about are learnt from the rules themselves, in `redaction.py`. Whatever is not
//! surely harmless is looked at there.
use std::collections::HashSet;
use std::sync::RwLock;

use aho_corasick::AhoCorasick;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict, PyFloat, PyInt, PyList, PyString};

use crate::plain::is_uuid;

/// Keys that are remembered.
const MOST_KEYS: usize = 4_096;
/// More than an event may have; what is deeper is refused later.
const MAX_DEPTH: usize = 40;

/// What the rules of one category look for.
#[pyclass(module = "dotmac.platform._native", name = "AuditScreen", frozen)]
pub struct Screen {
    /// None where the rules look for what has no hint.
    hints: Option<AhoCorasick>,
    harmless: RwLock<HashSet<String>>,
}

#[pymethods]
impl Screen {
    #[new]
    #[pyo3(signature = (hints, /))]
    #[allow(clippy::needless_pass_by_value)] // as PyO3 makes it
    fn new(hints: Option<Vec<String>>) -> PyResult<Self> {
        let hints = hints.map(AhoCorasick::new).transpose();
        Ok(Self {
            hints: hints.map_err(|error| PyValueError::new_err(error.to_string()))?,
            harmless: RwLock::default(),
        })
    }

    /// Note that no rule is about this key of metadata.
    #[pyo3(signature = (key, /))]
    fn learn(&self, key: &Bound<'_, PyString>) {
        // Half a surrogate pair is refused later. The lock is never waited for: in a child of a fork, who holds it
        // may not exist.
        if let (Ok(key), Ok(mut harmless)) = (key.to_str(), self.harmless.try_write())
            && harmless.len() < MOST_KEYS
        {
            harmless.insert(key.to_owned());
        }
    }
}

/// The screens of all categories, in the order in which the encoder has these; None where nothing is redacted.
#[pyclass(module = "dotmac.platform._native", name = "AuditScreens", frozen)]
pub struct Screens(Vec<Option<Py<Screen>>>);

#[pymethods]
impl Screens {
    #[new]
    #[pyo3(signature = (by_category, /))]
    fn new(by_category: Vec<Option<Py<Screen>>>) -> Self {
        Self(by_category)
    }
}

impl Screens {
    /// Does the screen of that category let these pass?
    pub fn pass<'a, 'py: 'a>(
        &self,
        category: usize,
        texts: impl IntoIterator<Item = Option<&'a Bound<'py, PyAny>>>,
        metadata: Option<&Bound<'py, PyAny>>,
    ) -> bool {
        match self.0.get(category) {
            Some(Some(screen)) => screen.get().passes(texts, metadata),
            Some(None) => true,
            None => false,
        }
    }
}

impl Screen {
    /// Is surely nothing to be redacted in these texts and in the metadata?
    fn passes<'a, 'py: 'a>(
        &self,
        texts: impl IntoIterator<Item = Option<&'a Bound<'py, PyAny>>>,
        metadata: Option<&Bound<'py, PyAny>>,
    ) -> bool {
        let (Some(hints), Ok(harmless)) = (&self.hints, self.harmless.try_read()) else {
            return false;
        };
        let look = Look {
            hints,
            harmless: &harmless,
        };
        texts
            .into_iter()
            .flatten()
            .all(|text| look.passes_text(text))
            && metadata.is_none_or(|metadata| {
                metadata
                    .cast_exact::<PyDict>()
                    .is_ok_and(|members| look.passes_members(members, 0))
            })
    }
}

struct Look<'a> {
    hints: &'a AhoCorasick,
    harmless: &'a HashSet<String>,
}

impl Look<'_> {
    /// What is neither a plain text nor surely none (Markup, an enumeration's member) does not pass.
    fn passes_text(&self, value: &Bound<'_, PyAny>) -> bool {
        match value.cast_exact::<PyString>() {
            Ok(text) => self.passes_str(text),
            Err(_) => {
                value.is_exact_instance_of::<PyInt>()
                    || value.is_exact_instance_of::<PyBool>()
                    || is_uuid(value)
            }
        }
    }

    fn passes_str(&self, text: &Bound<'_, PyString>) -> bool {
        text.to_str().is_ok_and(|text| !self.hints.is_match(text))
    }

    fn passes_members(&self, members: &Bound<'_, PyDict>, depth: usize) -> bool {
        members.iter().all(|(key, value)| {
            let known = key.cast_exact::<PyString>();
            let known =
                known.is_ok_and(|key| key.to_str().is_ok_and(|key| self.harmless.contains(key)));
            known && self.passes(&value, depth)
        })
    }

    fn passes(&self, value: &Bound<'_, PyAny>, depth: usize) -> bool {
        if let Ok(text) = value.cast_exact::<PyString>() {
            self.passes_str(text)
        } else if let Ok(members) = value.cast_exact::<PyDict>() {
            depth < MAX_DEPTH && self.passes_members(members, depth + 1)
        } else if let Ok(items) = value.cast_exact::<PyList>() {
            depth < MAX_DEPTH && items.iter().all(|item| self.passes(&item, depth + 1))
        } else {
            value.is_none()
                || value.is_exact_instance_of::<PyInt>()
                || value.is_exact_instance_of::<PyFloat>()
                || value.is_exact_instance_of::<PyBool>()
        }
    }
}

/// Adds this module's names to `_native`.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Screen>()?;
    module.add_class::<Screens>()
}
