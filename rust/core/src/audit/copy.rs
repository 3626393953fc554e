//! Stored rows as they are checked: COPY … (FORMAT binary) in pieces of any size, as they come over the wire.
use std::marker::PhantomData;

use super::leaf::Fields;
use super::row::{self, Reader};
use crate::error::CoreError;

/// Columns after those of `row::COLUMNS`, which no event's hash covers.
pub const MORE: [&str; 2] = ["recorded_at", "recorded_tx"];

/// What the rows of a copy are.
pub trait Columns {
    /// How many columns.
    const WIDTH: usize;
    /// A row.
    type Row<'a>;
    /// Takes a row's values.
    fn read<'a>(reader: &mut Reader<'a>) -> Result<Self::Row<'a>, CoreError>;
}

/// Events: the columns of `row::COLUMNS`, then those of `MORE`.
#[derive(Debug, Default)]
pub struct Events;

impl Columns for Events {
    const WIDTH: usize = row::COLUMNS.len() + MORE.len();
    type Row<'a> = Row<'a>;

    fn read<'a>(reader: &mut Reader<'a>) -> Result<Row<'a>, CoreError> {
        Ok(Row {
            fields: reader.event()?,
            segment: reader.fixed("segment")?,
            leaf: reader.fixed("leaf")?.map(i32::from_be_bytes),
            recorded_at: reader.moment("recorded_at")?,
            recorded_tx: i64::from_be_bytes(reader.needed("recorded_tx")?),
            nulls: reader.nulls,
        })
    }
}

/// An event as it is stored.
#[derive(Debug, Clone)]
pub struct Row<'a> {
    /// What its hash covers.
    pub fields: Fields<'a>,
    /// The segment that it says to be in.
    pub segment: Option<[u8; 16]>,
    /// Its place there.
    pub leaf: Option<i32>,
    /// When the database took it, microseconds since 1970.
    pub recorded_at: i64,
    /// The transaction that stored it.
    pub recorded_tx: i64,
    /// Null stands where none can be.
    pub nulls: bool,
}

/// Puts the pieces of a copy together again.
#[derive(Debug, Default)]
pub struct Pieces<C> {
    rest: Vec<u8>,
    // How long `rest` has to become before it is worth another look.
    wanted: usize,
    begun: bool,
    ended: bool,
    columns: PhantomData<C>,
}

impl<C: Columns> Pieces<C> {
    /// Takes the next piece, and hands out every row that is whole.
    pub fn feed(
        &mut self,
        piece: &[u8],
        mut on_row: impl for<'a> FnMut(C::Row<'a>),
    ) -> Result<(), CoreError> {
        if self.rest.len() + piece.len() < self.wanted {
            self.rest.extend_from_slice(piece);
            return Ok(());
        }
        self.wanted = 0;
        if self.rest.is_empty() {
            let used = self.read(piece, &mut on_row)?;
            self.rest.extend_from_slice(&piece[used..]);
            return Ok(());
        }
        let mut all = std::mem::take(&mut self.rest);
        all.extend_from_slice(piece);
        let used = self.read(&all, &mut on_row)?;
        all.drain(..used);
        self.rest = all;
        Ok(())
    }

    /// Has the end been read, and nothing after it?
    pub fn is_whole(&self) -> bool {
        self.ended && self.rest.is_empty()
    }

    /// Has it begun, and not come to its end?
    pub fn is_cut(&self) -> bool {
        self.begun && !self.is_whole()
    }

    fn read(
        &mut self,
        bytes: &[u8],
        on_row: &mut impl for<'a> FnMut(C::Row<'a>),
    ) -> Result<usize, CoreError> {
        let mut left = bytes;
        if !self.begun {
            match left.split_first_chunk() {
                None => return Ok(0),
                Some((&row::HEADER, rest)) => left = rest,
                Some(_) => {
                    return Err(malformed(
                        "no header of PostgreSQL's binary format".to_owned(),
                    ));
                }
            }
            self.begun = true;
        }
        while !self.ended {
            let Some((count, values)) = left.split_first_chunk() else {
                break;
            };
            if *count == row::TRAILER {
                self.ended = true;
                left = values;
                continue;
            }
            let count = u16::from_be_bytes(*count);
            if usize::from(count) != C::WIDTH {
                let wanted = C::WIDTH;
                return Err(malformed(format!("{count} columns instead of {wanted}")));
            }
            let mut reader = Reader::of_suspects(values);
            match C::read(&mut reader) {
                Ok(row) => on_row(row),
                Err(_) if reader.missing > 0 => {
                    self.wanted = left.len() + reader.missing;
                    break;
                }
                Err(error) => return Err(error),
            }
            left = reader.bytes;
        }
        if self.ended && !left.is_empty() {
            return Err(malformed("something follows its end".to_owned()));
        }
        Ok(bytes.len() - left.len())
    }
}

fn malformed(why: String) -> CoreError {
    CoreError::Malformed { what: "copy", why }
}

/// What `Pieces` reads; for tests.
#[cfg(test)]
pub(crate) fn encode(rows: &[Row<'_>]) -> Vec<u8> {
    let mut out = row::HEADER.to_vec();
    for one in rows {
        out.extend_from_slice(&(Events::WIDTH as u16).to_be_bytes());
        row::write(&mut out, &one.fields).unwrap();
        for value in [
            one.segment.map(Vec::from),
            one.leaf.map(|leaf| leaf.to_be_bytes().to_vec()),
        ] {
            let length = value
                .as_ref()
                .map_or(-1, |bytes| i32::try_from(bytes.len()).unwrap());
            out.extend_from_slice(&length.to_be_bytes());
            out.extend_from_slice(&value.unwrap_or_default());
        }
        for value in [one.recorded_at - row::EPOCH, one.recorded_tx] {
            out.extend_from_slice(&8_i32.to_be_bytes());
            out.extend_from_slice(&value.to_be_bytes());
        }
    }
    out.extend_from_slice(&row::TRAILER);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn event() -> Row<'static> {
        Row {
            segment: Some([3; 16]),
            leaf: Some(7),
            recorded_at: 1_764_250_000_123_999,
            recorded_tx: 77,
            nulls: false,
            fields: Fields {
                occurred_at: 1_764_250_000_123_456,
                id: [9; 16],
                category: "authentication",
                action: "user.login",
                level: "info",
                outcome: "success",
                tenant_id: Some("ü"),
                ip_address: Some("2001:db8::1".parse::<std::net::IpAddr>().unwrap().into()),
                metadata: Some(r#"{"a": 1}"#),
                anomaly_score: Some(0.25),
                ..Fields::default()
            },
        }
    }

    fn hashes(pieces: &[&[u8]]) -> Vec<[u8; 32]> {
        let mut reader = Pieces::<Events>::default();
        let mut found = Vec::new();
        for piece in pieces {
            reader
                .feed(piece, |row| {
                    assert_eq!((row.segment, row.leaf), (Some([3; 16]), Some(7)));
                    assert_eq!(
                        (row.recorded_at, row.recorded_tx),
                        (1_764_250_000_123_999, 77)
                    );
                    found.push(row.fields.hash(&mut Vec::new()).unwrap());
                })
                .unwrap();
        }
        assert!(reader.is_whole());
        found
    }

    #[test]
    fn rows_come_out_as_they_went_in_however_they_are_cut() {
        let bytes = encode(&[event(), event()]);
        let wanted = vec![event().fields.hash(&mut Vec::new()).unwrap(); 2];
        assert_eq!(hashes(&[&bytes]), wanted);
        for cut in 0..bytes.len() {
            assert_eq!(hashes(&[&bytes[..cut], &bytes[cut..]]), wanted);
        }
        assert_eq!(hashes(&bytes.chunks(1).collect::<Vec<_>>()), wanted);
    }

    proptest! {
        #[test]
        fn damaged_bytes_are_refused_not_a_panic(
            place in any::<prop::sample::Index>(),
            value in any::<u8>(),
            cut in any::<prop::sample::Index>(),
        ) {
            let mut bytes = encode(&[event(), event()]);
            let at = place.index(bytes.len());
            bytes[at] = value;
            let (one, other) = bytes.split_at(cut.index(bytes.len()));
            let mut reader = Pieces::<Events>::default();
            // Either it is refused or it is read: what counts is that it comes back.
            if reader.feed(one, |_| ()).is_ok() {
                let _ = reader.feed(other, |_| ());
            }
        }
    }
}
