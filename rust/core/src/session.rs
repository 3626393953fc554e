//! When a session's heartbeat is due, and what it has to say.
//!
//! One heartbeat keeps everything that a process holds, so its interval follows the shortest lease and its announced
//! length the longest one.

use crate::lease::{Micros, SessionClock};
use std::collections::BTreeMap;
use std::sync::Arc;

const LONGEST_INTERVAL: Micros = 1_000_000;
const SHORTEST_INTERVAL: Micros = 50_000;
/// A session is kept at least this long after its last heartbeat, so that a short stall costs leases, not the session.
const SHORTEST_SESSION: Micros = 10_000_000;

/// One session of this process with one partition.
#[derive(Debug)]
pub struct Session {
    /// Base of the session's name; a new session after the loss of one adds a number.
    seed: String,
    serial: u64,
    /// Generation: one per connection; commands of an older one are refused by the server.
    pub gen_: u64,
    /// The server has confirmed this session on the present connection.
    pub open: bool,
    /// The server has confirmed this session at least once.
    pub known: bool,
    /// The data may be older than what this client has seen: what the server thinks that it holds has to be compared.
    pub compare: bool,
    /// Epoch of the partition's data.
    pub epoch: Option<String>,
    /// The last number, fencing token or rank, that the partition was heard to have given out, in any epoch.
    pub last_number: u64,
    /// Revocations received and not yet acknowledged, word for word.
    pub acknowledge: String,
    /// Stamp of the last heartbeat that was answered.
    pub clock: Arc<SessionClock>,
    last_sent: Micros,
    announced: Micros,
    /// Lengths of all leases, requests and registrations, counted.
    lengths: BTreeMap<Micros, usize>,
    jitter: fastrand::Rng,
    next_due: Micros,
}

impl Session {
    /// A session named after `seed`, which must be unique among all processes.
    pub fn new(seed: String, chance: u64) -> Self {
        Self {
            seed,
            serial: 0,
            gen_: 0,
            open: false,
            known: false,
            compare: false,
            epoch: None,
            last_number: 0,
            acknowledge: String::new(),
            clock: Arc::default(),
            last_sent: 0,
            announced: 0,
            lengths: BTreeMap::new(),
            jitter: fastrand::Rng::with_seed(chance),
            next_due: 0,
        }
    }

    /// Name of the session on the server.
    pub fn sid(&self) -> String {
        format!("{}.{}", self.seed, self.serial)
    }

    /// The server lost the session: a new one under a new name, so that nothing of the old one comes back to life.
    pub fn renew(&mut self) {
        self.serial += 1;
        self.open = false;
        self.known = false;
        self.acknowledge.clear();
    }

    /// No heartbeat goes out now; it is thought of again after an interval.
    pub fn put_off(&mut self, now: Micros) {
        self.next_due = now + self.interval();
    }

    /// What all sessions of this process have in common.
    pub fn seed(&self) -> &str {
        &self.seed
    }

    /// Counts a lease, a request or a registration of this length in.
    pub fn add(&mut self, now: Micros, timeout: Micros) {
        *self.lengths.entry(timeout).or_default() += 1;
        let due = self.last_sent + self.interval();
        if due < self.next_due {
            self.next_due = due.max(now);
        }
    }

    /// Counts it out.
    pub fn remove(&mut self, timeout: Micros) {
        if let Some(count) = self.lengths.get_mut(&timeout) {
            *count -= 1;
            if *count == 0 {
                self.lengths.remove(&timeout);
            }
        }
    }

    /// Time between two heartbeats: a third of the shortest lease, 1 s at most, 50 ms at least.
    pub fn interval(&self) -> Micros {
        let shortest = self.lengths.keys().next().copied().unwrap_or(Micros::MAX);
        (shortest / 3).clamp(SHORTEST_INTERVAL, LONGEST_INTERVAL)
    }

    /// How long the session lives after a heartbeat.
    pub fn longest(&self) -> Micros {
        self.lengths
            .keys()
            .next_back()
            .copied()
            .unwrap_or(0)
            .max(SHORTEST_SESSION)
    }

    /// A lease of this length needs a heartbeat ahead of it: its stamp would be too old, or the session too short.
    pub fn needs_heartbeat_for(&self, now: Micros, timeout: Micros) -> bool {
        let sent = self.last_sent.max(self.clock.confirmed());
        timeout > self.announced || now.saturating_sub(sent) > timeout / 3
    }

    /// When the last heartbeat was sent.
    pub fn last_sent(&self) -> Micros {
        self.last_sent
    }

    /// When the next heartbeat is due.
    pub fn next_due(&self) -> Micros {
        self.next_due
    }

    /// Asks for a heartbeat at this time at the latest.
    pub fn hurry(&mut self, at: Micros) {
        self.next_due = self.next_due.min(at);
    }

    /// A heartbeat is on its way.
    pub fn sent(&mut self, now: Micros) {
        self.last_sent = now;
        self.announced = self.longest();
        let interval = self.interval();
        self.next_due = now + interval - self.jitter.u64(0..=interval / 10);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_follows_the_shortest_lease_and_the_length_the_longest() {
        let mut session = Session::new("s".into(), 1);
        assert_eq!(
            (session.interval(), session.longest()),
            (LONGEST_INTERVAL, SHORTEST_SESSION)
        );
        session.add(0, 600_000);
        session.add(0, 30_000_000);
        assert_eq!(
            (session.interval(), session.longest()),
            (200_000, 30_000_000)
        );
        session.remove(600_000);
        session.add(0, 100_000);
        assert_eq!(session.interval(), SHORTEST_INTERVAL);
        session.remove(30_000_000);
        assert_eq!(session.longest(), SHORTEST_SESSION);
    }

    #[test]
    fn a_shorter_lease_brings_the_next_heartbeat_forward() {
        let mut session = Session::new("s".into(), 1);
        session.sent(5_000_000);
        assert!(session.next_due() >= 5_900_000);
        session.add(5_100_000, 300_000);
        assert_eq!(session.next_due(), 5_100_000);
        assert!(session.needs_heartbeat_for(5_100_001, 299_000));
        assert!(!session.needs_heartbeat_for(5_050_000, 300_000));
        assert!(session.needs_heartbeat_for(5_050_000, 11_000_000));
    }

    #[test]
    fn a_new_session_has_a_new_name_and_the_same_clock() {
        let mut session = Session::new("s".into(), 1);
        session.clock.confirm(9);
        let old = session.sid();
        session.renew();
        assert_ne!(session.sid(), old);
        assert_eq!(session.clock.confirmed(), 9);
    }
}
