//! The record of a segment: the events of one tenant that one commit stored, chained per writer and tenant.
use sha2::{Digest, Sha256};

use super::Hash;
use super::canonical::{write_integer, write_string};
use super::leaf::write_uuid;
use super::merkle::leaf_hash;
use super::row::EPOCH;
use crate::error::CoreError;

/// The link before the first segment of a writer and tenant.
pub const FIRST_LINK: Hash = [0; 32];

/// What a segment's link covers beside the link before it; as it is stored, whatever was made of it there.
#[derive(Debug, Clone, Copy)]
pub struct Segment<'a> {
    /// Its id (a UUID's bytes).
    pub id: [u8; 16],
    /// The writer's id (a UUID's bytes).
    pub writer: [u8; 16],
    /// The tenant; empty for events without one.
    pub tenant_id: &'a str,
    /// Its number, from 1, among the segments of that writer and tenant.
    pub seq: i64,
    /// Events in it.
    pub size: i64,
    /// Merkle tree hash over the leaf hashes of its events.
    pub root: &'a [u8],
    /// The earliest `occurred_at`, microseconds since 1970.
    pub first_at: i64,
    /// The latest.
    pub last_at: i64,
}

impl<'a> Segment<'a> {
    /// A segment, and when the database took it (microseconds since 1970), of its columns of fixed width as
    /// their types' send functions have them: id, writer, seq, size, first, last, recorded.
    pub fn unpack(
        packed: &[u8],
        tenant_id: &'a str,
        root: &'a [u8],
    ) -> Result<(Self, i64), CoreError> {
        let mut left = packed;
        let segment = Self {
            id: take(&mut left)?,
            writer: take(&mut left)?,
            tenant_id,
            seq: i64::from_be_bytes(take(&mut left)?),
            size: i32::from_be_bytes(take(&mut left)?).into(),
            root,
            first_at: moment(&mut left)?,
            last_at: moment(&mut left)?,
        };
        let recorded_at = moment(&mut left)?;
        if left.is_empty() {
            Ok((segment, recorded_at))
        } else {
            Err(wrong_length())
        }
    }
}

fn take<const N: usize>(left: &mut &[u8]) -> Result<[u8; N], CoreError> {
    let (value, rest) = left.split_first_chunk().ok_or_else(wrong_length)?;
    *left = rest;
    Ok(*value)
}

fn moment(left: &mut &[u8]) -> Result<i64, CoreError> {
    Ok(i64::from_be_bytes(take(left)?).saturating_add(EPOCH))
}

fn wrong_length() -> CoreError {
    CoreError::Malformed {
        what: "segment",
        why: "its packed columns have another length".to_owned(),
    }
}

impl Segment<'_> {
    /// Writes the canonical bytes (RFC 8785) of the record.
    pub fn canonical(&self, out: &mut Vec<u8>) {
        self.write(out, None);
    }

    fn write(&self, out: &mut Vec<u8>, more: Option<(&[u8], i64)>) {
        out.extend_from_slice(b"{\"first_at\":");
        write_integer(out, self.first_at);
        out.extend_from_slice(b",\"id\":");
        write_uuid(out, &self.id);
        out.extend_from_slice(b",\"last_at\":");
        write_integer(out, self.last_at);
        if let Some((link, recorded_at)) = more {
            out.extend_from_slice(b",\"link\":");
            write_string(out, &hex(link));
            out.extend_from_slice(b",\"recorded_at\":");
            write_integer(out, recorded_at);
        }
        out.extend_from_slice(b",\"root\":");
        write_string(out, &hex(self.root));
        out.extend_from_slice(b",\"seq\":");
        write_integer(out, self.seq);
        out.extend_from_slice(b",\"size\":");
        write_integer(out, self.size);
        out.extend_from_slice(b",\"tenant_id\":");
        write_string(out, self.tenant_id);
        out.extend_from_slice(b",\"writer\":");
        write_uuid(out, &self.writer);
        out.push(b'}');
    }

    /// Its link: SHA-256(link before || canonical bytes).
    pub fn link(&self, before: &[u8]) -> Hash {
        let mut bytes = Vec::with_capacity(320);
        self.canonical(&mut bytes);
        Sha256::new_with_prefix(before)
            .chain_update(&bytes)
            .finalize()
            .into()
    }

    /// Its leaf in the tenant's log: the leaf hash of the canonical bytes of all that its row says.
    /// `recorded_at`: when the database took it, microseconds since 1970.
    pub fn leaf(&self, link: &[u8], recorded_at: i64) -> Hash {
        let mut bytes = Vec::with_capacity(448);
        self.write(&mut bytes, Some((link, recorded_at)));
        leaf_hash(&bytes)
    }
}

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        text.push(char::from(DIGITS[usize::from(byte >> 4)]));
        text.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::canonical::canonicalize;

    #[test]
    fn packed_columns_are_what_they_were() {
        let mut packed = [[1; 16], [2; 16]].concat();
        packed.extend_from_slice(&3_i64.to_be_bytes());
        packed.extend_from_slice(&4_i32.to_be_bytes());
        for moment in [6, 7, 8] {
            packed.extend_from_slice(&(moment - EPOCH).to_be_bytes());
        }
        let (segment, recorded_at) = Segment::unpack(&packed, "acme", &[5; 32]).unwrap();
        assert_eq!((segment.id, segment.writer), ([1; 16], [2; 16]));
        assert_eq!((segment.seq, segment.size), (3, 4));
        assert_eq!((segment.first_at, segment.last_at, recorded_at), (6, 7, 8));
        assert_eq!((segment.tenant_id, segment.root), ("acme", &[5; 32][..]));
        for cut in 0..packed.len() {
            assert!(Segment::unpack(&packed[..cut], "", &[]).is_err());
        }
        packed.push(0);
        assert!(Segment::unpack(&packed, "", &[]).is_err());
    }

    #[test]
    fn the_record_is_canonical_and_the_link_covers_all_of_it() {
        let segment = Segment {
            id: [1; 16],
            writer: [2; 16],
            tenant_id: "ten\"ant",
            seq: 3,
            size: 4,
            root: &[5; 32],
            first_at: 6,
            last_at: 7,
        };
        let mut bytes = Vec::new();
        segment.canonical(&mut bytes);
        let text = String::from_utf8(bytes.clone()).unwrap();
        assert_eq!(canonicalize(&text).unwrap(), bytes);
        let link = segment.link(&FIRST_LINK);
        let wanted: Hash = Sha256::digest([&FIRST_LINK[..], &bytes].concat()).into();
        assert_eq!(link, wanted);
        let others = [
            Segment {
                id: [9; 16],
                ..segment
            },
            Segment {
                writer: [9; 16],
                ..segment
            },
            Segment {
                tenant_id: "other",
                ..segment
            },
            Segment { seq: 4, ..segment },
            Segment { size: 5, ..segment },
            Segment {
                root: &[9; 32],
                ..segment
            },
            Segment {
                first_at: 5,
                ..segment
            },
            Segment {
                last_at: 8,
                ..segment
            },
        ];
        assert!(others.iter().all(|other| other.link(&FIRST_LINK) != link));
        assert_ne!(segment.link(&[1; 32]), link);

        let mut bytes = Vec::new();
        segment.write(&mut bytes, Some((&[8; 32], 9)));
        let text = String::from_utf8(bytes.clone()).unwrap();
        assert_eq!(canonicalize(&text).unwrap(), bytes);
        let leaf = segment.leaf(&[8; 32], 9);
        assert_eq!(leaf, leaf_hash(&bytes));
        assert!(others.iter().all(|other| other.leaf(&[8; 32], 9) != leaf));
        assert_ne!(segment.leaf(&[1; 32], 9), leaf);
        assert_ne!(segment.leaf(&[8; 32], 8), leaf);
    }
}
