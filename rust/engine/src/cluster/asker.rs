//! Asks the nodes of a cluster where its slots are, for all partitions of a process.
//!
//! A round believes the first node that knows nothing older than what was known before, else the newest of all.

use super::Map;
use crate::greeting::{Connection, End, hello, unfit};
use crate::sentinels::{Place, Primary, jittered};
use crate::transport::Target;
use crate::wire::{self, Value};
use bytes::BytesMut;
use std::collections::HashMap;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};

const ASK_EVERY: Duration = Duration::from_secs(2);
/// Two rounds begin at least so far apart, however many partitions are in need.
const APART: Duration = Duration::from_millis(100);
/// The next node is asked, too, when one has not answered for so long.
const STAGGER: Duration = Duration::from_millis(200);

/// What one node knows.
#[derive(Debug, Default, PartialEq, Eq)]
struct Known {
    ranges: Vec<(u16, u16, Primary)>,
    places: Vec<Place>,
}

impl Known {
    fn primary(&self, slot: u16) -> Option<&Primary> {
        let has = |(first, last, _): &&(u16, u16, Primary)| (*first..=*last).contains(&slot);
        self.ranges.iter().find(has).map(|(_, _, primary)| primary)
    }
}

/// Who answered, and over which connection it may be asked again.
type Answer = (Place, Result<(Connection, Known), End>);

/// The task that asks.
pub(super) struct Asker {
    target: Target,
    slots: Vec<u16>,
    asked: watch::Receiver<u64>,
    found: watch::Sender<Map>,
    /// Who answered last, for the questions that nobody is in need of.
    kept: Option<(Place, Connection)>,
}

impl Asker {
    /// One that is to be asked through the first channel, and tells through the other.
    pub(super) fn new(
        target: Target,
        slots: Vec<u16>,
        asked: watch::Receiver<u64>,
        found: watch::Sender<Map>,
    ) -> Self {
        Self {
            target,
            slots,
            asked,
            found,
            kept: None,
        }
    }

    /// Goes on until nobody wants to know any more.
    pub(super) async fn run(mut self) {
        let mut next = Instant::now();
        loop {
            sleep_until(next).await;
            let begun = Instant::now();
            let map = self.round().await;
            let done = map.round;
            self.found.send_replace(map);
            next = begun + jittered(APART);
            let poll = begun + jittered(ASK_EVERY);
            while *self.asked.borrow_and_update() <= done {
                tokio::select! {
                    asked = self.asked.changed() => if asked.is_err() { return },
                    () = sleep_until(poll) => break,
                }
            }
        }
    }

    async fn round(&mut self) -> Map {
        let before = self.found.borrow().clone();
        let mut map = Map {
            round: before.round + 1,
            primaries: vec![None; self.slots.len()],
            ..Map::default()
        };
        // Where somebody is in need, who answered last may be the one that is cut off from the others: chance decides
        // whom to ask, so that some round meets one that knows better.
        let needed = *self.asked.borrow() > before.round;
        let mut kept = self.kept.take().filter(|_| !needed);
        let first = kept.as_ref().map(|(place, _)| place.clone());
        let mut candidates = self.candidates(first, &before.places).into_iter();
        let (mut asking, mut refusals) = (JoinSet::new(), Vec::new());
        loop {
            // One more is asked at once when nobody is left, and after a while when nobody has answered.
            if asking.is_empty() {
                match candidates.next() {
                    Some(place) => self.begin(&mut asking, place, kept.take()),
                    None => break,
                }
            }
            tokio::select! {
                Some(joined) = asking.join_next() => match joined {
                    Ok((place, Ok((connection, known)))) => {
                        self.merge(&mut map, known);
                        if !older(&map, &before) {
                            self.kept = Some((place, connection));
                            break;
                        }
                    }
                    Ok((place, Err(end))) => refusals.push(end.at(&place.to_string())),
                    Err(error) => std::panic::resume_unwind(error.into_panic()),
                },
                () = sleep(STAGGER), if candidates.len() > 0 => {
                    if let Some(place) = candidates.next() {
                        self.begin(&mut asking, place, None);
                    }
                }
            }
        }
        if map.places.is_empty() {
            map.trouble = Some(trouble(&refusals));
            map.primaries = before.primaries;
            map.places = before.places;
        }
        map
    }

    /// Whom to ask, in which order: this one, then all others that are known, then those that we were told in the
    /// beginning.
    fn candidates(&self, first: Option<Place>, known: &[Place]) -> Vec<Place> {
        let mut others = known.to_vec();
        fastrand::shuffle(&mut others);
        let mut seeds: Vec<Place> = (self.target.cluster.iter())
            .map(|seed| Place {
                host: seed.host.clone(),
                port: seed.port,
            })
            .collect();
        fastrand::shuffle(&mut seeds);
        let mut all: Vec<Place> = Vec::new();
        for place in first.into_iter().chain(others).chain(seeds) {
            if !all.contains(&place) {
                all.push(place);
            }
        }
        all
    }

    fn begin(&self, asking: &mut JoinSet<Answer>, place: Place, kept: Option<(Place, Connection)>) {
        let target = self.target.at(&place.host, place.port);
        let connection = kept.map(|(_, connection)| connection);
        asking.spawn(async move {
            // Less than those who wait for this have, so that they hear why it failed.
            let limit = Duration::from_micros(target.connect_timeout) * 3 / 4;
            let done = timeout(limit, ask(&target, connection)).await;
            let late = || {
                Err(End::Lost(format!(
                    "no answer within {} ms",
                    limit.as_millis()
                )))
            };
            (place, done.unwrap_or_else(|_| late()))
        });
    }

    /// Takes over what is newer.
    fn merge(&self, map: &mut Map, known: Known) {
        for (slot, primary) in self.slots.iter().zip(&mut map.primaries) {
            let Some(said) = known.primary(*slot) else {
                continue;
            };
            if primary.as_ref().is_none_or(|had| had.epoch < said.epoch) {
                *primary = Some(said.clone());
            }
        }
        for place in known.places {
            if !map.places.contains(&place) {
                map.places.push(place);
            }
        }
    }
}

/// Does it lack something that was known before, or know something older?
fn older(map: &Map, before: &Map) -> bool {
    let epoch = |primary: &Option<Primary>| primary.as_ref().map(|it| it.epoch);
    (before.primaries.iter().zip(&map.primaries)).any(|(had, has)| epoch(has) < epoch(had))
}

/// Why nobody answered. One that merely can't be reached may help later.
fn trouble(refusals: &[End]) -> End {
    let said: Vec<&str> = (refusals.iter())
        .map(|end| match end {
            End::Lost(why) | End::Denied(why) | End::Misconfigured(why) => &why[..],
            End::Closed => "closed",
        })
        .collect();
    let said = format!("no node says where the slots are: {}", said.join("; "));
    let all = |kind: fn(&End) -> bool| !refusals.is_empty() && refusals.iter().all(kind);
    if all(|end| matches!(end, End::Misconfigured(_))) {
        End::Misconfigured(said)
    } else if all(|end| !matches!(end, End::Lost(_))) {
        End::Denied(said)
    } else {
        End::Lost(said)
    }
}

async fn ask(target: &Target, kept: Option<Connection>) -> Result<(Connection, Known), End> {
    let mut out = BytesMut::new();
    wire::command(&mut out, &[b"CLUSTER", b"SLOTS"]);
    wire::command(&mut out, &[b"CLUSTER", b"NODES"]);
    if let Some(mut connection) = kept
        && let Ok(known) = answers(&mut connection, target, &out).await
    {
        return Ok((connection, known));
    }
    // That one has had its time: it is opened anew.
    let mut connection = Connection::open(target).await?;
    let mut greeting = BytesMut::new();
    hello(&mut greeting, target);
    connection.send(&greeting).await?;
    if connection.greeting().await?.mode != "cluster" {
        return Err(End::Misconfigured(String::from(
            "this server is no node of a cluster; a server by itself is named by redis://host:port/db",
        )));
    }
    let known = answers(&mut connection, target, &out).await?;
    Ok((connection, known))
}

async fn answers(
    connection: &mut Connection,
    target: &Target,
    out: &BytesMut,
) -> Result<Known, End> {
    connection.send(out).await?;
    let (slots, nodes) = (connection.answer().await?, connection.answer().await?);
    for (what, value) in [("CLUSTER SLOTS", &slots), ("CLUSTER NODES", &nodes)] {
        if let Value::Error(text) = value {
            return Err(unfit(what, text));
        }
    }
    Ok(read(
        &slots,
        &nodes.text().unwrap_or_default(),
        &target.host,
    ))
}

/// Addresses are taken as the cluster prefers them to be called, and epochs from the list of nodes. Where no host is
/// named, it is the one that was asked.
fn read(slots: &Value, nodes: &str, asked: &str) -> Known {
    let epochs: HashMap<&str, u64> = nodes
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            Some((words.next()?, words.nth(5)?.parse().ok()?))
        })
        .collect();
    let place = |node: &Value| {
        let host = (node.items().first().and_then(Value::text))
            .filter(|host| !host.is_empty() && host != "?");
        Some(Place {
            host: host.unwrap_or_else(|| asked.to_owned()),
            port: u16::try_from(node.items().get(1)?.int()?).ok()?,
        })
    };
    let mut known = Known::default();
    for range in slots.items() {
        let [first, last, nodes @ ..] = range.items() else {
            continue;
        };
        let number = |value: &Value| u16::try_from(value.int()?).ok();
        let (Some(first), Some(last), Some(primary)) =
            (number(first), number(last), nodes.first().and_then(place))
        else {
            continue;
        };
        let id = nodes[0].items().get(2).and_then(Value::text);
        let epoch = id.and_then(|id| epochs.get(&id[..]).copied());
        let primary = Primary {
            place: primary,
            epoch: epoch.unwrap_or(0),
        };
        known.ranges.push((first, last, primary));
        for place in nodes.iter().filter_map(place) {
            if !known.places.contains(&place) {
                known.places.push(place);
            }
        }
    }
    known
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    fn place(host: &str, port: u16) -> Place {
        Place {
            host: host.into(),
            port,
        }
    }

    fn text(text: &str) -> Value {
        Value::Bytes(Bytes::copy_from_slice(text.as_bytes()))
    }

    fn node(host: Value, port: i64, id: &str) -> Value {
        Value::List(vec![host, Value::Int(port), text(id), Value::List(vec![])])
    }

    fn map(epochs: &[Option<u64>]) -> Map {
        let primary = |epoch: &Option<u64>| {
            epoch.map(|epoch| Primary {
                place: place("h", 1),
                epoch,
            })
        };
        Map {
            primaries: epochs.iter().map(primary).collect(),
            ..Map::default()
        }
    }

    #[test]
    fn slots_and_epochs_are_read() {
        let slots = Value::List(vec![
            Value::List(vec![
                Value::Int(0),
                Value::Int(99),
                node(text("a"), 1, "A"),
                node(text("b"), 2, "B"),
            ]),
            Value::List(vec![
                Value::Int(100),
                Value::Int(100),
                node(Value::Nil, 3, "C"),
            ]),
            Value::List(vec![Value::Int(7)]),
        ]);
        let nodes = "A a:1@11,,shard-id=x master - 0 0 7 connected 0-99\nB b:2@12 slave A 0 0 7 connected\n\
                     C :3@13 myself,master - 0 0 9 connected 100\n";
        let known = read(&slots, nodes, "asked");
        let primary = |host: &str, port, epoch| Primary {
            place: place(host, port),
            epoch,
        };
        assert_eq!(known.primary(0), Some(&primary("a", 1, 7)));
        assert_eq!(known.primary(99), Some(&primary("a", 1, 7)));
        assert_eq!(known.primary(100), Some(&primary("asked", 3, 9)));
        assert_eq!(known.primary(101), None);
        assert_eq!(
            known.places,
            [place("a", 1), place("b", 2), place("asked", 3)]
        );
    }

    #[test]
    fn an_answer_that_lacks_something_is_older() {
        assert!(!older(&map(&[Some(3), Some(4)]), &Map::default()));
        assert!(!older(&map(&[Some(3), Some(5)]), &map(&[Some(3), Some(4)])));
        assert!(older(&map(&[Some(2), Some(5)]), &map(&[Some(3), Some(4)])));
        assert!(older(&map(&[Some(3), None]), &map(&[Some(3), Some(4)])));
        assert!(!older(&map(&[Some(3), None]), &map(&[Some(3), None])));
    }

    #[test]
    fn trouble_is_final_only_where_all_say_so() {
        let (lost, denied, wrong) = (
            End::Lost("l".into()),
            End::Denied("d".into()),
            End::Misconfigured("m".into()),
        );
        assert!(matches!(trouble(&[]), End::Lost(_)));
        assert!(matches!(
            trouble(&[lost.clone(), denied.clone()]),
            End::Lost(_)
        ));
        assert!(matches!(
            trouble(&[wrong.clone(), denied.clone()]),
            End::Denied(_)
        ));
        assert!(matches!(
            trouble(&[wrong.clone(), wrong.clone()]),
            End::Misconfigured(_)
        ));
        assert!(matches!(trouble(&[wrong, lost]), End::Lost(_)));
    }
}
