//! `COPY … (FORMAT binary)`, taken in by pieces that end anywhere.
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::error::CoreError;

const SIGNATURE: &[u8] = b"PGCOPY\n\xff\r\n\0";
/// Signature, flags, length of the header's extension.
const HEADER: usize = SIGNATURE.len() + 8;
/// Microseconds from 1970 to 2000, where PostgreSQL's time begins.
const EPOCH: i64 = 946_684_800_000_000;

/// What a column holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `text`
    Text,
    /// `timestamptz`
    Time,
    /// `uuid`
    Uuid,
    /// `inet`, its network mask left out
    Address,
    /// `jsonb`
    Json,
    /// `double precision`
    Float,
}

impl Kind {
    /// The kind of that name, as Python calls it.
    pub fn named(name: &str) -> Result<Self, CoreError> {
        match name {
            "text" => Ok(Self::Text),
            "time" => Ok(Self::Time),
            "uuid" => Ok(Self::Uuid),
            "address" => Ok(Self::Address),
            "json" => Ok(Self::Json),
            "float" => Ok(Self::Float),
            _ => Err(CoreError::Invalid {
                field: "kind",
                value: name.chars().take(40).collect(),
                allowed: "give text, time, uuid, address, json or float",
            }),
        }
    }
}

/// A field of a row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Value<'a> {
    /// NULL
    Null,
    /// A text.
    Text(&'a str),
    /// A JSON document.
    Json(&'a str),
    /// Microseconds since 1970.
    Micros(i64),
    /// An id.
    Uuid([u8; 16]),
    /// An address.
    Address(IpAddr),
    /// A number.
    Float(f64),
}

/// Takes a stream in and hands out its rows.
#[derive(Debug)]
pub struct Decoder {
    kinds: Vec<Kind>,
    rest: Vec<u8>,
    began: bool,
}

impl Decoder {
    /// For rows of these columns.
    pub fn new(kinds: Vec<Kind>) -> Self {
        Self {
            kinds,
            rest: Vec::new(),
            began: false,
        }
    }

    /// Another stream begins.
    pub fn restart(&mut self) {
        self.rest.clear();
        self.began = false;
    }

    /// Takes the next piece in and calls `each` with every row that is whole by now.
    pub fn feed<E: From<CoreError>>(
        &mut self,
        piece: &[u8],
        mut each: impl FnMut(&[Value<'_>]) -> Result<(), E>,
    ) -> Result<(), E> {
        let held = std::mem::take(&mut self.rest);
        let mut joined;
        let mut left = if held.is_empty() {
            piece
        } else {
            joined = held;
            joined.extend_from_slice(piece);
            &joined[..]
        };
        if !self.began {
            let Some(behind) = header(left)? else {
                self.rest = left.to_vec();
                return Ok(());
            };
            left = behind;
            self.began = true;
        }
        let mut values = Vec::with_capacity(self.kinds.len());
        while let Some(behind) = row(left, &self.kinds, &mut values)? {
            // The trailer is a row of no fields.
            if !values.is_empty() {
                each(&values)?;
            }
            left = behind;
            values.clear();
        }
        // Room for a long row at once, not by doubling again and again.
        self.rest = Vec::with_capacity(left.len() + piece.len());
        self.rest.extend_from_slice(left);
        Ok(())
    }
}

fn header(piece: &[u8]) -> Result<Option<&[u8]>, CoreError> {
    let known = piece.len().min(SIGNATURE.len());
    if piece[..known] != SIGNATURE[..known] {
        return Err(malformed(
            "it does not begin as a COPY of binary format does",
        ));
    }
    let Some((_, extension)) = piece
        .get(SIGNATURE.len()..)
        .and_then(take::<4>)
        .and_then(|(_, behind)| take::<4>(behind))
    else {
        return Ok(None);
    };
    let size = piece[HEADER - 4..HEADER]
        .try_into()
        .map_or(0, u32::from_be_bytes) as usize;
    Ok(extension.get(size..))
}

/// One row, if it is whole: its values in `values`, and what lies behind it.
fn row<'a>(
    piece: &'a [u8],
    kinds: &[Kind],
    values: &mut Vec<Value<'a>>,
) -> Result<Option<&'a [u8]>, CoreError> {
    let Some((count, mut left)) = take::<2>(piece) else {
        return Ok(None);
    };
    let count = i16::from_be_bytes(count);
    if count == -1 {
        return Ok(Some(left));
    }
    if usize::try_from(count) != Ok(kinds.len()) {
        return Err(malformed(&format!(
            "a row has {count} fields, not {}",
            kinds.len()
        )));
    }
    for kind in kinds {
        let Some((size, behind)) = take::<4>(left) else {
            return Ok(None);
        };
        let Ok(size) = usize::try_from(i32::from_be_bytes(size)) else {
            values.push(Value::Null);
            left = behind;
            continue;
        };
        let Some((field, behind)) = behind.split_at_checked(size) else {
            return Ok(None);
        };
        values.push(value(*kind, field)?);
        left = behind;
    }
    Ok(Some(left))
}

fn value(kind: Kind, field: &[u8]) -> Result<Value<'_>, CoreError> {
    let found = match kind {
        Kind::Text => std::str::from_utf8(field).ok().map(Value::Text),
        Kind::Json => match field.split_first() {
            Some((1, text)) => std::str::from_utf8(text).ok().map(Value::Json),
            _ => None,
        },
        Kind::Time => field
            .try_into()
            .ok()
            .map(|bytes| Value::Micros(i64::from_be_bytes(bytes).saturating_add(EPOCH))),
        Kind::Uuid => field.try_into().ok().map(Value::Uuid),
        Kind::Float => field
            .try_into()
            .ok()
            .map(|bytes| Value::Float(f64::from_be_bytes(bytes))),
        Kind::Address => address(field).map(Value::Address),
    };
    found.ok_or_else(|| malformed(&format!("a field of {} bytes is no {kind:?}", field.len())))
}

/// Family (2 or 3), bits, is-a-network, length, address: `network_send` in PostgreSQL's network.c.
fn address(field: &[u8]) -> Option<IpAddr> {
    let (head, address) = field.split_at_checked(4)?;
    match head[0] {
        2 => <[u8; 4]>::try_from(address)
            .ok()
            .map(|bytes| IpAddr::V4(Ipv4Addr::from(bytes))),
        3 => <[u8; 16]>::try_from(address)
            .ok()
            .map(|bytes| IpAddr::V6(Ipv6Addr::from(bytes))),
        _ => None,
    }
}

fn take<const N: usize>(piece: &[u8]) -> Option<([u8; N], &[u8])> {
    piece
        .split_first_chunk::<N>()
        .map(|(head, behind)| (*head, behind))
}

fn malformed(why: &str) -> CoreError {
    CoreError::Malformed {
        what: "answer to COPY",
        why: why.to_owned(),
    }
}
