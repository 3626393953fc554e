//! What the chase after cycles over partitions has to know of one of them.

use super::State;
use crate::chase::Waits;
use std::sync::Arc;

/// A request that waits, as the server knows it.
#[derive(Debug)]
pub struct Waiting {
    /// Its number there.
    pub request: String,
    /// Who asks, and who awaits that one.
    pub owners: Vec<String>,
}

impl State {
    /// From here on requests that come to wait are told.
    pub fn tell_waits(&mut self, waits: Option<&Arc<Waits>>) {
        self.waits = waits.cloned();
    }

    /// The request of this number, if it waits.
    pub fn waiting_request(&self, id: u64) -> Option<Waiting> {
        let request = self.client.request(id).filter(|request| request.waits())?;
        Some(Waiting {
            request: format!("{}:{id}", request.sid),
            owners: self
                .owners(&request.ask)
                .split('\u{1}')
                .map(str::to_owned)
                .collect(),
        })
    }

    /// Ends a request of this process that waits for ever in this cycle. False if it is not one of ours, or does not wait.
    pub fn give_up(&mut self, request: &str, cycle: &[String]) -> bool {
        let Some((sid, id)) = request.rsplit_once(':') else {
            return false;
        };
        let Ok(id) = id.parse() else {
            return false;
        };
        let ours = self.client.request(id).is_some_and(|r| *r.sid == *sid);
        ours && self.client.give_up(id, cycle.to_vec())
    }
}
