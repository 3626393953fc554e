//! Events as PostgreSQL's COPY … (FORMAT binary) writes them, there and back.
//!
//! Layout: PostgreSQL documentation, "COPY", section "Binary Format"; values as the types' send and receive
//! functions have them. One stream is a header, tuples of the columns in `COLUMNS`, and a trailer.
use std::net::IpAddr;

use super::leaf::{Address, Fields};
use crate::error::CoreError;

/// The columns of a tuple, in this order; the last two may be missing in what is read.
pub const COLUMNS: [&str; 21] = [
    "occurred_at",
    "id",
    "category",
    "action",
    "level",
    "outcome",
    "user_id",
    "tenant_id",
    "resource_type",
    "resource_id",
    "ip_address",
    "correlation_id",
    "trace_id",
    "span_id",
    "subject_id",
    "metadata",
    "personal",
    "anomaly_score",
    "anomaly_reasons",
    "segment",
    "leaf",
];
/// Columns that an event fills by itself; the rest says where it lies in its segment.
pub const OWN: usize = COLUMNS.len() - 2;
/// What a stream begins with: signature, no flags, no extension.
pub const HEADER: [u8; 19] = *b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";
/// What a stream ends with.
pub const TRAILER: [u8; 2] = [0xff, 0xff];

/// Microseconds from 1970 to 2000, where PostgreSQL's time begins.
pub(super) const EPOCH: i64 = 946_684_800_000_000;
const NULL: [u8; 4] = [0xff; 4];
const JSONB_VERSION: u8 = 1;
const INET: u8 = 2;
const INET6: u8 = 3;

/// Writes the event's own columns, without the count before them.
pub fn write(out: &mut Vec<u8>, event: &Fields<'_>) -> Result<(), CoreError> {
    put(out, &(event.occurred_at - EPOCH).to_be_bytes());
    put(out, &event.id);
    put(out, event.category.as_bytes());
    put(out, event.action.as_bytes());
    put(out, event.level.as_bytes());
    put(out, event.outcome.as_bytes());
    put_text(out, event.user_id);
    put_text(out, event.tenant_id);
    put_text(out, event.resource_type);
    put_text(out, event.resource_id);
    put_address(out, event.ip_address);
    put_text(out, event.correlation_id);
    put_text(out, event.trace_id);
    put_text(out, event.span_id);
    put_text(out, event.subject_id);
    put_json(out, event.metadata);
    put_json(out, event.personal);
    match event.anomaly_score {
        None => out.extend_from_slice(&NULL),
        Some(score) => put(out, &score.to_be_bytes()),
    }
    put_json(out, event.anomaly_reasons);
    Ok(())
}

/// Writes the two columns after an event's own.
pub fn write_place(out: &mut Vec<u8>, place: Option<(&[u8; 16], i32)>) {
    match place {
        None => {
            out.extend_from_slice(&NULL);
            out.extend_from_slice(&NULL);
        }
        Some((segment, leaf)) => {
            put(out, segment);
            put(out, &leaf.to_be_bytes());
        }
    }
}

fn put(out: &mut Vec<u8>, value: &[u8]) {
    // Values are far below 2^31 bytes: whoever makes events bounds them.
    out.extend_from_slice(&(value.len() as u32).to_be_bytes());
    out.extend_from_slice(value);
}

fn put_text(out: &mut Vec<u8>, value: Option<&str>) {
    match value {
        None => out.extend_from_slice(&NULL),
        Some(text) => put(out, text.as_bytes()),
    }
}

fn put_json(out: &mut Vec<u8>, value: Option<&str>) {
    match value {
        None => out.extend_from_slice(&NULL),
        Some(text) => {
            out.extend_from_slice(&(text.len() as u32 + 1).to_be_bytes());
            out.push(JSONB_VERSION);
            out.extend_from_slice(text.as_bytes());
        }
    }
}

fn put_address(out: &mut Vec<u8>, address: Option<Address>) {
    let mut put_octets = |family, prefix, octets: &[u8]| {
        out.extend_from_slice(&(octets.len() as u32 + 4).to_be_bytes());
        out.extend_from_slice(&[family, prefix, 0, octets.len() as u8]);
        out.extend_from_slice(octets);
    };
    match address.map(|Address { ip, prefix }| (ip, prefix)) {
        None => out.extend_from_slice(&NULL),
        Some((IpAddr::V4(ip), prefix)) => put_octets(INET, prefix, &ip.octets()),
        Some((IpAddr::V6(ip), prefix)) => put_octets(INET6, prefix, &ip.octets()),
    }
}

/// A stored event and where it lies in its segment.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Stored<'a> {
    /// What its hash covers.
    pub event: Fields<'a>,
    /// The segment's id.
    pub segment: Option<[u8; 16]>,
    /// Its place there, from 0.
    pub leaf: Option<i32>,
}

/// Reads an event's own columns, as `write` wrote them.
pub fn read(bytes: &[u8]) -> Result<Fields<'_>, CoreError> {
    let mut reader = Reader::new(bytes);
    let event = reader.event()?;
    if reader.bytes.is_empty() {
        Ok(event)
    } else {
        Err(malformed("bytes after the last column".to_owned()))
    }
}

/// The tuples of a stream, one by one; it ends with the trailer or with the bytes, after an error at once.
pub fn read_stream(bytes: &[u8]) -> impl Iterator<Item = Result<Stored<'_>, CoreError>> {
    let mut reader = Reader::new(bytes.strip_prefix(&HEADER).unwrap_or(bytes));
    std::iter::from_fn(move || {
        if reader.bytes.is_empty() {
            return None;
        }
        let found = reader.tuple().transpose();
        if !matches!(found, Some(Ok(_))) {
            reader.bytes = &[];
        }
        found
    })
}

/// Takes a tuple's values one after another.
pub struct Reader<'a> {
    /// What was not taken yet.
    pub(super) bytes: &'a [u8],
    /// How many bytes more, at least, would have made an error none; 0 where that was not for their end.
    pub(super) missing: usize,
    /// Has null stood where none can be?
    pub(super) nulls: bool,
    lenient: bool,
}

impl<'a> Reader<'a> {
    pub(super) const fn new(bytes: &'a [u8]) -> Self {
        Self {
            bytes,
            missing: 0,
            nulls: false,
            lenient: false,
        }
    }

    /// Of rows that are to be held against what was noted of them: null is one more thing that was not stored,
    /// and does not end the reading.
    pub(super) const fn of_suspects(bytes: &'a [u8]) -> Self {
        Self {
            lenient: true,
            ..Self::new(bytes)
        }
    }

    fn tuple(&mut self) -> Result<Option<Stored<'a>>, CoreError> {
        let count = i16::from_be_bytes(self.array("a tuple's columns")?);
        if count == -1 {
            return Ok(None);
        }
        let event = match usize::try_from(count) {
            Ok(OWN) => Stored {
                event: self.event()?,
                segment: None,
                leaf: None,
            },
            Ok(count) if count == COLUMNS.len() => Stored {
                event: self.event()?,
                segment: self.fixed("segment")?,
                leaf: self.fixed("leaf")?.map(i32::from_be_bytes),
            },
            _ => return Err(malformed(format!("a tuple of {count} columns"))),
        };
        Ok(Some(event))
    }

    pub(super) fn event(&mut self) -> Result<Fields<'a>, CoreError> {
        Ok(Fields {
            occurred_at: self.moment("occurred_at")?,
            id: self.needed("id")?,
            category: self.filled("category")?,
            action: self.filled("action")?,
            level: self.filled("level")?,
            outcome: self.filled("outcome")?,
            user_id: self.text("user_id")?,
            tenant_id: self.text("tenant_id")?,
            resource_type: self.text("resource_type")?,
            resource_id: self.text("resource_id")?,
            ip_address: self.address()?,
            correlation_id: self.text("correlation_id")?,
            trace_id: self.text("trace_id")?,
            span_id: self.text("span_id")?,
            subject_id: self.text("subject_id")?,
            metadata: self.json("metadata")?,
            personal: self.json("personal")?,
            anomaly_score: self.fixed("anomaly_score")?.map(f64::from_be_bytes),
            anomaly_reasons: self.json("anomaly_reasons")?,
        })
    }

    fn address(&mut self) -> Result<Option<Address>, CoreError> {
        let Some(value) = self.value("ip_address")? else {
            return Ok(None);
        };
        let wrong = || malformed("ip_address is no address".to_owned());
        let (ip, prefix) = match value {
            [INET, prefix, _, 4, octets @ ..] => {
                let octets: [u8; 4] = octets.try_into().map_err(|_| wrong())?;
                (IpAddr::from(octets), *prefix)
            }
            [INET6, prefix, _, 16, octets @ ..] => {
                let octets: [u8; 16] = octets.try_into().map_err(|_| wrong())?;
                (IpAddr::from(octets), *prefix)
            }
            _ => return Err(wrong()),
        };
        Ok(Some(Address { ip, prefix }))
    }

    fn json(&mut self, column: &str) -> Result<Option<&'a str>, CoreError> {
        match self.value(column)? {
            None => Ok(None),
            Some([JSONB_VERSION, text @ ..]) => utf8(column, text).map(Some),
            Some(_) => Err(malformed(format!(
                "{column} is jsonb of an unknown version"
            ))),
        }
    }

    /// Microseconds since 1970 of a time.
    pub(super) fn moment(&mut self, column: &str) -> Result<i64, CoreError> {
        match self.fixed(column)? {
            // Infinity, and what is later than the year 294246, come to the end of what there is.
            Some(since_2000) => Ok(i64::from_be_bytes(since_2000).saturating_add(EPOCH)),
            None => self.null(column, i64::MIN),
        }
    }

    pub(super) fn text(&mut self, column: &str) -> Result<Option<&'a str>, CoreError> {
        self.value(column)?
            .map(|bytes| utf8(column, bytes))
            .transpose()
    }

    pub(super) fn needed<const N: usize>(&mut self, column: &str) -> Result<[u8; N], CoreError> {
        match self.fixed(column)? {
            Some(value) => Ok(value),
            None => self.null(column, [0; N]),
        }
    }

    /// A text; an empty one for null.
    pub(super) fn filled(&mut self, column: &str) -> Result<&'a str, CoreError> {
        utf8(column, self.filled_bytes(column)?)
    }

    /// Bytes; none for null.
    pub(super) fn filled_bytes(&mut self, column: &str) -> Result<&'a [u8], CoreError> {
        let found = self.value(column)?;
        self.nulls |= found.is_none();
        Ok(found.unwrap_or_default())
    }

    fn null<T>(&mut self, column: &str, instead: T) -> Result<T, CoreError> {
        if !self.lenient {
            return Err(malformed(format!("{column} is null")));
        }
        self.nulls = true;
        Ok(instead)
    }

    pub(super) fn fixed<const N: usize>(
        &mut self,
        column: &str,
    ) -> Result<Option<[u8; N]>, CoreError> {
        self.value(column)?
            .map(|bytes| {
                bytes
                    .try_into()
                    .map_err(|_| malformed(format!("{column} has {} bytes", bytes.len())))
            })
            .transpose()
    }

    pub(super) fn value(&mut self, column: &str) -> Result<Option<&'a [u8]>, CoreError> {
        let length = i32::from_be_bytes(self.array(column)?);
        if length == -1 {
            return Ok(None);
        }
        let Ok(length) = usize::try_from(length) else {
            return Err(malformed(format!("{column} has {length} bytes")));
        };
        let Some((value, rest)) = self.bytes.split_at_checked(length) else {
            return Err(self.cut(column, length));
        };
        self.bytes = rest;
        Ok(Some(value))
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], CoreError> {
        match self.bytes.split_first_chunk() {
            Some((array, rest)) => {
                self.bytes = rest;
                Ok(*array)
            }
            None => Err(self.cut(what, N)),
        }
    }

    #[cold]
    fn cut(&mut self, what: &str, wanted: usize) -> CoreError {
        self.missing = wanted - self.bytes.len();
        malformed(format!("{what} is cut off"))
    }
}

fn utf8<'a>(column: &str, bytes: &'a [u8]) -> Result<&'a str, CoreError> {
    std::str::from_utf8(bytes).map_err(|_| malformed(format!("{column} is no UTF-8")))
}

fn malformed(why: String) -> CoreError {
    CoreError::Malformed {
        what: "binary row",
        why,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn event() -> Fields<'static> {
        Fields {
            occurred_at: 1,
            id: [7; 16],
            category: "security",
            action: "ä",
            level: "info",
            outcome: "denied",
            user_id: Some(""),
            ip_address: Some("2001:db8::1".parse::<IpAddr>().unwrap().into()),
            metadata: Some("{\"a\":1}"),
            personal: Some("{}"),
            anomaly_score: Some(0.25),
            anomaly_reasons: Some("[\"x\"]"),
            ..Fields::default()
        }
    }

    fn stream(events: &[Stored<'_>]) -> Vec<u8> {
        let mut out = HEADER.to_vec();
        for stored in events {
            out.extend_from_slice(&(COLUMNS.len() as u16).to_be_bytes());
            write(&mut out, &stored.event).unwrap();
            write_place(&mut out, stored.segment.as_ref().zip(stored.leaf));
        }
        out.extend_from_slice(&TRAILER);
        out
    }

    #[test]
    fn there_and_back() {
        let stored = Stored {
            event: event(),
            segment: Some([9; 16]),
            leaf: Some(3),
        };
        let other = Stored {
            event: Fields {
                ip_address: Some("10.0.0.7".parse::<IpAddr>().unwrap().into()),
                ..Fields::default()
            },
            ..Stored::default()
        };
        let bytes = stream(&[stored.clone(), other.clone()]);
        let found: Result<Vec<_>, _> = read_stream(&bytes).collect();
        assert_eq!(found.unwrap(), [stored, other]);
        let mut own = Vec::new();
        write(&mut own, &event()).unwrap();
        assert_eq!(read(&own).unwrap(), event());
    }

    proptest! {
        #[test]
        fn cut_or_changed_bytes_are_an_error_or_another_event(cut in 0_usize..400, place in 0_usize..400, byte: u8) {
            let mut bytes = stream(&[Stored { event: event(), segment: Some([9; 16]), leaf: Some(3) }]);
            bytes.truncate(cut);
            if let Some(changed) = bytes.get_mut(place) {
                *changed = byte;
            }
            for found in read_stream(&bytes) {
                let _ = found;
            }
            let _ = read(&bytes);
        }
    }
}
