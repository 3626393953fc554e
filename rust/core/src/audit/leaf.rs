//! An event's canonical bytes and leaf hash.
use std::borrow::Cow;
use std::net::IpAddr;

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
    /// Where from, as text; hashed in the form of `plain_address`.
    pub ip_address: Option<Cow<'a, str>>,
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
        let mut object = Object { out, first: true };
        object.out.push(b'{');
        // In the order of their names, which RFC 8785 asks for.
        object.text("action", Some(self.action));
        object.json("anomaly_reasons", self.anomaly_reasons, write_json)?;
        if let Some(score) = self.anomaly_score {
            object.name("anomaly_score");
            write_double(object.out, score);
        }
        object.text("category", Some(self.category));
        object.text("correlation_id", self.correlation_id);
        object.name("id");
        write_uuid(object.out, &self.id);
        if let Some(address) = &self.ip_address {
            object.text("ip_address", Some(&plain_address(address)));
        }
        object.text("level", Some(self.level));
        object.json("metadata", self.metadata, write_json)?;
        object.name("occurred_at");
        write_integer(object.out, self.occurred_at);
        object.text("outcome", Some(self.outcome));
        object.json("personal", self.personal, write_json)?;
        object.text("resource_id", self.resource_id);
        object.text("resource_type", self.resource_type);
        object.text("span_id", self.span_id);
        object.text("subject_id", self.subject_id);
        object.text("tenant_id", self.tenant_id);
        object.text("trace_id", self.trace_id);
        object.text("user_id", self.user_id);
        object.out.push(b'}');
        Ok(())
    }

    /// The leaf hash: SHA-256(0x00 || canonical bytes). `scratch` only saves memory.
    pub fn hash(&self, scratch: &mut Vec<u8>) -> Result<Hash, CoreError> {
        scratch.clear();
        self.canonical(scratch)?;
        Ok(leaf_hash(scratch))
    }
}

/// An IP address in the form that is hashed, whoever wrote it: PostgreSQL and Python shorten IPv6 differently.
pub fn plain_address(text: &str) -> String {
    let host = text
        .strip_suffix("/32")
        .filter(|host| !host.contains(':'))
        .or_else(|| text.strip_suffix("/128"))
        .unwrap_or(text);
    host.parse::<IpAddr>()
        .map_or_else(|_| text.to_owned(), |address| address.to_string())
}

type WriteJson<'a> = dyn FnMut(&mut Vec<u8>, &str) -> Result<(), CoreError> + 'a;

struct Object<'a> {
    out: &'a mut Vec<u8>,
    first: bool,
}

impl Object<'_> {
    fn name(&mut self, name: &str) {
        if !self.first {
            self.out.push(b',');
        }
        self.first = false;
        self.out.push(b'"');
        self.out.extend_from_slice(name.as_bytes());
        self.out.extend_from_slice(b"\":");
    }

    fn text(&mut self, name: &str, value: Option<&str>) {
        if let Some(value) = value {
            self.name(name);
            write_string(self.out, value);
        }
    }

    fn json(
        &mut self,
        name: &str,
        value: Option<&str>,
        write: &mut WriteJson<'_>,
    ) -> Result<(), CoreError> {
        if let Some(value) = value {
            self.name(name);
            write(self.out, value)?;
        }
        Ok(())
    }
}

/// A UUID as text, in quotes.
pub fn write_uuid(out: &mut Vec<u8>, id: &[u8; 16]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    out.push(b'"');
    for (place, byte) in id.iter().enumerate() {
        if matches!(place, 4 | 6 | 8 | 10) {
            out.push(b'-');
        }
        out.push(DIGITS[usize::from(byte >> 4)]);
        out.push(DIGITS[usize::from(byte & 15)]);
    }
    out.push(b'"');
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
            ip_address: Some("2001:DB8::1/128".into()),
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
        for (given, wanted) in [
            ("10.0.0.7/32", "10.0.0.7"),
            ("10.0.0.7", "10.0.0.7"),
            ("2001:DB8:0:0::1/128", "2001:db8::1"),
            ("::1.2.3.4", "::102:304"),
            ("2001:db8::/32", "2001:db8::/32"),
            ("10.0.0.0/8", "10.0.0.0/8"),
        ] {
            assert_eq!(plain_address(given), wanted);
        }
    }
}
