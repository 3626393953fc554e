//! Stored events as text: from `COPY … TO STDOUT (FORMAT binary)` to CSV, JSON and JSON lines.
//!
//! The server sends its own binary form, which costs it less than any text, in pieces that end
//! anywhere; what goes out are whole rows, with the place of the last one, so that whoever is cut off
//! in the middle can go on behind it.
//!
//! Sources: PostgreSQL documentation, "COPY", section "Binary Format"; RFC 4180 (CSV), RFC 8259 (JSON).
mod copy;
mod text;

pub use copy::{Decoder, Kind, Value};
pub use text::shown_address;

use crate::error::CoreError;
use text::Writer;

/// How rows are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// One object per line.
    Ndjson,
    /// Members of a JSON array, each on a line, with a comma between them.
    Json,
    /// RFC 4180; every text in quotes, NULL an empty cell without; a text that a spreadsheet could take for a
    /// formula has an apostrophe before it, and so has one that begins with an apostrophe.
    Csv,
}

impl Format {
    /// The format of that name, as Python calls it.
    pub fn named(name: &str) -> Result<Self, CoreError> {
        match name {
            "ndjson" => Ok(Self::Ndjson),
            "json" => Ok(Self::Json),
            "csv" => Ok(Self::Csv),
            _ => Err(CoreError::Invalid {
                field: "format",
                value: name.chars().take(40).collect(),
                allowed: "give ndjson, json or csv",
            }),
        }
    }
}

/// A row's key: microseconds since 1970, and the id.
pub type Place = (i64, [u8; 16]);

/// Writes the rows of one or several COPY statements that have the same columns.
#[derive(Debug)]
pub struct Formatter {
    format: Format,
    names: Vec<Vec<u8>>,
    decoder: Decoder,
    rows: u64,
    first: Option<Place>,
    last: Option<Place>,
}

impl Formatter {
    /// For columns of these names and kinds, among which are a `uuid` and a `time` (the first of each is the
    /// row's key); `rows` stand before those to come.
    pub fn new(format: Format, columns: &[(String, Kind)], rows: u64) -> Self {
        let names = columns
            .iter()
            .map(|(name, _)| {
                let mut quoted = Writer::default();
                quoted.json_text(name);
                quoted.into_bytes()
            })
            .collect();
        Self {
            format,
            names,
            decoder: Decoder::new(columns.iter().map(|(_, kind)| *kind).collect()),
            rows,
            first: None,
            last: None,
        }
    }

    /// Rows written so far.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Key of the first row that was written.
    pub fn first(&self) -> Option<Place> {
        self.first
    }

    /// Key of the last row that was written.
    pub fn last(&self) -> Option<Place> {
        self.last
    }

    /// Another statement begins; what a cut-off one left unfinished is forgotten.
    pub fn restart(&mut self) {
        self.decoder.restart();
    }

    /// Takes the next piece of the stream in; returns the rows that are whole by now.
    pub fn feed(&mut self, piece: &[u8]) -> Result<Vec<u8>, CoreError> {
        let mut out = Writer::with_capacity(piece.len() * 2);
        let Self {
            format,
            names,
            decoder,
            rows,
            first,
            last,
        } = self;
        decoder.feed(piece, |values| {
            match format {
                Format::Csv => csv_row(&mut out, values),
                Format::Ndjson => {
                    json_row(&mut out, names, values);
                    out.raw(b"\n");
                }
                Format::Json => {
                    out.raw(if *rows == 0 { b"\n" } else { b",\n" });
                    json_row(&mut out, names, values);
                }
            }
            *rows += 1;
            *last = place(values).or(*last);
            *first = first.or(*last);
            Ok::<(), CoreError>(())
        })?;
        Ok(out.into_bytes())
    }
}

/// The first time and the first id of a row.
pub fn place(values: &[Value<'_>]) -> Option<Place> {
    let time = values.iter().find_map(|value| match value {
        Value::Micros(time) => Some(*time),
        _ => None,
    });
    let id = values.iter().find_map(|value| match value {
        Value::Uuid(id) => Some(*id),
        _ => None,
    });
    Some((time?, id?))
}

fn json_row(out: &mut Writer, names: &[Vec<u8>], values: &[Value<'_>]) {
    let mut before: &[u8] = b"{";
    for (name, value) in names.iter().zip(values) {
        out.raw(before);
        before = b",";
        out.raw(name);
        out.raw(b":");
        match value {
            Value::Text(text) => out.json_text(text),
            Value::Json(text) => out.raw(text.as_bytes()),
            Value::Micros(time) => out.quoted(|out| out.time(*time)),
            Value::Uuid(id) => out.quoted(|out| out.uuid(id)),
            Value::Address(address) => out.quoted(|out| out.address(*address)),
            Value::Float(number) if number.is_finite() => out.float(*number),
            // JSON has no NaN and no infinity.
            Value::Null | Value::Float(_) => out.raw(b"null"),
        }
    }
    out.raw(b"}");
}

fn csv_row(out: &mut Writer, values: &[Value<'_>]) {
    for (place, value) in values.iter().enumerate() {
        if place > 0 {
            out.raw(b",");
        }
        match value {
            Value::Null => {}
            Value::Text(text) | Value::Json(text) => out.csv_text(text),
            Value::Micros(time) => out.time(*time),
            Value::Uuid(id) => out.uuid(id),
            Value::Address(address) => out.address(*address),
            Value::Float(number) => out.float(*number),
        }
    }
    out.raw(b"\r\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn columns() -> Vec<(String, Kind)> {
        [
            ("id", Kind::Uuid),
            ("occurred_at", Kind::Time),
            ("action", Kind::Text),
            ("address", Kind::Address),
            ("metadata", Kind::Json),
            ("score", Kind::Float),
        ]
        .map(|(name, kind)| (name.to_owned(), kind))
        .to_vec()
    }

    fn field(out: &mut Vec<u8>, value: Option<&[u8]>) {
        let size = value.map_or(-1, |bytes| i32::try_from(bytes.len()).expect("short"));
        out.extend(size.to_be_bytes());
        out.extend(value.unwrap_or_default());
    }

    /// A stream of one row per action, as the server sends it.
    fn stream(actions: &[Option<&str>]) -> Vec<u8> {
        let mut out = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0".to_vec();
        for action in actions {
            out.extend(6_i16.to_be_bytes());
            field(&mut out, Some(&[0xAB; 16]));
            // 2026-01-02T03:04:05.000006Z, counted from 2000
            field(&mut out, Some(&820_638_245_000_006_i64.to_be_bytes()));
            field(&mut out, action.map(str::as_bytes));
            field(&mut out, Some(&[2, 32, 0, 4, 192, 0, 2, 7]));
            field(&mut out, Some(b"\x01{\"a\": \"b,c\"}"));
            field(&mut out, Some(&0.5_f64.to_be_bytes()));
        }
        out.extend((-1_i16).to_be_bytes());
        out
    }

    fn told(format: Format, actions: &[Option<&str>], step: usize) -> String {
        let mut formatter = Formatter::new(format, &columns(), 0);
        let mut out = Vec::new();
        for piece in stream(actions).chunks(step) {
            out.extend(formatter.feed(piece).expect("fine"));
        }
        assert_eq!(formatter.rows(), actions.len() as u64);
        assert_eq!(
            formatter.last(),
            Some((1_767_323_045_000_006, [0xAB; 16])).filter(|_| !actions.is_empty())
        );
        String::from_utf8(out).expect("UTF-8")
    }

    const ID: &str = "abababab-abab-abab-abab-abababababab";

    #[test]
    fn a_row_is_an_object_on_a_line_however_the_stream_is_cut() {
        for step in [1, 2, 3, 7, 64, 100_000] {
            assert_eq!(
                told(Format::Ndjson, &[Some("a\"b\\\n\u{1}☃"), None], step),
                format!(
                    "{{\"id\":\"{ID}\",\"occurred_at\":\"2026-01-02T03:04:05.000006+00:00\",\
                     \"action\":\"a\\\"b\\\\\\n\\u0001☃\",\"address\":\"192.0.2.7\",\
                     \"metadata\":{{\"a\": \"b,c\"}},\"score\":0.5}}\n\
                     {{\"id\":\"{ID}\",\"occurred_at\":\"2026-01-02T03:04:05.000006+00:00\",\
                     \"action\":null,\"address\":\"192.0.2.7\",\
                     \"metadata\":{{\"a\": \"b,c\"}},\"score\":0.5}}\n"
                )
            );
        }
    }

    #[test]
    fn cells_that_a_spreadsheet_would_run_have_an_apostrophe_before_them() {
        for (action, cell) in [
            (Some("plain"), "\"plain\""),
            (Some("a\"b"), "\"a\"\"b\""),
            (Some("=1+1"), "\"'=1+1\""),
            (Some("+1"), "\"'+1\""),
            (Some("-1"), "\"'-1\""),
            (Some("@a"), "\"'@a\""),
            (Some("\tx"), "\"'\tx\""),
            (Some("\rx"), "\"'\rx\""),
            (Some("\nx"), "\"'\nx\""),
            (Some("＝1"), "\"'＝1\""),
            (Some("'x"), "\"''x\""),
            (Some(""), "\"\""),
            (None, ""),
        ] {
            assert_eq!(
                told(Format::Csv, &[action], 1_000),
                format!(
                    "{ID},2026-01-02T03:04:05.000006+00:00,{cell},192.0.2.7,\"{{\"\"a\"\": \"\"b,c\"\"}}\",0.5\r\n"
                )
            );
        }
    }

    #[test]
    fn members_of_an_array_have_commas_between_them() {
        let text = told(Format::Json, &[None, None, None], 50);
        assert_eq!(text.matches(",\n{").count(), 2);
        assert!(text.starts_with("\n{"));
    }

    #[test]
    fn what_is_no_such_stream_is_refused() {
        let mut formatter = Formatter::new(Format::Csv, &columns(), 0);
        assert!(formatter.feed(b"nothing of the kind at all").is_err());
        for (position, byte) in [(19, 9), (20, 1), (24, 0)] {
            let mut broken = stream(&[None]);
            broken[position] = byte;
            formatter.restart();
            assert!(formatter.feed(&broken).is_err(), "{position}");
        }
    }

    #[test]
    fn a_statement_that_was_cut_off_leaves_nothing_behind() {
        let mut formatter = Formatter::new(Format::Ndjson, &columns(), 0);
        let whole = stream(&[Some("x")]);
        assert!(formatter.feed(&whole[..40]).expect("fine").is_empty());
        formatter.restart();
        assert!(!formatter.feed(&whole).expect("fine").is_empty());
        assert_eq!(formatter.rows(), 1);
    }
}
