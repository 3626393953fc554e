//! Stored events against the segments that they were stored in: which were changed, removed, inserted, moved.
//!
//! A segment's root says whether its events are what they were. Where its leaf hashes are at hand too, and
//! agree with the root, they say which of them is not.
use std::collections::HashMap;

use super::Hash;
use super::copy::{Columns, Events, Pieces, Row};
use super::merkle::root_of;
use super::row::Reader;
use super::segment::hex;
use crate::error::CoreError;

/// Findings of one segment that are told one by one; the others are only counted.
const MOST_TOLD: usize = 100;
/// More than any commit stores: a row that says more was changed, and is not to take all memory.
const MOST_EVENTS: usize = if cfg!(test) { 1 << 10 } else { 1 << 20 };

/// A segment as its row says.
#[derive(Debug, Clone)]
pub struct Expected {
    /// Its id.
    pub id: [u8; 16],
    /// The tenant of all of its events; empty for none.
    pub tenant_id: String,
    /// How many events.
    pub size: usize,
    /// Merkle tree hash over their leaf hashes.
    pub root: Hash,
    /// The leaf hashes one after another, where they were kept.
    pub leaves: Option<Vec<u8>>,
    /// When the database took all of them, microseconds since 1970.
    pub recorded_at: i64,
    /// The transaction that stored all of them.
    pub recorded_tx: i64,
}

/// The rows of segments to expect, as a copy of the columns in `EXPECTED_COLUMNS` has them.
#[derive(Debug, Default)]
pub struct Expectations;

/// The columns of a segment's row in `Checker::expect`.
pub const EXPECTED_COLUMNS: [&str; 7] = [
    "id",
    "tenant_id",
    "size",
    "root",
    "leaves",
    "recorded_at",
    "recorded_tx",
];

impl Columns for Expectations {
    const WIDTH: usize = EXPECTED_COLUMNS.len();
    type Row<'a> = Expected;

    fn read(reader: &mut Reader<'_>) -> Result<Expected, CoreError> {
        Ok(Expected {
            id: reader.needed("id")?,
            tenant_id: reader.text("tenant_id")?.unwrap_or_default().to_owned(),
            size: usize::try_from(i32::from_be_bytes(reader.needed("size")?)).unwrap_or(0),
            // One of another length is no root of anything.
            root: reader
                .value("root")?
                .and_then(|root| root.try_into().ok())
                .unwrap_or_default(),
            leaves: reader.value("leaves")?.map(<[u8]>::to_vec),
            recorded_at: reader.moment("recorded_at")?,
            recorded_tx: i64::from_be_bytes(reader.needed("recorded_tx")?),
        })
    }
}

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// An event is not what was stored.
    Changed,
    /// An event is gone.
    Missing,
    /// The last events of a segment are gone.
    Truncated,
    /// All events of a segment are gone.
    Emptied,
    /// An event is there that was not stored with the others.
    Inserted,
    /// An event stands in another's place.
    Reordered,
    /// An event says another tenant than the segment's.
    Tenant,
    /// An event says another time of recording than the segment's.
    Clock,
    /// The events of a segment are not what was stored, and nothing says which.
    SegmentEvents,
    /// A segment's leaf hashes do not agree with its root.
    Leaves,
}

impl Kind {
    /// Its stable name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Changed => "event_changed",
            Self::Missing => "event_missing",
            Self::Truncated => "events_truncated",
            Self::Emptied => "segment_emptied",
            Self::Inserted => "event_inserted",
            Self::Reordered => "event_reordered",
            Self::Tenant => "tenant_swapped",
            Self::Clock => "clock_rewound",
            Self::SegmentEvents => "events_changed",
            Self::Leaves => "segment_changed",
        }
    }
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What.
    pub kind: Kind,
    /// In which segment.
    pub segment: [u8; 16],
    /// At which place there.
    pub place: Option<usize>,
    /// With which event.
    pub event: Option<[u8; 16]>,
    /// What should be there.
    pub expected: String,
    /// What is.
    pub found: String,
}

/// What a check of some segments found.
#[derive(Debug, Default)]
pub struct Outcome {
    /// What is wrong, at most a hundred findings for each segment.
    pub findings: Vec<Finding>,
    /// How many more there are, which are not told.
    pub untold: usize,
    /// Events that say to be in a segment that was not expected: the segment, how many, one of them.
    pub strangers: Vec<([u8; 16], usize, [u8; 16])>,
    /// Events that were read.
    pub events: usize,
}

#[derive(Debug)]
struct Slot {
    expected: Expected,
    // The hash and the id of the event at each place.
    found: Vec<Option<(Hash, [u8; 16])>>,
    // How many of those there are.
    there: usize,
    // The leaf hashes that were kept, once they were held against the root.
    leaves: Option<Vec<Hash>>,
    // Places that two events claim, and those that the segment does not have.
    extra: Vec<(Option<i32>, Hash, [u8; 16])>,
    findings: Vec<Finding>,
}

/// Checks the events of some segments, which come in any order.
#[derive(Debug, Default)]
pub struct Checker {
    expectations: Pieces<Expectations>,
    reader: Pieces<Events>,
    slots: Vec<Slot>,
    places: HashMap<[u8; 16], usize>,
    // Of the last event: most follow one of the same segment.
    last: usize,
    strangers: HashMap<[u8; 16], (usize, [u8; 16])>,
    events: usize,
    scratch: Vec<u8>,
}

impl Checker {
    /// A check of these segments' events.
    pub fn new(expected: impl IntoIterator<Item = Expected>) -> Self {
        let mut checker = Self::default();
        let Self { slots, places, .. } = &mut checker;
        for one in expected {
            add(slots, places, one);
        }
        checker
    }

    /// Takes the next piece of the copied rows of segments, which come before their events; how many have come.
    pub fn expect(&mut self, piece: &[u8]) -> Result<usize, CoreError> {
        let Self {
            expectations,
            slots,
            places,
            ..
        } = self;
        expectations.feed(piece, |one| add(slots, places, one))?;
        Ok(self.slots.len())
    }

    /// Takes the next piece of the copied events.
    pub fn feed(&mut self, piece: &[u8]) -> Result<(), CoreError> {
        let Self {
            reader,
            slots,
            places,
            last,
            strangers,
            events,
            scratch,
            ..
        } = self;
        reader.feed(piece, |row| {
            *events += 1;
            let segment = row.segment.unwrap_or_default();
            if slots
                .get(*last)
                .is_none_or(|slot| slot.expected.id != segment)
                && let Some(place) = places.get(&segment)
            {
                *last = *place;
            }
            match slots.get_mut(*last) {
                Some(slot) if slot.expected.id == segment => slot.take(&row, scratch),
                _ => strangers.entry(segment).or_insert((0, row.fields.id)).0 += 1,
            }
        })
    }

    /// What is wrong, once all events came.
    pub fn finish(self) -> Result<Outcome, CoreError> {
        if !self.reader.is_whole() || self.expectations.is_cut() {
            return Err(CoreError::Malformed {
                what: "copy",
                why: "it ends too early".to_owned(),
            });
        }
        let strangers = self.strangers.into_iter();
        let mut outcome = Outcome {
            strangers: strangers
                .map(|(id, (count, one))| (id, count, one))
                .collect(),
            events: self.events,
            ..Outcome::default()
        };
        for slot in self.slots {
            let mut findings = slot.close();
            outcome.untold += findings.len().saturating_sub(MOST_TOLD);
            findings.truncate(MOST_TOLD);
            outcome.findings.append(&mut findings);
        }
        outcome.findings.sort_by_key(|one| (one.segment, one.place));
        Ok(outcome)
    }
}

fn add(slots: &mut Vec<Slot>, places: &mut HashMap<[u8; 16], usize>, expected: Expected) {
    places.insert(expected.id, slots.len());
    slots.push(Slot {
        found: vec![None; expected.size.min(MOST_EVENTS)],
        there: 0,
        leaves: None,
        expected,
        extra: Vec::new(),
        findings: Vec::new(),
    });
}

impl Slot {
    fn take(&mut self, row: &Row<'_>, scratch: &mut Vec<u8>) {
        let (event, place) = (row.fields.id, row.leaf);
        let tenant = row.fields.tenant_id.unwrap_or_default();
        if tenant != self.expected.tenant_id {
            let (wanted, tenant) = (self.expected.tenant_id.clone(), tenant.to_owned());
            self.tell(Kind::Tenant, place, Some(event), wanted, tenant);
        }
        if row.recorded_at != self.expected.recorded_at {
            let (wanted, found) = (self.expected.recorded_at, row.recorded_at);
            self.tell(
                Kind::Clock,
                place,
                Some(event),
                wanted.to_string(),
                found.to_string(),
            );
        }
        if row.recorded_tx != self.expected.recorded_tx {
            let wanted = format!("transaction {}", self.expected.recorded_tx);
            let found = format!("transaction {}", row.recorded_tx);
            self.tell(Kind::Changed, place, Some(event), wanted, found);
        }
        if row.nulls {
            let (wanted, found) = ("no null".to_owned(), "null".to_owned());
            self.tell(Kind::Changed, place, Some(event), wanted, found);
        }
        let hash = row.fields.hash(scratch).unwrap_or_else(|error| {
            // What has no canonical bytes was never stored like this.
            self.tell(
                Kind::Changed,
                place,
                Some(event),
                "canonical JSON".to_owned(),
                error.to_string(),
            );
            Hash::default()
        });
        let at = place.and_then(|leaf| usize::try_from(leaf).ok());
        match at.and_then(|at| self.found.get_mut(at)) {
            Some(free @ None) => {
                *free = Some((hash, event));
                self.there += 1;
                if self.there == self.found.len() {
                    // Now, while more is on its way: the end would wait for all segments' roots.
                    self.trust_leaves();
                }
            }
            _ => self.extra.push((place, hash, event)),
        }
    }

    fn tell(
        &mut self,
        kind: Kind,
        place: Option<i32>,
        event: Option<[u8; 16]>,
        expected: String,
        found: String,
    ) {
        self.findings.push(Finding {
            kind,
            segment: self.expected.id,
            place: place.and_then(|leaf| usize::try_from(leaf).ok()),
            event,
            expected,
            found,
        });
    }

    fn close(mut self) -> Vec<Finding> {
        self.trust_leaves();
        let there = self.there;
        let whole = there == self.found.len() && self.extra.is_empty();
        let leaves = self.leaves.take();
        if whole && leaves.is_none() {
            let root = root_of(self.found.iter().flatten().map(|(hash, _)| *hash));
            if root != self.expected.root {
                self.tell(
                    Kind::SegmentEvents,
                    None,
                    None,
                    hex(&self.expected.root),
                    hex(&root),
                );
            }
            return self.findings;
        }
        if let Some(leaves) = &leaves {
            self.compare(leaves);
        } else {
            for (place, _, event) in std::mem::take(&mut self.extra) {
                let wanted = format!("{} events", self.found.len());
                self.tell(
                    Kind::Inserted,
                    place,
                    Some(event),
                    wanted,
                    "one more".to_owned(),
                );
            }
        }
        self.tell_missing(there, leaves.as_deref());
        self.findings
    }

    /// Holds the leaf hashes that were kept against the root, unless that was done.
    fn trust_leaves(&mut self) {
        let Some(kept) = self.expected.leaves.take() else {
            return;
        };
        let (hashes, rest) = kept.as_chunks::<32>();
        let root = root_of(hashes.iter().copied());
        if rest.is_empty() && hashes.len() == self.found.len() && root == self.expected.root {
            self.leaves = Some(hashes.to_vec());
            return;
        }
        let wanted = format!("leaf hashes under root {}", hex(&self.expected.root));
        let found = format!("{} leaf hashes under root {}", hashes.len(), hex(&root));
        self.tell(Kind::Leaves, None, None, wanted, found);
    }

    fn compare(&mut self, leaves: &[Hash]) {
        // Where two events claim a place, the one that was stored there has it.
        for (claimed, hash, event) in std::mem::take(&mut self.extra) {
            let at = claimed.and_then(|leaf| usize::try_from(leaf).ok());
            let mut other = (hash, event);
            if let Some(at) = at.filter(|at| leaves.get(*at) == Some(&hash))
                && let Some(found) = self.found[at].replace(other)
            {
                other = found;
            }
            let wanted = format!("{} events", leaves.len());
            self.tell(
                Kind::Inserted,
                claimed,
                Some(other.1),
                wanted,
                hex(&other.0),
            );
        }
        let differing: Vec<_> = (0..leaves.len())
            .filter_map(|at| self.found[at].map(|(hash, event)| (at, hash, event)))
            .filter(|(at, hash, _)| leaves[*at] != *hash)
            .collect();
        if differing.is_empty() {
            return;
        }
        let homes: HashMap<&Hash, usize> = leaves.iter().zip(0..).collect();
        for (at, hash, event) in differing {
            let place = i32::try_from(at).ok();
            if let Some(home) = homes.get(&hash) {
                let (wanted, found) = (format!("place {home}"), format!("place {at}"));
                self.tell(Kind::Reordered, place, Some(event), wanted, found);
            } else {
                self.tell(
                    Kind::Changed,
                    place,
                    Some(event),
                    hex(&leaves[at]),
                    hex(&hash),
                );
            }
        }
    }

    fn tell_missing(&mut self, there: usize, leaves: Option<&[Hash]>) {
        let size = self.found.len();
        if there == size {
            return;
        }
        let (wanted, found) = (format!("{size} events"), format!("{there} events"));
        if there == 0 {
            return self.tell(Kind::Emptied, None, None, wanted, found);
        }
        let last = self
            .found
            .iter()
            .rposition(Option::is_some)
            .map_or(0, |last| last + 1);
        if last == there && size - there > 1 {
            return self.tell(
                Kind::Truncated,
                i32::try_from(there).ok(),
                None,
                wanted,
                found,
            );
        }
        let missing: Vec<_> = (0..size).filter(|at| self.found[*at].is_none()).collect();
        for at in missing {
            let hash = leaves
                .and_then(|leaves| leaves.get(at))
                .map_or_else(String::new, |leaf| hex(leaf));
            self.tell(
                Kind::Missing,
                i32::try_from(at).ok(),
                None,
                hash,
                "no event".to_owned(),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::copy::encode;
    use crate::audit::leaf::Fields;

    const SEGMENT: [u8; 16] = [3; 16];

    fn rows(count: usize) -> Vec<Row<'static>> {
        (0..count)
            .map(|number| Row {
                segment: Some(SEGMENT),
                leaf: i32::try_from(number).ok(),
                recorded_at: 1_764_250_000_000_000,
                recorded_tx: 5,
                nulls: false,
                fields: Fields {
                    occurred_at: 1_764_250_000_000_000 + i64::try_from(number).unwrap(),
                    id: [number as u8 + 1; 16],
                    category: "security",
                    action: "x",
                    level: "info",
                    outcome: "success",
                    ..Fields::default()
                },
            })
            .collect()
    }

    fn check(stored: &[Row<'_>], now: &[Row<'_>], with_leaves: bool) -> Vec<(Kind, Option<usize>)> {
        let hashes: Vec<Hash> = stored
            .iter()
            .map(|row| row.fields.hash(&mut Vec::new()).unwrap())
            .collect();
        let mut checker = Checker::new([Expected {
            id: SEGMENT,
            tenant_id: String::new(),
            size: stored.len(),
            root: root_of(hashes.iter().copied()),
            leaves: with_leaves.then(|| hashes.concat()),
            recorded_at: 1_764_250_000_000_000,
            recorded_tx: 5,
        }]);
        checker.feed(&encode(now)).unwrap();
        let outcome = checker.finish().unwrap();
        assert_eq!(outcome.events, now.len());
        outcome
            .findings
            .iter()
            .map(|one| (one.kind, one.place))
            .collect()
    }

    #[test]
    fn a_size_that_no_segment_has_is_told_and_takes_no_memory() {
        let size = MOST_EVENTS + 1;
        let mut checker = Checker::new([Expected {
            id: SEGMENT,
            tenant_id: String::new(),
            size,
            root: root_of(std::iter::repeat_n([0; 32], size)),
            leaves: Some(vec![0; 32 * size]),
            recorded_at: 0,
            recorded_tx: 0,
        }]);
        checker.feed(&encode(&rows(1))).unwrap();
        let kinds: Vec<_> = checker.finish().unwrap().findings;
        assert!(kinds.iter().any(|one| one.kind == Kind::Leaves));
        assert!(kinds.iter().any(|one| one.kind == Kind::Truncated));
    }

    #[test]
    fn untouched_events_give_no_finding() {
        for count in [1, 2, 7, 64] {
            let mut shuffled = rows(count);
            shuffled.reverse();
            assert!(check(&rows(count), &shuffled, true).is_empty());
            assert!(check(&rows(count), &shuffled, false).is_empty());
        }
    }

    #[test]
    fn every_tampering_is_told_apart() {
        let stored = rows(6);
        let mut now = rows(6);
        now[2].fields.action = "y";
        assert_eq!(check(&stored, &now, true), [(Kind::Changed, Some(2))]);
        assert_eq!(check(&stored, &now, false), [(Kind::SegmentEvents, None)]);

        let mut now = rows(6);
        now.remove(2);
        assert_eq!(check(&stored, &now, true), [(Kind::Missing, Some(2))]);
        assert_eq!(check(&stored, &now, false), [(Kind::Missing, Some(2))]);
        assert_eq!(check(&stored, &rows(4), true), [(Kind::Truncated, Some(4))]);
        assert_eq!(check(&stored, &[], true), [(Kind::Emptied, None)]);

        let mut now = rows(6);
        let mut added = now[3].clone();
        added.fields.id = [77; 16];
        now.insert(0, added);
        assert_eq!(check(&stored, &now, true), [(Kind::Inserted, Some(3))]);
        assert_eq!(check(&stored, &now, false), [(Kind::Inserted, Some(3))]);
        now[0].leaf = Some(6);
        assert_eq!(check(&stored, &now, true), [(Kind::Inserted, Some(6))]);
        now[0].leaf = None;
        assert_eq!(check(&stored, &now, true), [(Kind::Inserted, None)]);

        let mut now = rows(6);
        (now[1].leaf, now[4].leaf) = (Some(4), Some(1));
        assert_eq!(
            check(&stored, &now, true),
            [(Kind::Reordered, Some(1)), (Kind::Reordered, Some(4))]
        );

        let mut now = rows(6);
        now[1].fields.tenant_id = Some("other");
        assert_eq!(
            check(&stored, &now, true),
            [(Kind::Tenant, Some(1)), (Kind::Changed, Some(1))]
        );

        let mut now = rows(6);
        now[5].recorded_at -= 1;
        assert_eq!(check(&stored, &now, true), [(Kind::Clock, Some(5))]);
        now[5].recorded_at += 1;
        now[5].recorded_tx += 1;
        assert_eq!(check(&stored, &now, true), [(Kind::Changed, Some(5))]);
        now[5].recorded_tx -= 1;
        now[5].fields.anomaly_score = Some(f64::NAN);
        assert_eq!(
            check(&stored, &now, true),
            [(Kind::Changed, Some(5)), (Kind::Changed, Some(5))]
        );
    }

    #[test]
    fn leaf_hashes_that_were_changed_are_not_believed() {
        let stored = rows(3);
        let hash = |row: &Row<'_>| row.fields.hash(&mut Vec::new()).unwrap();
        let hashes: Vec<Hash> = stored.iter().map(hash).collect();
        let mut now = rows(3);
        now[1].fields.action = "y";
        let mut forged = hashes.clone();
        forged[1] = hash(&now[1]);
        let mut checker = Checker::new([Expected {
            id: SEGMENT,
            tenant_id: String::new(),
            size: 3,
            root: root_of(hashes),
            leaves: Some(forged.concat()),
            recorded_at: 1_764_250_000_000_000,
            recorded_tx: 5,
        }]);
        checker.feed(&encode(&now)).unwrap();
        let kinds: Vec<_> = checker
            .finish()
            .unwrap()
            .findings
            .iter()
            .map(|one| one.kind)
            .collect();
        assert_eq!(kinds, [Kind::Leaves, Kind::SegmentEvents]);
    }

    #[test]
    fn an_event_of_another_segment_is_a_stranger_and_a_cut_copy_an_error() {
        let mut checker = Checker::new([]);
        let bytes = encode(&rows(2));
        checker.feed(&bytes[..bytes.len() - 1]).unwrap();
        assert!(checker.finish().is_err());
        let mut checker = Checker::new([]);
        checker.feed(&bytes).unwrap();
        assert_eq!(checker.finish().unwrap().strangers, [(SEGMENT, 2, [1; 16])]);
    }
}
