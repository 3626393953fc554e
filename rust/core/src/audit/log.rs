//! The tenants' logs, entry by entry, against the segments that they name and the checkpoints that were signed.
use std::collections::{HashMap, VecDeque};

use super::Hash;
use super::chains;
use super::copy::{Columns, Pieces};
use super::merkle::Tree;
use super::row::Reader;
use super::segment::{Segment, hex};
use crate::error::CoreError;

/// The columns of an entry `l` and of the segment `s` that it names, which come by log and position.
pub const COLUMNS: [&str; 17] = [
    "l.tenant_id",
    "l.position",
    "l.segment",
    "l.leaf",
    "l.recorded_tx",
    "l.sealed_at",
    "s.id",
    "s.writer",
    "s.tenant_id",
    "s.seq",
    "s.size",
    "s.root",
    "s.link",
    "s.first_at",
    "s.last_at",
    "s.recorded_at",
    "s.recorded_tx",
];
/// A writing transaction that began before another may commit after it; clocks of servers that took over from
/// one another differ a little. What goes back further than this, in microseconds, was set back.
const SLACK: i64 = 60_000_000;

/// Rows of `COLUMNS`.
#[derive(Debug, Default)]
struct Entries;

#[derive(Debug)]
struct Entry<'a> {
    log: &'a str,
    position: i64,
    segment: Option<[u8; 16]>,
    leaf: &'a [u8],
    recorded_tx: Option<i64>,
    sealed_at: i64,
    stored: Option<Stored<'a>>,
}

#[derive(Debug)]
struct Stored<'a> {
    segment: Segment<'a>,
    link: &'a [u8],
    // Null stands nowhere in what was sealed.
    whole: bool,
    recorded_at: i64,
    recorded_tx: Option<i64>,
}

impl Columns for Entries {
    const WIDTH: usize = COLUMNS.len();
    type Row<'a> = Entry<'a>;

    fn read<'a>(reader: &mut Reader<'a>) -> Result<Entry<'a>, CoreError> {
        let log = reader.text("log")?.unwrap_or_default();
        let position = i64::from_be_bytes(reader.needed("position")?);
        let segment = reader.fixed("segment")?;
        let leaf = reader.value("leaf")?.unwrap_or_default();
        let recorded_tx = reader.fixed("recorded_tx")?.map(i64::from_be_bytes);
        let sealed_at = reader.moment("sealed_at")?;
        // What is null of the entry is told by its own checks, of the segment by this.
        reader.nulls = false;
        let id: Option<[u8; 16]> = reader.fixed("id")?;
        let (record, link) = chains::read_rest(reader, id.unwrap_or_default())?;
        let recorded_at = reader.moment("recorded_at")?;
        let stored_tx = reader.fixed("recorded_tx")?.map(i64::from_be_bytes);
        let stored = id.map(|_| Stored {
            segment: record,
            link,
            whole: !reader.nulls,
            recorded_at,
            recorded_tx: stored_tx,
        });
        Ok(Entry {
            log,
            position,
            segment,
            leaf,
            recorded_tx,
            sealed_at,
            stored,
        })
    }
}

/// That a log had this root at this size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// Whose log; empty for the one of no tenant.
    pub tenant: String,
    /// Its entries.
    pub size: u64,
    /// Its Merkle root.
    pub root: Hash,
    /// Who says so.
    pub source: String,
}

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// An entry's number is not the next one.
    Gap,
    /// An entry's segment is gone.
    Gone,
    /// A segment is not what was sealed.
    Changed,
    /// A segment stands in another tenant's log.
    Tenant,
    /// An entry and its segment say different transactions.
    Transactions,
    /// A segment says to have been recorded before what came earlier.
    Recorded,
    /// An entry says to have been sealed before what came earlier, or before its segment was recorded.
    Sealed,
    /// A claim covers more entries than there are.
    Truncated,
    /// A claim has another root than the entries.
    Mismatch,
}

impl Kind {
    /// Its stable name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gap => "gap",
            Self::Gone => "gone",
            Self::Changed => "changed",
            Self::Tenant => "tenant",
            Self::Transactions => "transactions",
            Self::Recorded => "recorded",
            Self::Sealed => "sealed",
            Self::Truncated => "truncated",
            Self::Mismatch => "mismatch",
        }
    }
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What.
    pub kind: Kind,
    /// In whose log.
    pub tenant: String,
    /// With which segment.
    pub segment: Option<[u8; 16]>,
    /// At which place of the log, or size.
    pub place: i64,
    /// What should be there: hashes in hexadecimal digits, times in microseconds since 1970.
    pub expected: String,
    /// What is; nothing where that can't be said.
    pub found: String,
    /// Who claims it.
    pub source: String,
}

/// Checks the logs; entries and claims come by tenant (in the order of its bytes) and number.
#[derive(Debug, Default)]
pub struct Logs {
    reader: Pieces<Entries>,
    claims: VecDeque<Claim>,
    walk: Option<Walk>,
    done: usize,
    told: Told,
}

/// What was found, up to a number of each kind.
#[derive(Debug, Default)]
struct Told {
    most: usize,
    found: Vec<Finding>,
    counts: HashMap<Kind, usize>,
}

impl Told {
    fn tell(&mut self, finding: Finding) {
        let count = self.counts.entry(finding.kind).or_default();
        *count += 1;
        if *count <= self.most {
            self.found.push(finding);
        }
    }
}

impl Logs {
    /// A check that keeps so many findings of each kind, and counts the others.
    pub fn new(most: usize) -> Self {
        let mut logs = Self::default();
        logs.told.most = most;
        logs
    }

    /// Takes a claim, before the entry at that size comes.
    pub fn expect(&mut self, claim: Claim) {
        self.claims.push_back(claim);
    }

    /// Takes the next piece of the copied rows; how many entries have come so far.
    pub fn feed(&mut self, piece: &[u8]) -> Result<usize, CoreError> {
        let Self {
            reader,
            claims,
            walk,
            done,
            told,
        } = self;
        reader.feed(piece, |entry| {
            *done += 1;
            if walk.as_ref().is_none_or(|walk| walk.tenant != entry.log) {
                if let Some(ended) = walk.take() {
                    ended.end(claims, told);
                }
                // Logs of which only the checkpoints are left stand between the others.
                end_before(entry.log, claims, told);
                *walk = Some(Walk::of(entry.log));
            }
            if let Some(walk) = walk {
                walk.compare(claims, told, walk.size.into());
                walk.take(&entry, told);
            }
        })?;
        Ok(self.done)
    }

    /// One copy has come to its end; another may go on from there. `upto`: of the tenants before that one there
    /// are no more entries.
    pub fn end_copy(&mut self, upto: Option<&str>) -> Result<(), CoreError> {
        if !self.reader.is_whole() {
            return Err(CoreError::Malformed {
                what: "copy",
                why: "it ends too early".to_owned(),
            });
        }
        self.reader = Pieces::default();
        if let Some(upto) = upto {
            // So that no more is kept of logs that are gone than of others.
            if let Some(ended) = self.walk.take_if(|walk| *walk.tenant < *upto) {
                ended.end(&mut self.claims, &mut self.told);
            }
            end_before(upto, &mut self.claims, &mut self.told);
        }
        Ok(())
    }

    /// What was found, and how many of each kind there were, once all entries and claims have come.
    pub fn finish(mut self) -> (Vec<Finding>, HashMap<Kind, usize>) {
        if let Some(ended) = self.walk.take() {
            ended.end(&mut self.claims, &mut self.told);
        }
        while let Some(claim) = self.claims.front() {
            Walk::of(&claim.tenant.clone()).end(&mut self.claims, &mut self.told);
        }
        (self.told.found, self.told.counts)
    }
}

/// Holds the claims of tenants before that one against logs of which nothing is there.
fn end_before(tenant: &str, claims: &mut VecDeque<Claim>, told: &mut Told) {
    while let Some(claim) = claims.front()
        && *claim.tenant < *tenant
    {
        Walk::of(&claim.tenant.clone()).end(claims, told);
    }
}

/// One log, entry by entry.
#[derive(Debug)]
struct Walk {
    tenant: String,
    // The number of the entry that comes next.
    size: i64,
    tree: Tree,
    // Roots are told to differ once: all later ones differ, too.
    differs: bool,
    latest: Option<i64>,
    sealed: Option<i64>,
}

impl Walk {
    fn of(tenant: &str) -> Self {
        Self {
            tenant: tenant.to_owned(),
            size: 0,
            tree: Tree::new(),
            differs: false,
            latest: None,
            sealed: None,
        }
    }

    fn take(&mut self, entry: &Entry<'_>, told: &mut Told) {
        let place = entry.position;
        if place != self.size {
            let (wanted, found) = (self.size.to_string(), place.to_string());
            self.tell(told, Kind::Gap, entry, self.size, wanted, found);
        }
        self.size = place.saturating_add(1);
        // A leaf that is none must not shift those behind it.
        self.tree.push(entry.leaf.try_into().unwrap_or_default());
        let Some(stored) = &entry.stored else {
            let (wanted, found) = (hex(entry.leaf), "none".to_owned());
            self.tell(told, Kind::Gone, entry, place, wanted, found);
            return;
        };
        let leaf = stored.segment.leaf(stored.link, stored.recorded_at);
        if !stored.whole || leaf != entry.leaf {
            let found = if stored.whole {
                hex(&leaf)
            } else {
                String::new()
            };
            self.tell(told, Kind::Changed, entry, place, hex(entry.leaf), found);
        }
        if stored.segment.tenant_id != self.tenant {
            let (wanted, found) = (stored.segment.tenant_id.to_owned(), self.tenant.clone());
            self.tell(told, Kind::Tenant, entry, place, wanted, found);
        }
        if stored.recorded_tx.is_none() || stored.recorded_tx != entry.recorded_tx {
            let (wanted, found) = (number(stored.recorded_tx), number(entry.recorded_tx));
            self.tell(told, Kind::Transactions, entry, place, wanted, found);
        }
        self.look_at_clock(entry, stored.recorded_at, told);
    }

    /// Entries are in the order of storing: their times go on.
    fn look_at_clock(&mut self, entry: &Entry<'_>, recorded: i64, told: &mut Told) {
        let sealed = entry.sealed_at;
        let mut rewound = |kind, latest: i64, found: i64| {
            let (wanted, found) = (latest.to_string(), found.to_string());
            self.tell(told, kind, entry, entry.position, wanted, found);
        };
        let back = |found: i64, latest: i64| found < latest.saturating_sub(SLACK);
        if let Some(latest) = self.latest.filter(|&latest| back(recorded, latest)) {
            rewound(Kind::Recorded, latest, recorded);
        }
        if let Some(latest) = self.sealed.filter(|&latest| back(sealed, latest)) {
            rewound(Kind::Sealed, latest, sealed);
        } else if back(sealed, recorded) {
            rewound(Kind::Sealed, recorded, sealed);
        }
        self.latest = self.latest.max(Some(recorded));
        self.sealed = self.sealed.max(Some(sealed));
    }

    fn tell(
        &self,
        told: &mut Told,
        kind: Kind,
        entry: &Entry<'_>,
        place: i64,
        expected: String,
        found: String,
    ) {
        told.tell(Finding {
            kind,
            tenant: self.tenant.clone(),
            segment: entry.segment,
            place,
            expected,
            found,
            source: String::new(),
        });
    }

    /// Holds this log's claims up to that size against it, which has come there or to its own end.
    fn compare(&mut self, claims: &mut VecDeque<Claim>, told: &mut Told, upto: i128) {
        while claims
            .front()
            .is_some_and(|claim| claim.tenant == self.tenant && i128::from(claim.size) <= upto)
            && let Some(claim) = claims.pop_front()
        {
            self.hold_against(&claim, told);
        }
    }

    /// Holds what is left of this log's claims against it.
    fn end(mut self, claims: &mut VecDeque<Claim>, told: &mut Told) {
        self.compare(claims, told, i128::MAX);
    }

    fn hold_against(&mut self, claim: &Claim, told: &mut Told) {
        let mut tell = |kind, place, expected, found| {
            told.tell(Finding {
                kind,
                tenant: self.tenant.clone(),
                segment: None,
                place,
                expected,
                found,
                source: claim.source.clone(),
            });
        };
        let size = i64::try_from(claim.size).unwrap_or(i64::MAX);
        if i128::from(claim.size) > self.size.into() {
            let (wanted, found) = (claim.size.to_string(), self.size.to_string());
            tell(Kind::Truncated, self.size, wanted, found);
            return;
        }
        let root = self.tree.root();
        if (root == claim.root && claim.size == self.tree.size()) || self.differs {
            return;
        }
        self.differs = true;
        tell(Kind::Mismatch, size, hex(&claim.root), hex(&root));
    }
}

fn number(value: Option<i64>) -> String {
    value.map_or_else(|| "none".to_owned(), |value| value.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::row;

    #[derive(Clone)]
    struct Made {
        log: &'static str,
        position: i64,
        leaf: Option<Vec<u8>>,
        logged_tx: i64,
        sealed_at: i64,
        gone: bool,
        tenant_id: Option<&'static str>,
        size: i32,
        recorded_at: Option<i64>,
        recorded_tx: i64,
    }

    impl Made {
        fn segment(&self) -> Segment<'_> {
            Segment {
                id: [self.position as u8 + 1; 16],
                writer: [2; 16],
                tenant_id: self.tenant_id.unwrap_or_default(),
                seq: self.position + 1,
                size: self.size.into(),
                root: &[3; 32],
                first_at: 4,
                last_at: 5,
            }
        }

        fn own_leaf(&self) -> Hash {
            self.segment()
                .leaf(&[6; 32], self.recorded_at.unwrap_or_default())
        }
    }

    fn log(tenant: &'static str, length: i64) -> Vec<Made> {
        let entries = (0..length).map(|position| {
            let at = 1_000_000 * (position + 1);
            let mut made = Made {
                log: tenant,
                position,
                leaf: None,
                logged_tx: 10 + position,
                sealed_at: at + 2,
                gone: false,
                tenant_id: Some(tenant),
                size: 7,
                recorded_at: Some(at),
                recorded_tx: 10 + position,
            };
            made.leaf = Some(made.own_leaf().to_vec());
            made
        });
        entries.collect()
    }

    fn claim(tenant: &str, entries: &[Made]) -> Claim {
        let mut tree = Tree::new();
        tree.extend(entries.iter().map(Made::own_leaf));
        Claim {
            tenant: tenant.to_owned(),
            size: entries.len() as u64,
            root: tree.root(),
            source: "somebody".to_owned(),
        }
    }

    fn copied(entries: &[Made]) -> Vec<u8> {
        let mut out = row::HEADER.to_vec();
        for one in entries {
            let segment = one.segment();
            let time = |at: i64| (at - row::EPOCH).to_be_bytes();
            let stored = [
                Some(segment.id.to_vec()),
                Some(segment.writer.to_vec()),
                one.tenant_id.map(|tenant| tenant.as_bytes().to_vec()),
                Some(segment.seq.to_be_bytes().to_vec()),
                Some(one.size.to_be_bytes().to_vec()),
                Some(segment.root.to_vec()),
                Some(vec![6; 32]),
                Some(time(segment.first_at).to_vec()),
                Some(time(segment.last_at).to_vec()),
                one.recorded_at.map(|at| time(at).to_vec()),
                Some(one.recorded_tx.to_be_bytes().to_vec()),
            ];
            let entry = [
                Some(one.log.as_bytes().to_vec()),
                Some(one.position.to_be_bytes().to_vec()),
                Some(segment.id.to_vec()),
                one.leaf.clone(),
                Some(one.logged_tx.to_be_bytes().to_vec()),
                Some(time(one.sealed_at).to_vec()),
            ];
            out.extend_from_slice(&(COLUMNS.len() as u16).to_be_bytes());
            for value in entry
                .into_iter()
                .chain(stored.into_iter().map(|value| value.filter(|_| !one.gone)))
            {
                match value {
                    None => out.extend_from_slice(&(-1_i32).to_be_bytes()),
                    Some(value) => {
                        out.extend_from_slice(&i32::try_from(value.len()).unwrap().to_be_bytes());
                        out.extend_from_slice(&value);
                    }
                }
            }
        }
        out.extend_from_slice(&row::TRAILER);
        out
    }

    /// What is found, each by its name, tenant and place. `parts`: entries in copies of their own.
    fn check(parts: &[&[Made]], claims: &[Claim]) -> Vec<(&'static str, String, i64)> {
        let mut logs = Logs::new(100);
        for claim in claims {
            logs.expect(claim.clone());
        }
        for part in parts {
            for piece in copied(part).chunks(61) {
                logs.feed(piece).unwrap();
            }
            logs.end_copy(None).unwrap();
        }
        assert_eq!(
            logs.done,
            parts.iter().map(|part| part.len()).sum::<usize>()
        );
        let (found, counts) = logs.finish();
        assert_eq!(counts.values().sum::<usize>(), found.len());
        let found = found.into_iter();
        found
            .map(|one| (one.kind.name(), one.tenant, one.place))
            .collect()
    }

    #[test]
    fn whole_logs_are_whole_in_one_copy_or_several() {
        let (none, acme) = (log("", 3), log("acme", 5));
        let claims = [
            claim("", &none[..2]),
            claim("", &none),
            claim("acme", &acme[..1]),
            claim("acme", &acme[..4]),
            claim("acme", &acme),
        ];
        let all = [none, acme].concat();
        assert_eq!(check(&[&all], &claims), []);
        for cut in 0..all.len() {
            assert_eq!(check(&[&all[..cut], &all[cut..]], &claims), []);
        }
        assert_eq!(check(&[&[]], &[]), []);
    }

    #[test]
    fn each_change_is_told() {
        let acme = log("acme", 5);
        let claims = [claim("acme", &acme[..2]), claim("acme", &acme)];
        let changed = |change: &dyn Fn(&mut Made)| {
            let mut acme = acme.clone();
            change(&mut acme[2]);
            let found = check(&[&acme], &claims).into_iter();
            found
                .map(|(kind, _, place)| (kind, place))
                .collect::<Vec<_>>()
        };
        let minute = 61_000_000;
        assert_eq!(changed(&|one| one.size = 8), [("changed", 2)]);
        assert_eq!(changed(&|one| one.gone = true), [("gone", 2)]);
        assert_eq!(changed(&|one| one.recorded_tx = 1), [("transactions", 2)]);
        assert_eq!(changed(&|one| one.sealed_at -= minute), [("sealed", 2)]);
        assert_eq!(
            changed(&|one| one.tenant_id = Some("other")),
            [("changed", 2), ("tenant", 2)]
        );
        assert_eq!(
            changed(&|one| one.recorded_at = Some(-minute)),
            [("changed", 2), ("recorded", 2)]
        );
        assert_eq!(
            changed(&|one| one.recorded_at = None),
            [("changed", 2), ("recorded", 2)]
        );
        for leaf in [None, Some(vec![1]), Some(vec![9; 32])] {
            assert_eq!(
                changed(&|one| one.leaf.clone_from(&leaf)),
                [("changed", 2), ("mismatch", 5)]
            );
        }
        let nobody = log("", 1);
        let mut null = nobody.clone();
        null[0].tenant_id = None; // which hashes to the same as no tenant
        assert_eq!(check(&[&null], &[]), [("changed", String::new(), 0)]);
    }

    #[test]
    fn entries_that_are_gone_are_told() {
        let (none, acme, zoo) = (log("", 2), log("acme", 5), log("zoo", 1));
        let claims = [
            claim("", &none),
            claim("acme", &acme[..2]),
            claim("acme", &acme[..4]),
            claim("acme", &acme),
            claim("zoo", &zoo),
        ];
        let acme_s = |kind, place| (kind, "acme".to_owned(), place);
        let cut = [&none[..], &acme[..3], &zoo].concat();
        let short = [acme_s("truncated", 3), acme_s("truncated", 3)];
        assert_eq!(check(&[&cut], &claims), short);
        let gap = [&none[..], &acme[..1], &acme[2..], &zoo].concat();
        let jumps = [acme_s("gap", 1), acme_s("mismatch", 2)];
        assert_eq!(check(&[&gap], &claims), jumps);
        // Of some logs only the claims are left, before, between and behind the others.
        let told = |tenants: &[&str]| {
            let found = check(&[&acme], &claims).into_iter();
            let found: Vec<_> = found.map(|(kind, tenant, _)| (kind, tenant)).collect();
            let wanted = tenants
                .iter()
                .map(|tenant| ("truncated", (*tenant).to_owned()));
            assert_eq!(found, wanted.collect::<Vec<_>>());
        };
        told(&["", "zoo"]);
        assert_eq!(check(&[&none, &zoo], &claims).len(), 3);
        assert_eq!(check(&[&[]], &claims).len(), 5);
    }

    #[test]
    fn findings_beyond_the_most_are_counted() {
        let mut acme = log("acme", 9);
        for one in &mut acme {
            one.size = 1;
        }
        let mut logs = Logs::new(2);
        logs.feed(&copied(&acme)).unwrap();
        logs.end_copy(None).unwrap();
        let (found, counts) = logs.finish();
        assert_eq!((found.len(), counts[&Kind::Changed]), (2, 9));
        let mut logs = Logs::new(2);
        logs.feed(&copied(&acme)[..200]).unwrap();
        assert!(logs.end_copy(None).is_err());
    }
}
