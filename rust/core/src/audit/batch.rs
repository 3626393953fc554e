//! What one commit stores: events, one segment per tenant, and how many events of each kind there were.
use std::collections::HashMap;
use std::collections::hash_map::Entry;

use super::Hash;
use super::canonical::{write_integer, write_string};
use super::event::Event;
use super::ids::uuid7;
use super::leaf::{Fields, write_uuid};
use super::merkle::Tree;
use super::row;
use super::segment::{FIRST_LINK, Segment, hex};
use crate::error::CoreError;

const DAY: i64 = 86_400_000_000;

/// The segments of one writer, chained per tenant.
#[derive(Debug)]
pub struct Chain {
    writer: [u8; 16],
    chance: fastrand::Rng,
    heads: HashMap<String, Head>,
}

/// The last segment of a writer and tenant that is known to be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// Its number, from 1.
    pub seq: i64,
    /// Its link.
    pub link: Hash,
}

/// Events of one kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Count {
    /// Place of the tenant in `Batch::tenants`.
    tenant: usize,
    /// Days since 1970, UTC.
    pub day: i64,
    /// What kind of thing happened.
    pub category: String,
    /// How it ended.
    pub outcome: String,
    /// How grave it is.
    pub level: String,
    /// So many.
    pub events: i64,
}

/// How the events go to the database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Form {
    /// Few events: a JSON array of objects, for `jsonb_to_recordset`.
    Json(String),
    /// A stream for COPY … (FORMAT binary).
    Copy(Vec<u8>),
}

/// What one commit stores.
#[derive(Debug)]
pub struct Batch {
    /// Its id.
    pub id: [u8; 16],
    /// Of its first segment; stored with all the rest, or not at all.
    pub first_segment: Option<[u8; 16]>,
    /// The events.
    pub events: Form,
    /// Rows of `audit_segments` as a JSON array of objects; roots and links in hexadecimal digits.
    pub segments: String,
    /// The leaf hashes of all segments, one after another; `leaves_at` in a row says where its own begin.
    pub leaves: Vec<u8>,
    /// Of each kind.
    pub counts: Vec<Count>,
    tenants: Vec<String>,
    heads: Vec<Head>,
}

struct Growing {
    id: [u8; 16],
    tree: Tree,
    leaves: Vec<u8>,
    first_at: i64,
    last_at: i64,
}

impl Chain {
    /// The chain of a new writer. `seed` must differ from that of any other writer.
    pub fn new(writer: [u8; 16], seed: u64) -> Self {
        Self {
            writer,
            chance: fastrand::Rng::with_seed(seed),
            heads: HashMap::new(),
        }
    }

    /// Tenants that it knows.
    pub fn tenants(&self) -> usize {
        self.heads.len()
    }

    /// Segments that are stored, over all tenants.
    pub fn segments(&self) -> i64 {
        self.heads.values().map(|head| head.seq).sum()
    }

    /// Notes the last segment of a tenant, unless a later one is known.
    pub fn note(&mut self, tenant: &str, head: Head) {
        match self.heads.entry(tenant.to_owned()) {
            Entry::Occupied(mut known) if known.get().seq < head.seq => {
                known.insert(head);
            }
            Entry::Occupied(_) => {}
            Entry::Vacant(unknown) => {
                unknown.insert(head);
            }
        }
    }

    /// Makes what one commit stores. The chain goes on from it once `commit` says that it is stored.
    ///
    /// Segments are made where every event has a leaf hash. At most `few` events go as JSON.
    pub fn pack(&mut self, events: &[&Event], now_us: i64, few: usize) -> Result<Batch, CoreError> {
        let hashed = events.iter().all(|event| event.leaf.is_some());
        let mut places: HashMap<&str, usize> = HashMap::new();
        let mut tenants: Vec<&str> = Vec::new();
        let mut growing: Vec<Growing> = Vec::new();
        let mut counts: Vec<Count> = Vec::new();
        let mut known: HashMap<(usize, i64, &str, &str, &str), usize> = HashMap::new();
        let mut out = Out::new(events, few);
        for event in events {
            let fields = event.fields()?;
            let tenant = fields.tenant_id.unwrap_or("");
            // Most batches are of one tenant.
            let place = match tenants.first() {
                Some(&first) if first == tenant => 0,
                _ => *places.entry(tenant).or_insert_with(|| {
                    tenants.push(tenant);
                    growing.push(Growing {
                        id: uuid7(now_us, self.chance.u64(..)),
                        tree: Tree::new(),
                        leaves: Vec::new(),
                        first_at: i64::MAX,
                        last_at: i64::MIN,
                    });
                    tenants.len() - 1
                }),
            };
            let segment = &mut growing[place];
            let at = match event.leaf {
                Some(leaf) if hashed => {
                    let at = segment.tree.size() as i32;
                    segment.tree.push(leaf);
                    segment.leaves.extend_from_slice(&leaf);
                    segment.first_at = segment.first_at.min(fields.occurred_at);
                    segment.last_at = segment.last_at.max(fields.occurred_at);
                    Some((&segment.id, at))
                }
                _ => None,
            };
            out.add(event, &fields, at);
            let day = fields.occurred_at.div_euclid(DAY);
            let kind = (place, day, fields.category, fields.outcome, fields.level);
            let count = *known.entry(kind).or_insert_with(|| {
                counts.push(Count {
                    tenant: place,
                    day,
                    category: fields.category.to_owned(),
                    outcome: fields.outcome.to_owned(),
                    level: fields.level.to_owned(),
                    events: 0,
                });
                counts.len() - 1
            });
            counts[count].events += 1;
        }
        let mut batch = Batch {
            id: uuid7(now_us, self.chance.u64(..)),
            first_segment: growing.first().filter(|_| hashed).map(|first| first.id),
            events: out.end(),
            segments: "[]".to_owned(),
            leaves: Vec::new(),
            counts,
            tenants: tenants.iter().map(|&tenant| tenant.to_owned()).collect(),
            heads: Vec::new(),
        };
        if hashed {
            self.chain(&mut batch, &growing);
        }
        Ok(batch)
    }

    fn chain(&self, batch: &mut Batch, growing: &[Growing]) {
        let mut rows = vec![b'['];
        for (tenant, grown) in batch.tenants.iter().zip(growing) {
            let before = self.heads.get(tenant);
            let root = grown.tree.root();
            let segment = Segment {
                id: grown.id,
                writer: self.writer,
                tenant_id: tenant,
                seq: before.map_or(0, |head| head.seq) + 1,
                size: grown.tree.size().cast_signed(),
                root: &root,
                first_at: grown.first_at,
                last_at: grown.last_at,
            };
            let link = segment.link(before.map_or(&FIRST_LINK, |head| &head.link));
            if rows.len() > 1 {
                rows.push(b',');
            }
            segment.canonical(&mut rows);
            rows.pop();
            rows.extend_from_slice(b",\"link\":");
            write_string(&mut rows, &hex(&link));
            rows.extend_from_slice(b",\"leaves_at\":");
            write_integer(
                &mut rows,
                i64::try_from(batch.leaves.len()).unwrap_or(i64::MAX),
            );
            rows.push(b'}');
            batch.leaves.extend_from_slice(&grown.leaves);
            batch.heads.push(Head {
                seq: segment.seq,
                link,
            });
        }
        rows.push(b']');
        batch.segments = String::from_utf8_lossy(&rows).into_owned();
    }

    /// The batch is stored: the next one goes on from it.
    pub fn commit(&mut self, batch: &Batch) {
        for (tenant, &head) in batch.tenants.iter().zip(&batch.heads) {
            self.note(tenant, head);
        }
    }
}

impl Batch {
    /// The tenants of its events; an empty name stands for none.
    pub fn tenants(&self) -> &[String] {
        &self.tenants
    }

    /// Tenants, and the number of each one's segment.
    pub fn places(&self) -> impl Iterator<Item = (&str, i64)> {
        let heads = self.tenants.iter().zip(&self.heads);
        heads.map(|(tenant, head)| (tenant.as_str(), head.seq))
    }

    /// Rows of `audit_rollup` as a JSON array of objects; days count from 1970.
    pub fn rollup(&self) -> String {
        let mut out = vec![b'['];
        for count in &self.counts {
            if out.len() > 1 {
                out.push(b',');
            }
            out.extend_from_slice(b"{\"tenant_id\":");
            write_string(&mut out, &self.tenants[count.tenant]);
            out.extend_from_slice(b",\"day\":");
            write_integer(&mut out, count.day);
            for (name, value) in [
                ("category", &count.category),
                ("outcome", &count.outcome),
                ("level", &count.level),
            ] {
                out.push(b',');
                write_string(&mut out, name);
                out.push(b':');
                write_string(&mut out, value);
            }
            out.extend_from_slice(b",\"events\":");
            write_integer(&mut out, count.events);
            out.extend_from_slice(b",\"batch\":");
            write_uuid(&mut out, &self.id);
            out.push(b'}');
        }
        out.push(b']');
        String::from_utf8_lossy(&out).into_owned()
    }
}

enum Out {
    Json(Vec<u8>),
    Copy(Vec<u8>),
}

impl Out {
    fn new(events: &[&Event], few: usize) -> Self {
        if events.len() <= few {
            return Self::Json(vec![b'[']);
        }
        let size: usize = events.iter().map(|event| event.row.len() + 30).sum();
        let mut out = Vec::with_capacity(row::HEADER.len() + size + row::TRAILER.len());
        out.extend_from_slice(&row::HEADER);
        Self::Copy(out)
    }

    fn add(&mut self, event: &Event, fields: &Fields<'_>, place: Option<(&[u8; 16], i32)>) {
        match self {
            Self::Copy(out) => {
                out.extend_from_slice(&(row::COLUMNS.len() as u16).to_be_bytes());
                out.extend_from_slice(&event.row);
                row::write_place(out, place);
            }
            Self::Json(out) => {
                if out.len() > 1 {
                    out.push(b',');
                }
                fields.stored(out);
                if let Some((segment, leaf)) = place {
                    out.pop();
                    out.extend_from_slice(b",\"segment\":");
                    write_uuid(out, segment);
                    out.extend_from_slice(b",\"leaf\":");
                    write_integer(out, leaf.into());
                    out.push(b'}');
                }
            }
        }
    }

    fn end(self) -> Form {
        match self {
            Self::Copy(mut out) => {
                out.extend_from_slice(&row::TRAILER);
                Form::Copy(out)
            }
            Self::Json(mut out) => {
                out.push(b']');
                Form::Json(String::from_utf8_lossy(&out).into_owned())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::merkle::root_of;

    fn event(tenant: Option<&str>, at: i64) -> Event {
        let fields = Fields {
            occurred_at: at,
            id: uuid7(at, 0),
            category: "security",
            action: "x",
            level: "info",
            outcome: "success",
            tenant_id: tenant,
            metadata: Some("{\"a\":1.0}"),
            ..Fields::default()
        };
        Event::new(&fields, false, true).unwrap()
    }

    fn segments(batch: &Batch) -> Vec<serde_json::Value> {
        serde_json::from_str(&batch.segments).unwrap()
    }

    #[test]
    fn each_tenant_has_a_segment_and_the_counts_add_up() {
        let events = [
            event(Some("a"), 5),
            event(None, 7),
            event(Some("a"), DAY + 1),
            event(Some("b"), 6),
            event(Some("a"), 4),
        ];
        let all: Vec<&Event> = events.iter().collect();
        for few in [0, 10] {
            let mut chain = Chain::new([1; 16], 3);
            let batch = chain.pack(&all, 1_000_000, few).unwrap();
            assert_eq!(batch.tenants(), ["a", "", "b"]);
            let made = segments(&batch);
            assert_eq!(made[0]["size"], 3);
            assert_eq!(
                (&made[0]["first_at"], &made[0]["last_at"]),
                (&4.into(), &(DAY + 1).into())
            );
            let root = root_of([0, 2, 4].map(|place: usize| events[place].leaf.unwrap()));
            assert_eq!(made[0]["root"], hex(&root));
            let leaves = [0, 2, 4, 1, 3].map(|place: usize| events[place].leaf.unwrap());
            assert_eq!(batch.leaves, leaves.concat());
            assert_eq!(
                [0, 1, 2].map(|tenant| made[tenant]["leaves_at"].clone()),
                [0, 96, 128]
            );
            assert_eq!(
                batch.counts.iter().map(|count| count.events).sum::<i64>(),
                5
            );
            assert_eq!(batch.counts.len(), 4); // "a" on two days
            match &batch.events {
                Form::Copy(bytes) => {
                    let read: Vec<_> = row::read_stream(bytes).map(Result::unwrap).collect();
                    assert_eq!(
                        read.iter().map(|one| one.leaf.unwrap()).collect::<Vec<_>>(),
                        [0, 0, 1, 0, 2]
                    );
                    assert_eq!(read[0].segment, read[4].segment);
                    assert_eq!(read[0].segment, batch.first_segment);
                }
                Form::Json(text) => {
                    let read: Vec<serde_json::Value> = serde_json::from_str(text).unwrap();
                    assert_eq!(read[4]["leaf"], 2);
                    assert_eq!(read[0]["segment"], made[0]["id"]);
                    assert_eq!(read[0]["occurred_at"], 5);
                    assert!(text.contains("{\"a\":1.0}")); // as it was given, not as it is hashed
                }
            }
        }
    }

    #[test]
    fn the_chain_goes_on_from_what_is_stored_alone() {
        let mut chain = Chain::new([1; 16], 3);
        let one = event(Some("a"), 5);
        let first = chain.pack(&[&one], 1, 0).unwrap();
        let again = chain.pack(&[&one], 1, 0).unwrap();
        assert_eq!(segments(&again)[0]["seq"], 1); // the first was not stored
        chain.commit(&first);
        let second = chain.pack(&[&one, &event(Some("b"), 5)], 2, 0).unwrap();
        assert_eq!(segments(&second)[0]["seq"], 2);
        assert_eq!(segments(&second)[1]["seq"], 1);
        let record = Segment {
            id: second.first_segment.unwrap(),
            writer: [1; 16],
            tenant_id: "a",
            seq: 2,
            size: 1,
            root: &one.leaf.unwrap(),
            first_at: 5,
            last_at: 5,
        };
        assert_eq!(second.heads[0].link, record.link(&first.heads[0].link));
        chain.commit(&second);
        chain.commit(&first); // late news do not take it back
        assert_eq!((chain.segments(), chain.tenants()), (3, 2));
    }

    #[test]
    fn without_leaf_hashes_there_are_no_segments() {
        let mut one = event(Some("a"), 5);
        one.leaf = None;
        let batch = Chain::new([1; 16], 3).pack(&[&one], 1, 0).unwrap();
        assert_eq!((batch.first_segment, batch.segments.as_str()), (None, "[]"));
        assert_eq!(batch.counts.len(), 1);
    }
}
