//! Services as Python sees them: a snapshot read without I/O, and pickers that hand out the same object each time.
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dotmac_core::balance::{Balancer, Load, Strategy};
use dotmac_core::error::CoreError;
use dotmac_core::registry::{Filter, Instance, Status, Subset, Watch};
use dotmac_engine::clock;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::outcome;

fn guard<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn nanos() -> u64 {
    clock::now() * 1000
}

/// The object of each instance, by id.
type Objects = HashMap<String, (Arc<Instance>, Py<PyAny>)>;

/// What this process knows of one service.
#[pyclass(frozen, module = "dotmac.platform._native")]
pub struct Service {
    watch: Arc<Watch>,
    make: Py<PyAny>,
    objects: Mutex<Objects>,
}

impl Service {
    /// The service behind a watch. `make(json, healthy, epoch)` builds the object of an instance.
    pub fn new(watch: Arc<Watch>, make: Py<PyAny>) -> Self {
        Self {
            watch,
            make,
            objects: Mutex::default(),
        }
    }

    /// The objects of these instances, each built once. No lock is held while Python runs.
    fn objects(&self, py: Python<'_>, instances: &[Arc<Instance>]) -> PyResult<Vec<Py<PyAny>>> {
        let known: Vec<Option<Py<PyAny>>> = {
            let objects = guard(&self.objects);
            let same = |i: &Arc<Instance>| {
                objects
                    .get(&i.record.id)
                    .filter(|(known, _)| Arc::ptr_eq(known, i))
            };
            instances
                .iter()
                .map(|i| same(i).map(|(_, object)| object.clone_ref(py)))
                .collect()
        };
        let mut made = Vec::with_capacity(instances.len());
        for (instance, known) in instances.iter().zip(known) {
            made.push(match known {
                Some(object) => object,
                None => self.build(py, instance)?,
            });
        }
        Ok(made)
    }

    fn build(&self, py: Python<'_>, instance: &Arc<Instance>) -> PyResult<Py<PyAny>> {
        let up = instance.status == Status::Up;
        let object = self
            .make
            .call1(py, (instance.json.as_str(), up, instance.epoch))?;
        let current = self.watch.current().1;
        let mut objects = guard(&self.objects);
        if objects.len() > 2 * current.instances.len() + 16 {
            objects.retain(|_, (known, _)| current.instances.iter().any(|i| Arc::ptr_eq(i, known)));
        }
        let kept = objects
            .entry(instance.record.id.clone())
            .and_modify(|entry| {
                if !Arc::ptr_eq(&entry.0, instance) {
                    *entry = (Arc::clone(instance), object.clone_ref(py));
                }
            })
            .or_insert_with(|| (Arc::clone(instance), object.clone_ref(py)));
        Ok(kept.1.clone_ref(py))
    }
}

#[pymethods]
impl Service {
    /// Whether the server has answered at least once.
    #[getter]
    fn known(&self) -> bool {
        self.watch.generation() > 0
    }

    /// Whether the snapshot may be out of date.
    #[getter]
    fn stale(&self) -> bool {
        self.watch.is_stale()
    }

    /// How often one of its instances was picked, by any picker.
    #[getter]
    fn picks(&self) -> u64 {
        self.watch.picks()
    }

    /// Whether no instance is known.
    #[getter]
    fn empty(&self) -> bool {
        self.watch.current().1.instances.is_empty()
    }

    /// Stored records that could not be read.
    #[getter]
    fn malformed(&self) -> usize {
        self.watch.current().1.malformed
    }

    /// The instances that match a filter (JSON).
    fn instances(
        &self,
        py: Python<'_>,
        conditions: &str,
        healthy_only: bool,
    ) -> PyResult<Vec<Py<PyAny>>> {
        let filter = read_filter(py, conditions)?;
        let snapshot = self.watch.current().1;
        let wanted =
            |i: &&Arc<Instance>| filter.admits(i) && (!healthy_only || i.status == Status::Up);
        let instances: Vec<_> = snapshot
            .instances
            .iter()
            .filter(wanted)
            .map(Arc::clone)
            .collect();
        self.objects(py, &instances)
    }

    /// A picker among the instances that match a filter (JSON).
    fn picker(
        slf: Py<Self>,
        py: Python<'_>,
        strategy: &str,
        conditions: &str,
        panic: u32,
        seed: u64,
    ) -> PyResult<Picker> {
        let strategy = strategy.parse().map_err(|error| invalid(py, &error))?;
        let cached = Mutex::new(Cached {
            generation: u64::MAX,
            subset: Arc::new(Subset::default()),
            objects: Vec::new(),
        });
        let filter = read_filter(py, conditions)?;
        Ok(Picker {
            service: slf,
            filter,
            panic,
            balancer: Balancer::new(strategy, seed),
            cached,
        })
    }

    /// Calls in flight, calls finished, calls failed and expected latency (seconds) of an instance, counted here.
    fn load(&self, instance_id: &str) -> Option<(u32, u64, u64, f64)> {
        let snapshot = self.watch.current().1;
        let instance = snapshot
            .instances
            .iter()
            .find(|i| i.record.id == instance_id)?;
        let (finished, failed) = instance.load.finished();
        Some((
            instance.load.in_flight(),
            finished,
            failed,
            instance.load.latency(nanos()) / 1e9,
        ))
    }
}

struct Cached {
    generation: u64,
    subset: Arc<Subset>,
    objects: Vec<Py<PyAny>>,
}

/// Picks instances of one service, by one strategy, among those that match one filter.
#[pyclass(frozen, module = "dotmac.platform._native")]
pub struct Picker {
    service: Py<Service>,
    filter: Filter,
    panic: u32,
    balancer: Balancer,
    cached: Mutex<Cached>,
}

impl Picker {
    /// Takes over the newest snapshot. The lock is not held while Python builds objects.
    fn refresh(&self, py: Python<'_>) -> PyResult<()> {
        let service = self.service.get();
        let (generation, snapshot) = service.watch.current();
        let subset = snapshot.subset(&self.filter, self.panic);
        let objects = service.objects(py, &subset.instances)?;
        let before = std::mem::replace(
            &mut *guard(&self.cached),
            Cached {
                generation,
                subset,
                objects,
            },
        );
        drop(before);
        Ok(())
    }

    fn choose<T>(
        &self,
        py: Python<'_>,
        take: impl FnOnce(&Cached, usize) -> T,
    ) -> PyResult<Option<T>> {
        let mut cached = guard(&self.cached);
        if cached.generation != self.service.get().watch.generation() {
            drop(cached);
            self.refresh(py)?;
            cached = guard(&self.cached);
        }
        self.service.get().watch.count_pick();
        Ok(self
            .balancer
            .pick(&cached.subset.candidates, nanos)
            .map(|index| take(&cached, index)))
    }
}

#[pymethods]
impl Picker {
    /// The next instance; None where there is none.
    fn pick(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        self.choose(py, |cached, index| cached.objects[index].clone_ref(py))
    }

    /// The next instance, with a call to it counted until the ticket is finished or dropped.
    fn enter(&self, py: Python<'_>) -> PyResult<Option<(Py<PyAny>, Ticket)>> {
        self.choose(py, |cached, index| {
            let load = Arc::clone(&cached.subset.instances[index].load);
            load.begin();
            (
                cached.objects[index].clone_ref(py),
                Ticket {
                    load,
                    began: nanos(),
                    done: AtomicBool::new(false),
                },
            )
        })
    }

    /// How many match, how many of them are chosen from, and whether health is not believed.
    fn explain(&self, py: Python<'_>) -> PyResult<(usize, usize, bool)> {
        self.refresh(py)?;
        let cached = guard(&self.cached);
        Ok((
            cached.subset.matching,
            cached.subset.instances.len(),
            cached.subset.panicking,
        ))
    }
}

/// A call in flight.
#[pyclass(frozen, module = "dotmac.platform._native")]
pub struct Ticket {
    load: Arc<Load>,
    began: u64,
    done: AtomicBool,
}

#[pymethods]
impl Ticket {
    /// The call has ended, well or not; seconds that it took. Only the first time counts.
    fn finish(&self, ok: bool) -> f64 {
        let now = nanos();
        if !self.done.swap(true, Ordering::Relaxed) {
            self.load.end(self.began, now, ok);
        }
        now.saturating_sub(self.began) as f64 / 1e9
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if !self.done.swap(true, Ordering::Relaxed) {
            self.load.abandon();
        }
    }
}

fn read_filter(py: Python<'_>, json: &str) -> PyResult<Filter> {
    serde_json::from_str(json)
        .map_err(|error| outcome::error(py, "DotmacError", &format!("filter: {error}")))
}

fn invalid(py: Python<'_>, error: &CoreError) -> PyErr {
    let made = py
        .import("dotmac.platform.errors")
        .and_then(|errors| errors.getattr("InvalidArgument"));
    match (made, error) {
        (
            Ok(class),
            CoreError::Invalid {
                field,
                value,
                allowed,
            },
        ) => match class.call1((field, value, allowed)) {
            Ok(value) => PyErr::from_value(value),
            Err(failed) => failed,
        },
        (Ok(_), other) => outcome::error(py, "DotmacError", &other.to_string()),
        (Err(failed), _) => failed,
    }
}

/// Adds this module's names to `_native`.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add(
        "STRATEGIES",
        PyTuple::new(module.py(), Strategy::ALL.map(|(name, _)| name))?,
    )?;
    module.add_class::<Service>()?;
    module.add_class::<Picker>()?;
    module.add_class::<Ticket>()
}
