//! Where the primary of each partition's slot is, as the nodes of a cluster say it.
//!
//! One task asks for all partitions, in rounds: every two seconds, and when a partition has lost its server. Whoever
//! needs to know takes the next round, so a node on which many partitions depend is asked for once, not by each.
//! How they are asked stands in `asker.rs`.

mod asker;

use crate::greeting::End;
use crate::scripts::tag;
use crate::sentinels::{Place, Primary};
use crate::transport::Target;
use dotmac_core::partition::slot;
use std::future::pending;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

use asker::Asker;

/// What the rounds have found so far.
#[derive(Debug, Clone, Default)]
struct Map {
    round: u64,
    /// By number of the partition.
    primaries: Vec<Option<Primary>>,
    /// Every node that was named, replicas too: any of them may be asked.
    places: Vec<Place>,
    /// Nobody answered in the last round.
    trouble: Option<End>,
}

/// How far the partitions of this process may be used.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Agreement {
    /// Not known yet whether the cluster has as many partitions as we think.
    Open,
    /// It has.
    Agreed,
    /// That can't be found out, or it has not.
    Failed(End),
}

/// A cluster, shared by the partitions of one process.
#[derive(Debug)]
pub struct Cluster {
    slots: Vec<u16>,
    wanted: watch::Sender<u64>,
    map: watch::Receiver<Map>,
    agreement: watch::Sender<Agreement>,
}

impl Cluster {
    /// Begins to ask; the set keeps the task. Needs a runtime.
    pub fn follow(target: &Target, namespace: &str, tasks: &mut JoinSet<()>) -> Arc<Self> {
        let slots: Vec<u16> = (0..target.partitions)
            .map(|partition| slot(tag(namespace, partition).as_bytes()))
            .collect();
        let (wanted, asked) = watch::channel(0);
        let (found, map) = watch::channel(Map::default());
        tasks.spawn(Asker::new(target.clone(), slots.clone(), asked, found).run());
        Arc::new(Self {
            slots,
            wanted,
            map,
            agreement: watch::Sender::new(Agreement::Open),
        })
    }

    /// The guide of one partition.
    pub fn slot(self: &Arc<Self>, partition: usize) -> Slot {
        Slot {
            cluster: self.clone(),
            map: self.map.clone(),
            partition,
            used: 0,
            last: None,
            hint: None,
        }
    }

    /// Asks for this round, unless it was asked for or is over.
    fn want(&self, round: u64) {
        self.wanted.send_if_modified(|wanted| {
            let newer = *wanted < round;
            *wanted = round.max(*wanted);
            newer
        });
    }
}

/// One partition's way to the primary of its slot.
#[derive(Debug)]
pub struct Slot {
    cluster: Arc<Cluster>,
    map: watch::Receiver<Map>,
    partition: usize,
    /// The round whose word was followed last.
    used: u64,
    /// Where we went last.
    last: Option<Primary>,
    /// Where a server has sent us.
    hint: Option<Place>,
}

impl Slot {
    /// Where to go now. A round whose word led nowhere is not followed a second time.
    pub async fn primary(&mut self, limit: Duration) -> Result<Primary, End> {
        match timeout(limit, self.next_primary()).await {
            Ok(found) => {
                self.last = found.as_ref().ok().cloned();
                found
            }
            Err(_) => Err(End::Lost(format!(
                "no node of the cluster has said within {} ms where slot {} is",
                limit.as_millis(),
                self.number()
            ))),
        }
    }

    async fn next_primary(&mut self) -> Result<Primary, End> {
        if !self.first() {
            self.agreed().await?;
        }
        if let Some(place) = self.hint.take() {
            let map = self.map.borrow();
            self.cluster.want(map.round + 1);
            let known = map.primaries.get(self.partition).and_then(Option::as_ref);
            let epoch = known.map_or(0, |known| known.epoch);
            return Ok(Primary { place, epoch });
        }
        self.cluster.want(self.used + 1);
        loop {
            let map = self.map.borrow_and_update().clone();
            if map.round > self.used {
                self.used = map.round;
                if let Some(end) = map.trouble {
                    return Err(end);
                }
                let found = map.primaries.into_iter().nth(self.partition).flatten();
                return found
                    .ok_or_else(|| End::Lost(format!("no node serves slot {}", self.number())));
            }
            self.changed().await;
        }
    }

    /// Ends when another server is named for the slot, with more right than the one that was gone to. Cancel safe.
    pub async fn switched(&mut self, from: &Primary) -> String {
        let number = self.number();
        loop {
            self.changed().await;
            let map = self.map.borrow_and_update();
            if let Some(Some(other)) = map.primaries.get(self.partition)
                && other.epoch > from.epoch
                && other.place != from.place
            {
                return format!(
                    "the cluster names {} as primary of slot {number} now",
                    other.place
                );
            }
        }
    }

    /// Ends when another server is named than the one that was gone to last, which may be worth a try at once.
    pub async fn better(&mut self) {
        match self.last.clone() {
            Some(last) => drop(self.switched(&last).await),
            None => pending().await,
        }
    }

    /// The connection is over, or there was none: a server may have said where to go instead.
    pub fn ended(&mut self, end: &End, from: Option<&Primary>) {
        if let End::Lost(why) = end {
            self.hint = moved(
                why,
                self.number(),
                from.map(|primary| &primary.place.host[..]),
            );
        }
        if self.first() && *end != End::Closed {
            self.cluster.agreement.send_if_modified(|agreement| {
                let ever = *agreement == Agreement::Agreed;
                // What was agreed on stays so while the server is away.
                if !ever || matches!(end, End::Misconfigured(_)) {
                    *agreement = Agreement::Failed(end.clone());
                    return true;
                }
                false
            });
        }
    }

    /// Whether this is the partition in which their number is kept.
    pub fn first(&self) -> bool {
        self.partition == 0
    }

    /// Partition 0 has found that the cluster has as many partitions as we think.
    pub fn agree(&self) {
        self.cluster.agreement.send_replace(Agreement::Agreed);
    }

    /// Two processes that count differently would look for the same lock in different places.
    async fn agreed(&self) -> Result<(), End> {
        let mut agreement = self.cluster.agreement.subscribe();
        loop {
            match &*agreement.borrow_and_update() {
                Agreement::Agreed => return Ok(()),
                Agreement::Failed(end) => return Err(end.clone()),
                Agreement::Open => {}
            }
            if agreement.changed().await.is_err() {
                pending::<()>().await;
            }
        }
    }

    async fn changed(&mut self) {
        if self.map.changed().await.is_err() {
            // The task has ended with the engine.
            pending::<()>().await;
        }
    }

    fn number(&self) -> u16 {
        self.cluster.slots[self.partition]
    }
}

/// The address in an answer `MOVED slot host:port`; without a host it is the one that answered.
fn moved(why: &str, slot: u16, from: Option<&str>) -> Option<Place> {
    let mut words = why.split_once("MOVED ")?.1.split(' ');
    if words.next()?.parse() != Ok(slot) {
        return None;
    }
    let (host, port) = words.next()?.rsplit_once(':')?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let host = if host.is_empty() || host == "?" {
        from?
    } else {
        host
    };
    Some(Place {
        host: host.to_owned(),
        port: port.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(host: &str, port: u16) -> Place {
        Place {
            host: host.into(),
            port,
        }
    }

    #[test]
    fn a_redirection_is_followed_only_for_the_own_slot() {
        let of = |why: &str| moved(why, 7, Some("me"));
        assert_eq!(of("MOVED 7 h:1"), Some(place("h", 1)));
        assert_eq!(
            of("a:2: SSUBSCRIBE: MOVED 7 [::1]:1 (answer)"),
            Some(place("::1", 1))
        );
        assert_eq!(of("MOVED 7 ::1:6379"), Some(place("::1", 6379)));
        assert_eq!(of("MOVED 7 :3"), Some(place("me", 3)));
        for other in [
            "MOVED 8 h:1",
            "MOVED 7",
            "MOVED 7 h",
            "MOVED 7 h:x",
            "ASK 7 h:1",
            "",
        ] {
            assert_eq!(of(other), None, "{other}");
        }
    }
}
