//! The chains of segments: every writer numbers and links the segments of each tenant.
use super::copy::{Columns, Pieces};
use super::row::Reader;
use super::segment::{FIRST_LINK, Segment, hex};
use crate::error::CoreError;

/// The columns of a segment's row in a chain, which come in the order of writer, tenant and number.
pub const COLUMNS: [&str; 9] = [
    "id",
    "writer",
    "tenant_id",
    "seq",
    "size",
    "root",
    "link",
    "first_at",
    "last_at",
];

/// Rows of `COLUMNS`.
#[derive(Debug, Default)]
pub struct Segments;

impl Columns for Segments {
    const WIDTH: usize = COLUMNS.len();
    /// A segment and its link.
    type Row<'a> = (Segment<'a>, &'a [u8]);

    fn read<'a>(reader: &mut Reader<'a>) -> Result<(Segment<'a>, &'a [u8]), CoreError> {
        let id = reader.needed("id")?;
        read_rest(reader, id)
    }
}

/// A segment and its link, of the columns behind its id.
pub(super) fn read_rest<'a>(
    reader: &mut Reader<'a>,
    id: [u8; 16],
) -> Result<(Segment<'a>, &'a [u8]), CoreError> {
    let writer = reader.needed("writer")?;
    let tenant_id = reader.filled("tenant_id")?;
    let seq = i64::from_be_bytes(reader.needed("seq")?);
    let size = i32::from_be_bytes(reader.needed("size")?).into();
    let root = reader.filled_bytes("root")?;
    let link = reader.filled_bytes("link")?;
    let segment = Segment {
        id,
        writer,
        tenant_id,
        seq,
        size,
        root,
        first_at: reader.moment("first_at")?,
        last_at: reader.moment("last_at")?,
    };
    Ok((segment, link))
}

/// What is wrong in a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Broken {
    /// The segment.
    pub segment: [u8; 16],
    /// Whose it is.
    pub writer: [u8; 16],
    /// Of which tenant; empty for none.
    pub tenant_id: String,
    /// The number that it has.
    pub seq: i64,
    /// What is wrong with it.
    pub what: What,
}

/// What is wrong with a segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// Its number is not the next one, which is this.
    Gap(i64),
    /// Its link is the first, and does not follow from the one before, which would give the second.
    Link(String, String),
}

/// Checks chains, segment by segment.
#[derive(Debug, Default)]
pub struct Chains {
    reader: Pieces<Segments>,
    before: Option<Before>,
    done: usize,
    found: Vec<Broken>,
    gaps: usize,
    links: usize,
    most: usize,
}

#[derive(Debug)]
struct Before {
    writer: [u8; 16],
    tenant_id: String,
    seq: i64,
    link: Vec<u8>,
}

impl Chains {
    /// A check that keeps so many findings of each kind, and counts the others.
    pub fn new(most: usize) -> Self {
        Self {
            most,
            ..Self::default()
        }
    }

    /// Takes the next piece of the copied rows; how many have come so far.
    pub fn feed(&mut self, piece: &[u8]) -> Result<usize, CoreError> {
        let Self {
            reader,
            before,
            done,
            found,
            gaps,
            links,
            most,
        } = self;
        reader.feed(piece, |(segment, link)| {
            *done += 1;
            let last = before.take().filter(|last| {
                (last.writer, last.tenant_id.as_str()) == (segment.writer, segment.tenant_id)
            });
            if let Some(what) = look(last.as_ref(), &segment, link) {
                let count = match what {
                    What::Gap(_) => &mut *gaps,
                    What::Link(..) => &mut *links,
                };
                *count += 1;
                if *count <= *most {
                    found.push(Broken {
                        segment: segment.id,
                        writer: segment.writer,
                        tenant_id: segment.tenant_id.to_owned(),
                        seq: segment.seq,
                        what,
                    });
                }
            }
            *before = Some(Before {
                writer: segment.writer,
                tenant_id: segment.tenant_id.to_owned(),
                seq: segment.seq,
                link: link.to_owned(),
            });
        })?;
        Ok(self.done)
    }

    /// What was found, and how many gaps and links there were that are wrong.
    pub fn finish(self) -> Result<(Vec<Broken>, usize, usize), CoreError> {
        if self.reader.is_whole() {
            return Ok((self.found, self.gaps, self.links));
        }
        Err(CoreError::Malformed {
            what: "copy",
            why: "it ends too early".to_owned(),
        })
    }
}

fn look(before: Option<&Before>, segment: &Segment<'_>, link: &[u8]) -> Option<What> {
    let wanted = before.map_or(1, |before| before.seq.saturating_add(1));
    if segment.seq != wanted {
        return Some(What::Gap(wanted)); // what it links to is not there
    }
    let follows = segment.link(before.map_or(&FIRST_LINK[..], |before| &before.link));
    (follows != link).then(|| What::Link(hex(link), hex(&follows)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::row;

    struct Stored {
        writer: u8,
        tenant_id: &'static str,
        seq: i64,
        root: Vec<u8>,
        link: Vec<u8>,
    }

    impl Stored {
        fn segment(&self) -> Segment<'_> {
            Segment {
                id: [self.seq as u8; 16],
                writer: [self.writer; 16],
                tenant_id: self.tenant_id,
                seq: self.seq,
                size: 2,
                root: &self.root,
                first_at: 1_764_250_000_000_000,
                last_at: 1_764_250_000_000_001,
            }
        }
    }

    fn chain(writer: u8, tenant_id: &'static str, length: i64) -> Vec<Stored> {
        let mut link = FIRST_LINK.to_vec();
        let mut made = Vec::new();
        for seq in 1..=length {
            let mut one = Stored {
                writer,
                tenant_id,
                seq,
                root: vec![7; 32],
                link: Vec::new(),
            };
            link = one.segment().link(&link).to_vec();
            one.link.clone_from(&link);
            made.push(one);
        }
        made
    }

    fn copied(rows: &[Stored]) -> Vec<u8> {
        let mut out = row::HEADER.to_vec();
        let put = |out: &mut Vec<u8>, value: &[u8]| {
            out.extend_from_slice(&i32::try_from(value.len()).unwrap().to_be_bytes());
            out.extend_from_slice(value);
        };
        for one in rows {
            let segment = one.segment();
            out.extend_from_slice(&(COLUMNS.len() as u16).to_be_bytes());
            put(&mut out, &segment.id);
            put(&mut out, &segment.writer);
            put(&mut out, segment.tenant_id.as_bytes());
            put(&mut out, &segment.seq.to_be_bytes());
            put(&mut out, &2_i32.to_be_bytes());
            put(&mut out, segment.root);
            put(&mut out, &one.link);
            put(&mut out, &(segment.first_at - row::EPOCH).to_be_bytes());
            put(&mut out, &(segment.last_at - row::EPOCH).to_be_bytes());
        }
        out.extend_from_slice(&row::TRAILER);
        out
    }

    fn check(rows: &[Stored], most: usize) -> (Vec<Broken>, usize, usize) {
        let bytes = copied(rows);
        let mut chains = Chains::new(most);
        for piece in bytes.chunks(100) {
            chains.feed(piece).unwrap();
        }
        assert_eq!(chains.done, rows.len());
        chains.finish().unwrap()
    }

    #[test]
    fn whole_chains_are_whole() {
        let mut rows = chain(1, "", 3);
        rows.extend(chain(1, "acme", 4));
        rows.extend(chain(2, "acme", 1));
        assert_eq!(check(&rows, 10), (vec![], 0, 0));
        assert_eq!(check(&[], 10), (vec![], 0, 0));
    }

    #[test]
    fn a_segment_that_is_gone_or_changed_is_told() {
        let mut rows = chain(1, "acme", 5);
        rows.remove(2);
        let (found, gaps, links) = check(&rows, 10);
        assert_eq!((gaps, links), (1, 0));
        assert_eq!((found[0].seq, &found[0].what), (4, &What::Gap(3)));

        for change in [
            |one: &mut Stored| one.root[0] ^= 1,
            |one: &mut Stored| one.root.push(0),
            |one: &mut Stored| one.link.clear(),
        ] {
            let mut rows = chain(1, "acme", 5);
            change(&mut rows[2]);
            let (found, gaps, links) = check(&rows, 10);
            assert_eq!(gaps, 0);
            assert!(links > 0);
            assert_eq!(found[0].seq, 3);
            assert!(matches!(found[0].what, What::Link(..)));
        }

        let mut rows = chain(1, "acme", 5);
        for one in &mut rows {
            one.root[0] ^= 1;
        }
        let (found, _, links) = check(&rows, 2);
        assert_eq!((found.len(), links), (2, 5));
    }

    #[test]
    fn a_copy_that_ends_early_is_an_error() {
        let bytes = copied(&chain(1, "acme", 2));
        let mut chains = Chains::new(1);
        chains.feed(&bytes[..bytes.len() - 1]).unwrap();
        assert!(chains.finish().is_err());
        assert!(Chains::new(1).finish().is_err());
        assert!(Chains::new(1).feed(b"no copy at all, of anything").is_err());
    }
}
