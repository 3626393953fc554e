//! Which instances a caller wants.
use serde::Deserialize;
use serde_json::{Map, Value};

use super::record::Instance;

/// Every condition must hold; an empty filter lets everything pass.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Filter {
    /// Tags that must all be there.
    pub all: Vec<String>,
    /// Tags of which at least one must be there, unless the list is empty.
    pub any: Vec<String>,
    /// Tags that must not be there.
    pub none: Vec<String>,
    /// Metadata that must be there with exactly this value.
    pub metadata: Map<String, Value>,
    /// The zone.
    pub zone: Option<String>,
}

impl Filter {
    /// Whether the instance passes; its health is not looked at.
    pub fn admits(&self, instance: &Instance) -> bool {
        let record = &instance.record;
        let has = |tag: &String| record.tags.contains(tag);
        self.all.iter().all(has)
            && (self.any.is_empty() || self.any.iter().any(has))
            && !self.none.iter().any(has)
            && self
                .metadata
                .iter()
                .all(|(key, value)| record.metadata.get(key).is_some_and(|own| same(own, value)))
            && (self.zone.is_none() || self.zone == record.zone)
    }
}

/// Equality as Python has it: 1 and 1.0 are the same number.
fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(x), Value::Number(y)) => {
            x == y || (x.is_f64() || y.is_f64()) && x.as_f64() == y.as_f64()
        }
        (Value::Array(x), Value::Array(y)) => {
            x.len() == y.len() && x.iter().zip(y).all(|(x, y)| same(x, y))
        }
        (Value::Object(x), Value::Object(y)) => {
            x.len() == y.len()
                && x.iter()
                    .all(|(key, x)| y.get(key).is_some_and(|y| same(x, y)))
        }
        _ => a == b,
    }
}
