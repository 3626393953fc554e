//! From the arguments of `log_event` to an event.
//!
//! Only plain arguments are taken here (exact types, within their bounds). For anything else the answer is
//! None, and Python's `entry.py`, which has the words for what is wrong, looks at it.
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use dotmac_core::anomaly::{Facts, RateDetector};
use dotmac_core::audit::event::{self, AHEAD, Event};
use dotmac_core::audit::ids::{Times, time_of, uuid7};
use dotmac_core::audit::leaf::Fields;
use dotmac_core::error::CoreError;
use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyInt, PyList, PyString};

use crate::plain::{NotPlain, Plain, is_uuid, json_object};
use crate::screen::Screens;

const CHANCE_BYTES: usize = 2_048;

/// A core error as `ValueError`.
#[allow(clippy::needless_pass_by_value)] // as map_err wants it
pub fn wrong(error: CoreError) -> PyErr {
    PyValueError::new_err(error.to_string())
}

/// Microseconds since 1970.
pub fn now_us() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
    })
}

/// Its content, whoever panicked with it in hand.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An event on its way to the database.
#[pyclass(module = "dotmac.platform._native", name = "AuditEntry", frozen)]
pub struct Entry {
    /// As the core has it.
    pub event: Event,
    /// A UUID as a number, as `uuid.UUID(int=…)` takes it.
    #[pyo3(get)]
    id: u128,
    /// Microseconds since 1970.
    #[pyo3(get)]
    occurred_at: i64,
    /// None where no detector looked at it.
    #[pyo3(get)]
    score: Option<f64>,
    /// Bytes, roughly, that it takes on its way.
    #[pyo3(get)]
    size: usize,
}

impl Entry {
    fn new(event: Event, id: [u8; 16], occurred_at: i64, score: Option<f64>) -> Self {
        let size = event.row.len() + 512;
        Self {
            event,
            id: u128::from_be_bytes(id),
            occurred_at,
            score,
            size,
        }
    }
}

#[pymethods]
impl Entry {
    /// Its columns, to be kept elsewhere meanwhile.
    fn row<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.event.row)
    }

    /// From columns that `row` gave.
    #[staticmethod]
    #[pyo3(signature = (row, /, *, hashed))]
    fn from_row(row: &[u8], hashed: bool) -> PyResult<Self> {
        let event = Event::from_row(row, hashed).map_err(wrong)?;
        let fields = event.fields().map_err(wrong)?;
        let (id, at, score) = (fields.id, fields.occurred_at, fields.anomaly_score);
        Ok(Self::new(event, id, at, score))
    }

    /// The same event with another id of the same time.
    #[pyo3(signature = (chance, /))]
    fn renamed(&self, chance: u64) -> PyResult<Self> {
        let mut fields = self.event.fields().map_err(wrong)?;
        fields.id = uuid7(fields.occurred_at, chance);
        let (id, hashed) = (fields.id, self.event.leaf.is_some());
        let event = Event::new(&fields, false, hashed).map_err(wrong)?;
        Ok(Self::new(event, id, self.occurred_at, self.score))
    }

    /// All that it says, by column; JSON as text.
    fn fields<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let fields = self.event.fields().map_err(wrong)?;
        let address = fields.ip_address.map(|address| address.to_string());
        let told = PyDict::new(py);
        told.set_item("occurred_at", fields.occurred_at)?;
        told.set_item("id", u128::from_be_bytes(fields.id))?;
        for (name, value) in [
            ("category", Some(fields.category)),
            ("action", Some(fields.action)),
            ("level", Some(fields.level)),
            ("outcome", Some(fields.outcome)),
            ("user_id", fields.user_id),
            ("tenant_id", fields.tenant_id),
            ("resource_type", fields.resource_type),
            ("resource_id", fields.resource_id),
            ("ip_address", address.as_deref()),
            ("correlation_id", fields.correlation_id),
            ("trace_id", fields.trace_id),
            ("span_id", fields.span_id),
            ("subject_id", fields.subject_id),
            ("metadata", fields.metadata),
            ("personal", fields.personal),
            ("anomaly_reasons", fields.anomaly_reasons),
        ] {
            told.set_item(name, value)?;
        }
        told.set_item("anomaly_score", fields.anomaly_score)?;
        Ok(told)
    }
}

/// Arguments of `log_event`, in its order; None for those that were left out.
#[derive(Default)]
struct Arguments<'a, 'py> {
    category: Option<&'a Bound<'py, PyAny>>,
    action: Option<&'a Bound<'py, PyAny>>,
    level: Option<&'a Bound<'py, PyAny>>,
    outcome: Option<&'a Bound<'py, PyAny>>,
    user_id: Option<&'a Bound<'py, PyAny>>,
    tenant_id: Option<&'a Bound<'py, PyAny>>,
    resource_type: Option<&'a Bound<'py, PyAny>>,
    resource_id: Option<&'a Bound<'py, PyAny>>,
    ip_address: Option<&'a Bound<'py, PyAny>>,
    correlation_id: Option<&'a Bound<'py, PyAny>>,
    metadata: Option<&'a Bound<'py, PyAny>>,
    personal: Option<&'a Bound<'py, PyAny>>,
    subject_id: Option<&'a Bound<'py, PyAny>>,
    occurred_at: Option<&'a Bound<'py, PyAny>>,
    id: Option<&'a Bound<'py, PyAny>>,
}

struct Source {
    times: Times,
    chance: Vec<u8>,
}

impl Source {
    /// 62 bits that nobody can guess.
    fn chance(&mut self) -> PyResult<u64> {
        if self.chance.is_empty() {
            self.chance.resize(CHANCE_BYTES, 0);
            getrandom::fill(&mut self.chance)
                .map_err(|error| PyOSError::new_err(error.to_string()))?;
        }
        let rest = self.chance.len() - 8;
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.chance[rest..]);
        self.chance.truncate(rest);
        Ok(u64::from_ne_bytes(bytes))
    }
}

/// Makes events of one process: checks arguments, gives times and ids, scores, hashes.
#[pyclass(module = "dotmac.platform._native", name = "AuditEncoder", frozen)]
pub struct Encoder {
    categories: Vec<String>,
    levels: Vec<String>,
    outcomes: Vec<String>,
    hashed: bool,
    detector: Option<Mutex<RateDetector>>,
    source: Mutex<Source>,
    clock: Option<Py<PyAny>>,
}

#[pymethods]
impl Encoder {
    #[new]
    #[pyo3(signature = (categories, levels, outcomes, *, hashed, capacity = 0, seed = 0, clock = None))]
    fn new(
        categories: Vec<String>,
        levels: Vec<String>,
        outcomes: Vec<String>,
        hashed: bool,
        capacity: usize,
        seed: u64,
        clock: Option<Py<PyAny>>,
    ) -> PyResult<Self> {
        let detector = match capacity {
            0 => None,
            capacity => Some(Mutex::new(
                RateDetector::new(capacity, seed).map_err(wrong)?,
            )),
        };
        Ok(Self {
            categories,
            levels,
            outcomes,
            hashed,
            detector,
            source: Mutex::new(Source {
                times: Times::default(),
                chance: Vec::new(),
            }),
            clock,
        })
    }

    /// An event from the arguments of `log_event`; None unless all of them are plain and, where screens are
    /// given, nothing is to be redacted.
    #[pyo3(signature = (screens, trace, category, action, level, outcome, user_id, tenant_id, resource_type,
        resource_id, ip_address, correlation_id, metadata, personal, subject_id, occurred_at, id, /))]
    #[allow(clippy::too_many_arguments, clippy::needless_pass_by_value)] // those of log_event; as PyO3 makes them
    fn entry(
        &self,
        py: Python<'_>,
        screens: Option<&Bound<'_, Screens>>,
        trace: Option<(String, String)>,
        category: Option<&Bound<'_, PyAny>>,
        action: Option<&Bound<'_, PyAny>>,
        level: Option<&Bound<'_, PyAny>>,
        outcome: Option<&Bound<'_, PyAny>>,
        user_id: Option<&Bound<'_, PyAny>>,
        tenant_id: Option<&Bound<'_, PyAny>>,
        resource_type: Option<&Bound<'_, PyAny>>,
        resource_id: Option<&Bound<'_, PyAny>>,
        ip_address: Option<&Bound<'_, PyAny>>,
        correlation_id: Option<&Bound<'_, PyAny>>,
        metadata: Option<&Bound<'_, PyAny>>,
        personal: Option<&Bound<'_, PyAny>>,
        subject_id: Option<&Bound<'_, PyAny>>,
        occurred_at: Option<&Bound<'_, PyAny>>,
        id: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Option<Entry>> {
        let given = Arguments {
            category,
            action,
            level,
            outcome,
            user_id,
            tenant_id,
            resource_type,
            resource_id,
            ip_address,
            correlation_id,
            metadata,
            personal,
            subject_id,
            occurred_at,
            id,
        };
        if screens.is_some_and(|screens| !self.passes(screens.get(), &given)) {
            return Ok(None);
        }
        self.make(py, &given, trace.as_ref())
    }

    /// The places of those mappings in which something may have to be redacted or sealed.
    #[pyo3(signature = (screens, items, /))]
    fn flagged(&self, screens: &Screens, items: &Bound<'_, PyList>) -> Vec<usize> {
        let items = items.iter().enumerate();
        items
            .filter(|(_, item)| !self.passes_item(screens, item))
            .map(|(place, _)| place)
            .collect()
    }

    /// Events from mappings of such arguments, up to the first that is not plain.
    #[pyo3(signature = (trace, items, begin, /))]
    #[allow(clippy::needless_pass_by_value)] // as PyO3 makes it
    fn entries<'py>(
        &self,
        py: Python<'py>,
        trace: Option<(String, String)>,
        items: &Bound<'py, PyList>,
        begin: usize,
    ) -> PyResult<Bound<'py, PyList>> {
        let made = PyList::empty(py);
        for item in items.iter().skip(begin) {
            let Ok(item) = item.cast_exact::<PyDict>() else {
                break;
            };
            let pairs: Vec<(Bound<'py, PyAny>, Bound<'py, PyAny>)> = item.iter().collect();
            let Some(given) = arguments(&pairs) else {
                break;
            };
            let Some(entry) = self.make(py, &given, trace.as_ref())? else {
                break;
            };
            made.append(entry)?;
        }
        Ok(made)
    }

    /// 62 bits that nobody can guess.
    fn chance(&self) -> PyResult<u64> {
        lock(&self.source).chance()
    }
}

fn arguments<'a, 'py>(
    pairs: &'a [(Bound<'py, PyAny>, Bound<'py, PyAny>)],
) -> Option<Arguments<'a, 'py>> {
    let mut given = Arguments::default();
    for (name, value) in pairs {
        let name = name.cast_exact::<PyString>().ok()?.to_str().ok()?;
        let place = match name {
            "category" => &mut given.category,
            "action" => &mut given.action,
            "level" => &mut given.level,
            "outcome" => &mut given.outcome,
            "user_id" => &mut given.user_id,
            "tenant_id" => &mut given.tenant_id,
            "resource_type" => &mut given.resource_type,
            "resource_id" => &mut given.resource_id,
            "ip_address" => &mut given.ip_address,
            "correlation_id" => &mut given.correlation_id,
            "metadata" => &mut given.metadata,
            "personal" => &mut given.personal,
            "subject_id" => &mut given.subject_id,
            "occurred_at" => &mut given.occurred_at,
            "id" => &mut given.id,
            _ => return None,
        };
        *place = Some(value).filter(|value| !value.is_none());
    }
    Some(given)
}

impl Encoder {
    fn passes_item(&self, screens: &Screens, item: &Bound<'_, PyAny>) -> bool {
        let Ok(item) = item.cast_exact::<PyDict>() else {
            return false;
        };
        let pairs: Vec<(Bound<'_, PyAny>, Bound<'_, PyAny>)> = item.iter().collect();
        arguments(&pairs).is_some_and(|given| self.passes(screens, &given))
    }

    /// Is surely nothing to be redacted, and nothing to be sealed?
    fn passes(&self, screens: &Screens, given: &Arguments<'_, '_>) -> bool {
        let texts = [
            given.action,
            given.user_id,
            given.tenant_id,
            given.resource_type,
            given.resource_id,
            given.ip_address,
            given.correlation_id,
            given.subject_id,
        ];
        given.personal.is_none()
            && place_of(&self.categories, given.category)
                .is_ok_and(|category| screens.pass(category, texts, given.metadata))
    }

    fn make(
        &self,
        py: Python<'_>,
        given: &Arguments<'_, '_>,
        trace: Option<&(String, String)>,
    ) -> PyResult<Option<Entry>> {
        let now = match &self.clock {
            None => now_us(),
            Some(clock) => clock.call0(py)?.extract(py)?,
        };
        let (moment, id) = {
            let mut source = lock(&self.source);
            match moment_of(given, now, &mut source.times) {
                Ok((moment, Some(id))) => (moment, id),
                Ok((moment, None)) => (moment, uuid7(moment, source.chance()?)),
                Err(NotPlain) => return Ok(None),
            }
        };
        match self.encode(given, trace, moment, id) {
            Ok(made) => made.map(Some).map_err(wrong),
            Err(NotPlain) => Ok(None),
        }
    }

    fn encode(
        &self,
        given: &Arguments<'_, '_>,
        trace: Option<&(String, String)>,
        occurred_at: i64,
        id: [u8; 16],
    ) -> Plain<Result<Entry, CoreError>> {
        let mut known = true;
        let mut metadata = String::from("{}");
        if let Some(given) = given.metadata {
            metadata = json_object(given, &mut known)?;
        }
        let personal = match given.personal {
            Some(given) => Some(json_object(given, &mut known)?),
            None => None,
        };
        let action = needed_text(given.action)?;
        let outcome = match given.outcome {
            Some(outcome) => choice(&self.outcomes, Some(outcome))?,
            None => event::guess_outcome(&action),
        };
        let (user, tenant) = (text(given.user_id)?, text(given.tenant_id)?);
        let resource_type = text(given.resource_type)?;
        let resource_id = text(given.resource_id)?;
        let correlation = text(given.correlation_id)?;
        let subject = text(given.subject_id)?;
        let address = address_of(given)?;
        let category = choice(&self.categories, given.category)?;
        let mut fields = Fields {
            occurred_at,
            id,
            category,
            action: &action,
            level: match given.level {
                Some(level) => choice(&self.levels, Some(level))?,
                None => "info",
            },
            outcome,
            user_id: user.as_deref(),
            tenant_id: tenant.as_deref(),
            resource_type: resource_type.as_deref(),
            resource_id: resource_id.as_deref(),
            ip_address: address.map(Into::into),
            correlation_id: correlation.as_deref(),
            trace_id: trace.map(|trace| trace.0.as_str()),
            span_id: trace.map(|trace| trace.1.as_str()),
            subject_id: subject.as_deref(),
            metadata: Some(&metadata),
            personal: personal.as_deref(),
            anomaly_score: None,
            anomaly_reasons: None,
        };
        let reasons = self.score(&mut fields);
        fields.anomaly_reasons = reasons.as_deref();
        let score = fields.anomaly_score;
        let made = Event::new(&fields, known, self.hashed);
        Ok(made.map(|made| Entry::new(made, id, occurred_at, score)))
    }

    fn score(&self, fields: &mut Fields<'_>) -> Option<String> {
        let detector = self.detector.as_ref()?;
        let address = fields.ip_address.map(|address| address.to_string());
        let facts = Facts {
            time_us: fields.occurred_at,
            noun: event::noun_of(fields.category),
            failed: event::is_failed(fields.outcome),
            user: fields.user_id,
            address: address.as_deref(),
            tenant: fields.tenant_id,
            action: Some(fields.action),
        };
        let verdict = lock(detector).score(&facts);
        fields.anomaly_score = Some(verdict.score);
        if verdict.reasons.is_empty() {
            return None;
        }
        let texts = verdict.reasons.iter().map(|reason| reason.text.as_str());
        Some(event::reasons_json(texts).into_owned())
    }
}

fn moment_of(
    given: &Arguments<'_, '_>,
    now: i64,
    times: &mut Times,
) -> Plain<(i64, Option<[u8; 16]>)> {
    let id: Option<[u8; 16]> = match given.id {
        None => None,
        Some(id) => {
            let bytes = id
                .getattr(intern!(id.py(), "bytes"))
                .map_err(|_| NotPlain)?;
            Some(bytes.extract().map_err(|_| NotPlain)?)
        }
    };
    let stated = match (given.occurred_at, &id) {
        (None, None) => return Ok((times.next(now).max(0), None)),
        (None, Some(id)) => time_of(id).ok_or(NotPlain)?,
        (Some(moment), _) => {
            // A double holds the microseconds of thousands of years exactly.
            let seconds = moment
                .call_method0(intern!(moment.py(), "timestamp"))
                .and_then(|seconds| seconds.extract::<f64>())
                .map_err(|_| NotPlain)?;
            (seconds * 1e6).round() as i64
        }
    };
    if (0..=now.saturating_add(AHEAD)).contains(&stated) {
        Ok((stated, id))
    } else {
        Err(NotPlain)
    }
}

/// The known name that is meant: a member, or its name in capitals.
fn choice<'a>(known: &'a [String], value: Option<&Bound<'_, PyAny>>) -> Plain<&'a str> {
    place_of(known, value).map(|place| known[place].as_str())
}

fn place_of(known: &[String], value: Option<&Bound<'_, PyAny>>) -> Plain<usize> {
    let text = value.ok_or(NotPlain)?.cast::<PyString>();
    let text = text.map_err(|_| NotPlain)?.to_str().map_err(|_| NotPlain)?;
    let mut known = known.iter();
    known
        .position(|name| name.eq_ignore_ascii_case(text))
        .ok_or(NotPlain)
}

fn text(value: Option<&Bound<'_, PyAny>>) -> Plain<Option<String>> {
    let Some(value) = value else {
        return Ok(None);
    };
    if let Ok(text) = value.cast_exact::<PyString>() {
        let text = text.to_str().map_err(|_| NotPlain)?;
        if event::is_plain_text(text) {
            return Ok(Some(text.to_owned()));
        }
    } else if let Ok(number) = value.cast_exact::<PyInt>() {
        return number
            .extract::<i64>()
            .map(|number| Some(number.to_string()))
            .map_err(|_| NotPlain);
    } else if is_uuid(value) {
        let text = value.str().map_err(|_| NotPlain)?;
        return Ok(Some(text.to_str().map_err(|_| NotPlain)?.to_owned()));
    }
    Err(NotPlain)
}

fn needed_text(value: Option<&Bound<'_, PyAny>>) -> Plain<String> {
    let value = value.filter(|value| value.is_exact_instance_of::<PyString>());
    let text = text(value)?.ok_or(NotPlain)?;
    if text.trim().is_empty() {
        Err(NotPlain)
    } else {
        Ok(text)
    }
}

fn address_of(given: &Arguments<'_, '_>) -> Plain<Option<IpAddr>> {
    let plain = |value: &Bound<'_, PyAny>| {
        let text = value.cast_exact::<PyString>().ok()?.to_str().ok()?;
        event::peer_address(text)
    };
    if let Some(stated) = given.ip_address {
        return plain(stated).map(Some).ok_or(NotPlain);
    }
    let Some(metadata) = given.metadata else {
        return Ok(None);
    };
    let metadata = metadata.cast::<PyDict>().map_err(|_| NotPlain)?;
    match metadata.get_item(intern!(metadata.py(), "ip_address")) {
        Ok(found) => Ok(found.and_then(|found| plain(&found))),
        Err(_) => Err(NotPlain),
    }
}

/// Adds this module's names to `_native`.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Entry>()?;
    module.add_class::<Encoder>()
}
