//! One registered instance, and how it is written on the server.
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::balance::Load;
use crate::error::CoreError;

/// What a registration says; written once, as JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Unique in its service.
    pub id: String,
    /// The service that it is an instance of.
    pub name: String,
    /// Its version, free text.
    pub version: String,
    /// Host name or address.
    pub host: String,
    /// Port.
    pub port: u16,
    /// Tags, in the order in which they were given.
    #[serde(default)]
    pub tags: Vec<String>,
    /// Anything that JSON can say.
    #[serde(default)]
    pub metadata: Map<String, Value>,
    /// Where its health is asked for.
    #[serde(default)]
    pub health_check_url: Option<String>,
    /// Its share of the traffic.
    #[serde(default = "one")]
    pub weight: u32,
    /// Where it stands.
    #[serde(default)]
    pub zone: Option<String>,
    /// How long it outlives its last sign of life, seconds.
    pub ttl: f64,
    /// When it was registered, seconds since 1970 by its own clock.
    pub registered_at: f64,
}

fn one() -> u32 {
    1
}

/// What the health checks say of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Status {
    /// Checks pass, or nobody has checked yet.
    Up,
    /// Checks fail.
    Down,
}

/// An instance of a snapshot.
#[derive(Debug)]
pub struct Instance {
    /// What it registered.
    pub record: Record,
    /// What the health checks say.
    pub status: Status,
    /// Counts up with each registration of the same id.
    pub epoch: u64,
    /// The session that keeps it alive.
    pub session: String,
    /// The record as it stands on the server.
    pub json: String,
    /// What this process counts about it.
    pub load: Arc<Load>,
}

/// A stored instance, split but not yet decoded: `session epoch ttl status \0 json`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The whole value, to see whether anything changed.
    pub raw: String,
}

impl Entry {
    /// Decodes the entry; `load` finds the counters of an id that is already known.
    pub fn decode(&self, load: impl FnOnce(&str) -> Arc<Load>) -> Result<Instance, CoreError> {
        let bad = |why: &dyn std::fmt::Display| CoreError::Malformed {
            what: "instance record",
            why: why.to_string(),
        };
        let (head, json) = self
            .raw
            .split_once('\0')
            .ok_or_else(|| bad(&"no separator"))?;
        let mut parts = head.split(' ');
        let (Some(session), Some(epoch), Some(_ttl), Some(status)) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(bad(&"its head has fewer than four fields"));
        };
        let epoch = epoch.parse().map_err(|error| bad(&error))?;
        let status = match status {
            "up" => Status::Up,
            "down" => Status::Down,
            other => return Err(bad(&format_args!("unknown status {other:?}"))),
        };
        let mut record: Record = serde_json::from_str(json).map_err(|error| bad(&error))?;
        record.weight = record.weight.max(1);
        let load = load(&record.id);
        Ok(Instance {
            record,
            status,
            epoch,
            session: session.to_owned(),
            json: json.to_owned(),
            load,
        })
    }
}

impl From<String> for Entry {
    fn from(raw: String) -> Self {
        Self { raw }
    }
}
