//! What comes from a server, cut into frames: RESP3 as a client reads it, and RESP2, which is a part of it.

use crate::wire::Value;
use bytes::{Buf, Bytes, BytesMut};

/// Lists within lists; nothing that a server answers to us comes near.
const DEPTH: usize = 32;
/// Bytes of a string, or items of a list; servers take and send no more.
const LONGEST: usize = 512 << 20;
/// Items for which room is made ahead, whatever a list says of itself.
const ROOM: usize = 64;

/// One answer, or one message that the server sent by itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Frame {
    /// Nothing had asked for it.
    pub pushed: bool,
    /// What it says.
    pub value: Value,
}

/// The first whole frame, taken off the buffer; nothing while it is not all there.
pub fn next_frame(buffer: &mut BytesMut) -> Result<Option<Frame>, String> {
    let mut rest = Rest(&buffer[..]);
    match rest.frame() {
        Ok(frame) => {
            let read = buffer.len() - rest.0.len();
            buffer.advance(read);
            Ok(Some(frame))
        }
        Err(Stop::Incomplete) => Ok(None),
        Err(Stop::Malformed(what)) => Err(format!("not the Redis protocol: {what}")),
    }
}

enum Stop {
    Incomplete,
    Malformed(String),
}

/// What has not been read yet.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn frame(&mut self) -> Result<Frame, Stop> {
        // Attributes stand before what they say something about, and nobody asks for them.
        while self.0.first() == Some(&b'|') {
            self.value(DEPTH)?;
        }
        let pushed = self.0.first() == Some(&b'>');
        let value = self.value(DEPTH)?;
        Ok(Frame { pushed, value })
    }

    fn value(&mut self, depth: usize) -> Result<Value, Stop> {
        let line = self.line()?;
        let Some((kind, said)) = line.split_first() else {
            return Err(Stop::Malformed(String::from("an empty line")));
        };
        Ok(match kind {
            b':' => Value::Int(number(said)?),
            b'+' | b'(' => Value::Bytes(Bytes::copy_from_slice(said)),
            b'-' => Value::Error(String::from_utf8_lossy(said).into_owned()),
            b'_' => Value::Nil,
            b'#' => Value::Bool(said == b"t"),
            b',' => Value::Double(double(said)?),
            b'$' => self.string(said)?.map_or(Value::Nil, Value::Bytes),
            // Its first three letters and a colon say how it is to be shown.
            b'=' => self.string(said)?.map_or(Value::Nil, |text| {
                Value::Bytes(text.slice(text.len().min(4)..))
            }),
            b'!' => self.string(said)?.map_or(Value::Nil, |text| {
                Value::Error(String::from_utf8_lossy(&text).into_owned())
            }),
            b'*' | b'~' | b'>' => self.list(said, 1, depth)?,
            b'%' | b'|' => self.list(said, 2, depth)?,
            other => return Err(Stop::Malformed(format!("type {:?}", char::from(*other)))),
        })
    }

    fn list(&mut self, said: &[u8], each: usize, depth: usize) -> Result<Value, Stop> {
        let Some(count) = length(said)? else {
            return Ok(Value::Nil);
        };
        let Some(depth) = depth.checked_sub(1).filter(|_| count <= LONGEST) else {
            return Err(Stop::Malformed(format!("a list of {count} items")));
        };
        let count = count * each;
        let mut items = Vec::with_capacity(count.min(ROOM));
        for _ in 0..count {
            items.push(self.value(depth)?);
        }
        Ok(Value::List(items))
    }

    /// The bytes that follow, as many as the line has said.
    fn string(&mut self, said: &[u8]) -> Result<Option<Bytes>, Stop> {
        let Some(length) = length(said)? else {
            return Ok(None);
        };
        if length > LONGEST {
            return Err(Stop::Malformed(format!("a string of {length} bytes")));
        }
        let Some((text, rest)) = self.0.split_at_checked(length + 2) else {
            return Err(Stop::Incomplete);
        };
        if &text[length..] != b"\r\n" {
            return Err(Stop::Malformed(String::from("a string of another length")));
        }
        self.0 = rest;
        Ok(Some(Bytes::copy_from_slice(&text[..length])))
    }

    /// Up to the end of the line, which is left out.
    fn line(&mut self) -> Result<&'a [u8], Stop> {
        let Some(at) = self.0.iter().position(|byte| *byte == b'\n') else {
            return Err(Stop::Incomplete);
        };
        let (line, rest) = self.0.split_at(at + 1);
        self.0 = rest;
        line.strip_suffix(b"\r\n")
            .ok_or_else(|| Stop::Malformed(String::from("a line that ends in \\n alone")))
    }
}

/// Every answer has some of these, so not by way of a text.
fn number(said: &[u8]) -> Result<i64, Stop> {
    let (digits, sign) = match said.split_first() {
        Some((b'-', digits)) => (digits, -1),
        Some((b'+', digits)) => (digits, 1),
        _ => (said, 1),
    };
    let add = |sum: i64, byte: &u8| {
        let digit = byte
            .is_ascii_digit()
            .then(|| i64::from(byte - b'0') * sign)?;
        sum.checked_mul(10)?.checked_add(digit)
    };
    let sum = digits.iter().try_fold(0, add);
    sum.filter(|_| !digits.is_empty())
        .ok_or_else(|| unclear("number", said))
}

fn double(said: &[u8]) -> Result<f64, Stop> {
    let text = std::str::from_utf8(said).ok();
    text.and_then(|text| text.parse().ok())
        .ok_or_else(|| unclear("number", said))
}

/// Of a string or a list; nothing for the nil of RESP2.
fn length(said: &[u8]) -> Result<Option<usize>, Stop> {
    match number(said)? {
        -1 => Ok(None),
        length => usize::try_from(length)
            .map(Some)
            .map_err(|_| unclear("length", said)),
    }
}

fn unclear(what: &str, said: &[u8]) -> Stop {
    Stop::Malformed(format!("{what} {:?}", String::from_utf8_lossy(said)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(bytes: &[u8]) -> Result<Option<Frame>, String> {
        next_frame(&mut BytesMut::from(bytes))
    }

    fn value(bytes: &[u8]) -> Value {
        read(bytes).unwrap().unwrap().value
    }

    fn text(text: &str) -> Value {
        Value::Bytes(Bytes::copy_from_slice(text.as_bytes()))
    }

    #[test]
    fn every_type_of_the_protocol_is_read() {
        assert_eq!(value(b":-12\r\n"), Value::Int(-12));
        assert_eq!(value(b"+OK\r\n"), text("OK"));
        assert_eq!(value(b"-ERR no\r\n"), Value::Error("ERR no".into()));
        assert_eq!(value(b"$4\r\na\r\nb\r\n"), text("a\r\nb"));
        assert_eq!(value(b"$0\r\n\r\n"), text(""));
        for nil in [&b"$-1\r\n"[..], b"*-1\r\n", b"_\r\n"] {
            assert_eq!(value(nil), Value::Nil);
        }
        assert_eq!(value(b"#t\r\n"), Value::Bool(true));
        assert_eq!(value(b"#f\r\n"), Value::Bool(false));
        assert_eq!(value(b",-1.5e3\r\n"), Value::Double(-1500.0));
        assert_eq!(value(b",inf\r\n"), Value::Double(f64::INFINITY));
        let big = "3492890328409238509324850943850943825024385";
        assert_eq!(value(format!("({big}\r\n").as_bytes()), text(big));
        assert_eq!(value(b"=8\r\ntxt:some\r\n"), text("some"));
        assert_eq!(value(b"!6\r\nERR no\r\n"), Value::Error("ERR no".into()));
        let pair = Value::List(vec![Value::Int(1), Value::Int(2)]);
        for list in [
            &b"*2\r\n:1\r\n:2\r\n"[..],
            b"~2\r\n:1\r\n:2\r\n",
            b"%1\r\n:1\r\n:2\r\n",
        ] {
            assert_eq!(
                read(list),
                Ok(Some(Frame {
                    pushed: false,
                    value: pair.clone()
                }))
            );
        }
        assert_eq!(
            read(b">2\r\n:1\r\n:2\r\n"),
            Ok(Some(Frame {
                pushed: true,
                value: pair
            }))
        );
        assert_eq!(value(b"|1\r\n+ttl\r\n:9\r\n:1\r\n"), Value::Int(1));
    }

    #[test]
    fn what_is_no_protocol_is_an_error() {
        for bytes in [
            &b"HTTP/1.1 400 Bad Request\r\n"[..],
            b"\r\n",
            b":\r\n",
            b":1x\r\n",
            b":99999999999999999999\r\n",
            b"$-2\r\n",
            b"$1\r\nabc\r\n",
            b"*-7\r\n",
            b"%9223372036854775807\r\n",
            b"$9223372036854775807\r\n",
            b"$?\r\n",
            b"+OK\n",
        ] {
            let found = read(bytes);
            assert!(
                found.is_err(),
                "{:?} gave {found:?}",
                String::from_utf8_lossy(bytes)
            );
        }
        let nested = b"*1\r\n".repeat(10_000);
        assert!(read(&nested).is_err());
    }

    fn written(value: &Value, out: &mut Vec<u8>) {
        match value {
            Value::Nil => out.extend(b"_\r\n"),
            Value::Int(n) => out.extend(format!(":{n}\r\n").bytes()),
            Value::Double(x) => out.extend(format!(",{x}\r\n").bytes()),
            Value::Bool(b) => out.extend(if *b { b"#t\r\n" } else { b"#f\r\n" }),
            Value::Bytes(bytes) => {
                out.extend(format!("${}\r\n", bytes.len()).bytes());
                out.extend(bytes);
                out.extend(b"\r\n");
            }
            Value::List(items) => {
                out.extend(format!("*{}\r\n", items.len()).bytes());
                for item in items {
                    written(item, out);
                }
            }
            Value::Error(text) => {
                out.extend(format!("!{}\r\n{text}\r\n", text.len()).bytes());
            }
        }
    }

    fn values() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Nil),
            any::<i64>().prop_map(Value::Int),
            (-1e9..1e9).prop_map(Value::Double),
            any::<bool>().prop_map(Value::Bool),
            proptest::collection::vec(any::<u8>(), 0..40)
                .prop_map(|bytes| Value::Bytes(Bytes::from(bytes))),
            "\\PC{0,20}".prop_map(Value::Error),
        ];
        leaf.prop_recursive(4, 40, 6, |item| {
            proptest::collection::vec(item, 0..6).prop_map(Value::List)
        })
    }

    proptest! {
            #[test]
            fn a_frame_is_read_as_it_was_written_however_it_is_cut(sent in proptest::collection::vec(values(), 1..4)) {
                let mut bytes = Vec::new();
                for value in &sent {
     written(value, &mut bytes);
    }
                // Byte by byte: nothing but the frames, each as soon as its last byte has come.
                let (mut buffer, mut got) = (BytesMut::new(), Vec::new());
                for byte in &bytes {
                    buffer.extend_from_slice(&[*byte]);
                    if let Some(frame) = next_frame(&mut buffer).unwrap() {
                        prop_assert!(buffer.is_empty());
                        got.push(frame.value);
                    }
                }
                prop_assert_eq!(&got, &sent);
                // All at once.
                let mut buffer = BytesMut::from(&bytes[..]);
                for value in &sent {
                    let frame = next_frame(&mut buffer).unwrap().unwrap();
                    prop_assert_eq!(&frame.value, value);
                }
                prop_assert!(buffer.is_empty());
            }

            #[test]
            fn nothing_that_may_come_makes_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
                let mut buffer = BytesMut::from(&bytes[..]);
                while let Ok(Some(_)) = next_frame(&mut buffer) {}
            }

            #[test]
            fn nor_a_frame_of_which_a_byte_was_changed(sent in values(), at in any::<prop::sample::Index>(), byte: u8) {
                let mut bytes = Vec::new();
                written(&sent, &mut bytes);
                let at = at.index(bytes.len());
                bytes[at] = byte;
                let mut buffer = BytesMut::from(&bytes[..]);
                while let Ok(Some(_)) = next_frame(&mut buffer) {}
            }
        }
}
