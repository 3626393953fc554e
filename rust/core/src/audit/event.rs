//! An event on its way to the database, and what is read from the words of its caller.
use std::borrow::Cow;
use std::net::{IpAddr, Ipv6Addr};

use super::Hash;
use super::leaf::Fields;
use super::merkle::leaf_hash;
use super::row;
use crate::error::CoreError;

/// Characters of a text at most.
pub const MAX_TEXT: usize = 512;
/// Bytes of an event's metadata at most.
pub const MAX_JSON: usize = 1 << 20;
/// Levels of nesting of an event's metadata at most.
pub const MAX_DEPTH: usize = 32;
/// Microseconds that an event may lie ahead of the clock.
pub const AHEAD: i64 = 86_400_000_000;

const LONGEST_ADDRESS: usize = 128;
const FAILED_WORDS: [&str; 3] = ["failed", "failure", "fail"];
const DENIED_WORDS: [&str; 5] = ["denied", "refused", "forbidden", "blocked", "rejected"];

/// An event as it is stored, except for its place in a segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Its own columns, as `row::write` writes them.
    pub row: Vec<u8>,
    /// Its leaf hash; None where the trail's integrity is not proven.
    pub leaf: Option<Hash>,
}

impl Event {
    /// `known`: the JSON in it is canonical already. `hashed`: its leaf hash is wanted.
    pub fn new(fields: &Fields<'_>, known: bool, hashed: bool) -> Result<Self, CoreError> {
        let mut out = Vec::with_capacity(512);
        let mut leaf = None;
        if hashed {
            fields.canonical_as(&mut out, known)?;
            leaf = Some(leaf_hash(&out));
            out.clear();
        }
        row::write(&mut out, fields)?;
        Ok(Self { row: out, leaf })
    }

    /// From columns that were written before, as to a file.
    pub fn from_row(bytes: &[u8], hashed: bool) -> Result<Self, CoreError> {
        let fields = row::read(bytes)?;
        let leaf = if hashed {
            Some(fields.hash(&mut Vec::with_capacity(512))?)
        } else {
            None
        };
        Ok(Self {
            row: bytes.to_vec(),
            leaf,
        })
    }

    /// What it says.
    pub fn fields(&self) -> Result<Fields<'_>, CoreError> {
        row::read(&self.row)
    }
}

/// How it ended, as the action's words say: `login.failed` is a failure, `access.denied` was denied.
pub fn guess_outcome(action: &str) -> &'static str {
    let mut denied = false;
    for word in action.split(|letter: char| !letter.is_alphanumeric()) {
        let is = |known: &&str| word.eq_ignore_ascii_case(known);
        if FAILED_WORDS.iter().any(is) {
            return "failure";
        }
        denied |= DENIED_WORDS.iter().any(is);
    }
    if denied { "denied" } else { "success" }
}

/// An address in its plain form; None where the text is none.
///
/// A zone (`%eth0`) is left out, which PostgreSQL's inet can't hold; an IPv4 address in IPv6 clothes
/// (`::ffff:10.0.0.7`) becomes the IPv4 address, so that one peer has one name.
pub fn peer_address(text: &str) -> Option<IpAddr> {
    if text.len() > LONGEST_ADDRESS {
        return None;
    }
    let host = text.split_once('%').map_or(text, |(host, _)| host);
    match host.parse().ok()? {
        IpAddr::V6(address) => {
            Some(Ipv6Addr::to_ipv4_mapped(&address).map_or(IpAddr::V6(address), IpAddr::V4))
        }
        address @ IpAddr::V4(_) => Some(address),
    }
}

/// What the events of a category are called in reasons for anomalies.
pub fn noun_of(category: &str) -> &'static str {
    match category {
        "authentication" => "logins",
        "authorization" => "access checks",
        "data_access" => "reads",
        "data_change" => "changes",
        "data_export" => "exports",
        _ => "",
    }
}

/// Did it end badly?
pub fn is_failed(outcome: &str) -> bool {
    matches!(outcome, "failure" | "denied")
}

/// May a text be stored: not too long, no NUL, which PostgreSQL can't hold?
pub fn is_plain_text(text: &str) -> bool {
    (text.len() <= MAX_TEXT || text.chars().count() <= MAX_TEXT) && !text.as_bytes().contains(&0)
}

/// Reasons as a JSON array.
pub fn reasons_json<'a>(reasons: impl Iterator<Item = &'a str>) -> Cow<'static, str> {
    let mut out = vec![b'['];
    for (place, reason) in reasons.enumerate() {
        if place > 0 {
            out.push(b',');
        }
        super::canonical::write_string(&mut out, reason);
    }
    out.push(b']');
    String::from_utf8_lossy(&out).into_owned().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_are_read_from_whole_words() {
        for (action, wanted) in [
            ("user.login", "success"),
            ("login.failed", "failure"),
            ("LOGIN_FAILURE", "failure"),
            ("access.denied", "denied"),
            ("denied then failed", "failure"),
            ("failover.started", "success"),
            ("", "success"),
        ] {
            assert_eq!(guess_outcome(action), wanted, "{action}");
        }
    }

    #[test]
    fn addresses_take_one_form() {
        let plain = |text| peer_address(text).map(|address| address.to_string());
        assert_eq!(plain("::FFFF:10.0.0.7").as_deref(), Some("10.0.0.7"));
        assert_eq!(plain("fe80::1%eth0").as_deref(), Some("fe80::1"));
        assert_eq!(plain("2001:DB8:0::1").as_deref(), Some("2001:db8::1"));
        assert_eq!(plain("10.0.0.7:80"), None);
        assert_eq!(plain(&"1".repeat(200)), None);
    }

    #[test]
    fn from_its_row_an_event_is_the_same() {
        let fields = Fields {
            occurred_at: 5,
            category: "security",
            action: "x",
            level: "info",
            outcome: "success",
            metadata: Some("{\"a\":1}"),
            ..Fields::default()
        };
        let made = Event::new(&fields, true, true).unwrap();
        assert_eq!(Event::from_row(&made.row, true).unwrap(), made);
        assert_eq!(Event::from_row(&made.row, false).unwrap().leaf, None);
        assert_eq!(made.fields().unwrap(), fields);
    }
}
