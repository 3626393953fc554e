//! The instances of one service at one revision, and the subsets that filters leave.
use std::sync::{Arc, Mutex, PoisonError};

use super::filter::Filter;
use super::record::{Instance, Status};
use crate::balance::Candidates;

/// Below this share of healthy instances health is not believed: more likely the checks are wrong than
/// everything is down, and the few that are left would fall under the load of all.
pub const PANIC_PERCENT: u32 = 50;

/// How many filters' subsets a snapshot keeps.
const KEPT: usize = 64;

/// Immutable but for the cache of its subsets.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// The server's count of changes to the service, as text; empty before the first answer.
    pub revision: String,
    /// Which life of the server's data it comes from; empty before the first answer.
    pub epoch: String,
    /// In the order of their ids.
    pub instances: Vec<Arc<Instance>>,
    /// Stored values that could not be read, and were left out.
    pub malformed: usize,
    subsets: Mutex<Vec<(Filter, u32, Arc<Subset>)>>,
}

impl Snapshot {
    /// A snapshot of these instances, which must be in the order of their ids.
    pub fn new(
        epoch: String,
        revision: String,
        instances: Vec<Arc<Instance>>,
        malformed: usize,
    ) -> Self {
        Self {
            revision,
            epoch,
            instances,
            malformed,
            subsets: Mutex::default(),
        }
    }

    /// What the filter leaves to choose from; worked out once per filter. `panic_percent`: see [`PANIC_PERCENT`].
    pub fn subset(&self, filter: &Filter, panic_percent: u32) -> Arc<Subset> {
        let mut subsets = self.subsets.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, _, known)) = subsets
            .iter()
            .find(|(f, p, _)| f == filter && *p == panic_percent)
        {
            return Arc::clone(known);
        }
        let subset = Arc::new(Subset::new(&self.instances, filter, panic_percent));
        if subsets.len() == KEPT {
            subsets.remove(0);
        }
        subsets.push((filter.clone(), panic_percent, Arc::clone(&subset)));
        subset
    }
}

/// The instances that a filter leaves to choose from.
#[derive(Debug, Default)]
pub struct Subset {
    /// Those to choose from: the healthy ones, or all where too few are healthy.
    pub instances: Vec<Arc<Instance>>,
    /// How many match the filter, whatever their health.
    pub matching: usize,
    /// Whether health is not believed.
    pub panicking: bool,
    /// The same as `instances`, for the balancer.
    pub candidates: Candidates,
}

impl Subset {
    fn new(instances: &[Arc<Instance>], filter: &Filter, panic_percent: u32) -> Self {
        let mut chosen: Vec<_> = instances
            .iter()
            .filter(|i| filter.admits(i))
            .map(Arc::clone)
            .collect();
        let matching = chosen.len();
        let healthy = chosen.iter().filter(|i| i.status == Status::Up).count();
        let panicking = (healthy as u64) * 100 < matching as u64 * u64::from(panic_percent);
        if !panicking {
            chosen.retain(|i| i.status == Status::Up);
        }
        let candidates = chosen
            .iter()
            .map(|i| (i.record.weight, Arc::clone(&i.load)))
            .collect();
        Self {
            instances: chosen,
            matching,
            panicking,
            candidates: Candidates::new(candidates),
        }
    }
}
