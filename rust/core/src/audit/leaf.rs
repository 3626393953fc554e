//! An event's canonical bytes and leaf hash.
use std::fmt;
use std::net::IpAddr;
use std::ops::Range;

use super::Hash;
use super::canonical::{canonicalize_into, write_double, write_integer, write_string};
use super::merkle::leaf_hash;
use crate::error::CoreError;

/// The fields of a stored event that its hash covers; texts of JSON may have any form that keeps their value.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Fields<'a> {
    /// When it happened, microseconds since 1970.
    pub occurred_at: i64,
    /// A UUID's 16 bytes.
    pub id: [u8; 16],
    /// What kind of thing happened.
    pub category: &'a str,
    /// What happened.
    pub action: &'a str,
    /// How grave it is.
    pub level: &'a str,
    /// How it ended.
    pub outcome: &'a str,
    /// Who did it.
    pub user_id: Option<&'a str>,
    /// In whose realm.
    pub tenant_id: Option<&'a str>,
    /// What kind of thing it was done to.
    pub resource_type: Option<&'a str>,
    /// To which one.
    pub resource_id: Option<&'a str>,
    /// Where from.
    pub ip_address: Option<Address>,
    /// What ties events together.
    pub correlation_id: Option<&'a str>,
    /// The trace, 32 hexadecimal digits.
    pub trace_id: Option<&'a str>,
    /// The span, 16 hexadecimal digits.
    pub span_id: Option<&'a str>,
    /// Whom personal data is about.
    pub subject_id: Option<&'a str>,
    /// A JSON object.
    pub metadata: Option<&'a str>,
    /// A JSON object of encrypted fields.
    pub personal: Option<&'a str>,
    /// How unusual it is.
    pub anomaly_score: Option<f64>,
    /// A JSON array of sentences.
    pub anomaly_reasons: Option<&'a str>,
}

impl Fields<'_> {
    /// Writes the canonical bytes (RFC 8785): one object, without the fields that are null.
    pub fn canonical(&self, out: &mut Vec<u8>) -> Result<(), CoreError> {
        self.canonical_as(out, false)
    }

    /// As `canonical`; `known`: the JSON in it is canonical already.
    pub fn canonical_as(&self, out: &mut Vec<u8>, known: bool) -> Result<(), CoreError> {
        if let Some(score) = self.anomaly_score.filter(|score| !score.is_finite()) {
            return Err(CoreError::Malformed {
                what: "event",
                why: format!("anomaly_score is {score}"),
            });
        }
        self.write(out, &mut |out, json| {
            if known {
                out.extend_from_slice(json.as_bytes());
                Ok(())
            } else {
                canonicalize_into(out, json)
            }
        })
    }

    /// Writes the object with the JSON in it as it stands; `anomaly_score` must be finite.
    pub fn stored(&self, out: &mut Vec<u8>) {
        let written = self.write(out, &mut |out, json| {
            out.extend_from_slice(json.as_bytes());
            Ok(())
        });
        debug_assert!(written.is_ok());
    }

    fn write(&self, out: &mut Vec<u8>, write_json: &mut WriteJson<'_>) -> Result<(), CoreError> {
        // In the order of their names, which RFC 8785 asks for.
        put_text(out, "{\"action\":", Some(self.action));
        put_json(
            out,
            ",\"anomaly_reasons\":",
            self.anomaly_reasons,
            write_json,
        )?;
        if let Some(score) = self.anomaly_score {
            out.extend_from_slice(b",\"anomaly_score\":");
            write_double(out, score);
        }
        put_text(out, ",\"category\":", Some(self.category));
        put_text(out, ",\"correlation_id\":", self.correlation_id);
        out.extend_from_slice(b",\"id\":");
        write_uuid(out, &self.id);
        if let Some(address) = self.ip_address {
            out.extend_from_slice(b",\"ip_address\":\"");
            address.write(out);
            out.push(b'"');
        }
        put_text(out, ",\"level\":", Some(self.level));
        put_json(out, ",\"metadata\":", self.metadata, write_json)?;
        out.extend_from_slice(b",\"occurred_at\":");
        write_integer(out, self.occurred_at);
        put_text(out, ",\"outcome\":", Some(self.outcome));
        put_json(out, ",\"personal\":", self.personal, write_json)?;
        put_text(out, ",\"resource_id\":", self.resource_id);
        put_text(out, ",\"resource_type\":", self.resource_type);
        put_text(out, ",\"span_id\":", self.span_id);
        put_text(out, ",\"subject_id\":", self.subject_id);
        put_text(out, ",\"tenant_id\":", self.tenant_id);
        put_text(out, ",\"trace_id\":", self.trace_id);
        put_text(out, ",\"user_id\":", self.user_id);
        out.push(b'}');
        Ok(())
    }

    /// The leaf hash: SHA-256(0x00 || canonical bytes). `scratch` only saves memory.
    pub fn hash(&self, scratch: &mut Vec<u8>) -> Result<Hash, CoreError> {
        scratch.clear();
        self.canonical(scratch)?;
        Ok(leaf_hash(scratch))
    }
}

/// An address as PostgreSQL's inet holds it: a host's, or a network's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    /// The host, or where the network begins.
    pub ip: IpAddr,
    /// How many of its bits name the network; all of them for a host.
    pub prefix: u8,
}

impl Address {
    fn is_host(self) -> bool {
        self.prefix == if self.ip.is_ipv4() { 32 } else { 128 }
    }

    /// Writes the one form that is hashed: PostgreSQL and Python shorten IPv6 differently.
    fn write(self, out: &mut Vec<u8>) {
        match self.ip {
            // Nearly all of them; half of what the formatter takes.
            IpAddr::V4(ip) => {
                for (place, octet) in ip.octets().into_iter().enumerate() {
                    if place > 0 {
                        out.push(b'.');
                    }
                    write_integer(out, octet.into());
                }
            }
            IpAddr::V6(ip) => out.extend_from_slice(ip.to_string().as_bytes()),
        }
        if !self.is_host() {
            out.push(b'/');
            write_integer(out, self.prefix.into());
        }
    }
}

impl From<IpAddr> for Address {
    fn from(ip: IpAddr) -> Self {
        let prefix = if ip.is_ipv4() { 32 } else { 128 };
        Self { ip, prefix }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = Vec::new();
        self.write(&mut text);
        formatter.write_str(&String::from_utf8_lossy(&text))
    }
}

type WriteJson<'a> = dyn FnMut(&mut Vec<u8>, &str) -> Result<(), CoreError> + 'a;

fn put_text(out: &mut Vec<u8>, name: &str, value: Option<&str>) {
    if let Some(value) = value {
        out.extend_from_slice(name.as_bytes());
        write_string(out, value);
    }
}

fn put_json(
    out: &mut Vec<u8>,
    name: &str,
    value: Option<&str>,
    write: &mut WriteJson<'_>,
) -> Result<(), CoreError> {
    if let Some(value) = value {
        out.extend_from_slice(name.as_bytes());
        write(out, value)?;
    }
    Ok(())
}

/// A UUID as text, in quotes.
pub fn write_uuid(out: &mut Vec<u8>, id: &[u8; 16]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    const GROUPS: [Range<usize>; 5] = [0..4, 4..6, 6..8, 8..10, 10..16];
    let mut text = *b"\"00000000-0000-0000-0000-000000000000\"";
    // A group lies behind a quote or a dash for each one before it.
    for (dashes, group) in GROUPS.into_iter().enumerate() {
        for place in group {
            let at = 2 * place + 1 + dashes;
            text[at] = DIGITS[usize::from(id[place] >> 4)];
            text[at + 1] = DIGITS[usize::from(id[place] & 15)];
        }
    }
    out.extend_from_slice(&text);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event() -> Fields<'static> {
        Fields {
            occurred_at: 1_764_250_000_123_456,
            id: [
                0x01, 0x9a, 0xc5, 0x5e, 0x38, 0x80, 0x71, 0xf9, 0x80, 0, 0, 0, 0, 0, 0, 7,
            ],
            category: "authentication",
            action: "user.login",
            level: "info",
            outcome: "success",
            user_id: Some("zoë \"z\""),
            ip_address: Some("2001:DB8::1".parse::<IpAddr>().unwrap().into()),
            metadata: Some(r#"{"b": 1.50, "a": [9007199254740993]}"#),
            anomaly_score: Some(0.0),
            ..Fields::default()
        }
    }

    #[test]
    fn the_canonical_bytes_are_what_is_written_here() {
        let mut out = Vec::new();
        event().canonical(&mut out).unwrap();
        let wanted = concat!(
            r#"{"action":"user.login","anomaly_score":0,"category":"authentication","#,
            r#""id":"019ac55e-3880-71f9-8000-000000000007","ip_address":"2001:db8::1","level":"info","#,
            r#""metadata":{"a":[9007199254740993],"b":1.5},"occurred_at":1764250000123456,"outcome":"success","#,
            r#""user_id":"zoë \"z\""}"#
        );
        assert_eq!(String::from_utf8(out.clone()).unwrap(), wanted);
        // An object of ordered names: canonicalizing it again changes nothing.
        let again = super::super::canonical::canonicalize(wanted).unwrap();
        assert_eq!(String::from_utf8(again).unwrap(), wanted);
        assert_eq!(event().hash(&mut Vec::new()).unwrap(), leaf_hash(&out));
    }

    #[test]
    fn addresses_have_one_form() {
        for (given, prefix, wanted) in [
            ("10.0.0.7", 32, "10.0.0.7"),
            ("255.0.20.100", 32, "255.0.20.100"),
            ("2001:DB8:0:0::1", 128, "2001:db8::1"),
            ("::1.2.3.4", 128, "::102:304"),
            ("2001:db8::", 32, "2001:db8::/32"),
            ("10.0.0.0", 8, "10.0.0.0/8"),
        ] {
            let ip: IpAddr = given.parse().unwrap();
            assert_eq!(Address { ip, prefix }.to_string(), wanted);
        }
    }
}
