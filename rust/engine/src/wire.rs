//! Commands to bytes and frames to answers.

use bytes::{BufMut, Bytes, BytesMut};
use dotmac_core::lease::Micros;
use dotmac_core::locks::{AcquireReply, HeartbeatReply};
use std::sync::Arc;

/// A reply of the server, free of protocol types.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// No value.
    Nil,
    /// A number.
    Int(i64),
    /// A floating-point number.
    Double(f64),
    /// A truth value.
    Bool(bool),
    /// A string of bytes.
    Bytes(Bytes),
    /// A list; a map is a list of keys and values in turn.
    List(Vec<Value>),
    /// An error, as the server wrote it.
    Error(String),
}

impl Value {
    /// The number in it, also when it is written as a string.
    pub fn int(&self) -> Option<i64> {
        match self {
            Self::Int(n) => Some(*n),
            Self::Bytes(b) => std::str::from_utf8(b).ok()?.parse().ok(),
            _ => None,
        }
    }

    /// The text in it.
    pub fn text(&self) -> Option<String> {
        match self {
            Self::Bytes(b) => Some(String::from_utf8_lossy(b).into_owned()),
            Self::Int(n) => Some(n.to_string()),
            _ => None,
        }
    }

    /// The items of a list.
    pub fn items(&self) -> &[Value] {
        if let Self::List(items) = self {
            items
        } else {
            &[]
        }
    }
}

/// What stands under a name in a map, or in a list of names and values in turn.
pub fn field<'a>(map: &'a Value, name: &str) -> Option<&'a Value> {
    map.items()
        .chunks_exact(2)
        .find(|pair| matches!(&pair[0], Value::Bytes(key) if key[..] == *name.as_bytes()))
        .map(|pair| &pair[1])
}

/// One argument: `$length`, then the bytes.
pub fn bulk(out: &mut BytesMut, arg: &[u8]) {
    let mut number = itoa::Buffer::new();
    out.put_u8(b'$');
    out.put_slice(number.format(arg.len()).as_bytes());
    out.put_slice(b"\r\n");
    out.put_slice(arg);
    out.put_slice(b"\r\n");
}

/// The head of a command of `count` arguments.
pub fn head(out: &mut BytesMut, count: usize) {
    let mut number = itoa::Buffer::new();
    out.put_u8(b'*');
    out.put_slice(number.format(count).as_bytes());
    out.put_slice(b"\r\n");
}

/// A whole command.
pub fn command(out: &mut BytesMut, args: &[&[u8]]) {
    head(out, args.len());
    for arg in args {
        bulk(out, arg);
    }
}

/// What the acquire script answered; an error names what was not understood.
pub fn acquire_reply(value: &Value) -> Result<AcquireReply, String> {
    let items = value.items();
    let number = |i: usize| items.get(i).and_then(Value::int);
    let reply = match (number(0), items) {
        (Some(code @ (1 | 5)), [_, fence, stamp]) => match (fence.int(), stamp.int()) {
            (Some(fence), Some(stamp)) => Some(AcquireReply::Granted {
                fence: fence.unsigned_abs(),
                stamp: stamp.unsigned_abs(),
                claimed: code == 1,
            }),
            _ => None,
        },
        (Some(2), [_, rest, rank, place]) => match (rest.int(), rank.text(), place.int()) {
            (Some(rest), Some(rank), Some(place)) => Some(AcquireReply::Waiting {
                rest: (rest >= 0).then(|| millis(rest)),
                rank,
                place: u32::try_from(place).unwrap_or(u32::MAX),
            }),
            _ => None,
        },
        (Some(3), [_, left]) => left.int().map(|left| AcquireReply::Grace(millis(left))),
        (Some(0), _) => Some(AcquireReply::NotFree(number(1).unwrap_or(0).unsigned_abs())),
        (Some(-1), [_, cycle @ ..]) => Some(AcquireReply::Deadlock(
            cycle.iter().filter_map(Value::text).collect(),
        )),
        (Some(-2), _) => Some(AcquireReply::NoSession),
        (Some(-3), _) => Some(AcquireReply::Superseded),
        (Some(-4), [_, kind]) => kind.text().map(AcquireReply::Mismatch),
        (Some(-5), _) => Some(AcquireReply::NotOffered),
        _ => None,
    };
    reply.ok_or_else(|| format!("unexpected reply to acquire: {value:?}"))
}

/// Microseconds; what is below zero has passed.
fn millis(ms: i64) -> Micros {
    u64::try_from(ms).unwrap_or(0) * 1000
}

fn numbers(items: &[Value]) -> Vec<u64> {
    items
        .iter()
        .filter_map(Value::int)
        .map(i64::unsigned_abs)
        .collect()
}

/// What the script answered that takes leases back: the fences that are held; the second is false where a newer connection
/// took over, so that it says nothing.
pub fn assert_reply(value: &Value) -> Result<(Option<Vec<u64>>, bool), String> {
    let items = value.items();
    match (items.first().and_then(Value::int), items) {
        (Some(1), [_, held @ ..]) => Ok((Some(numbers(held)), true)),
        (Some(0), _) => Ok((None, true)),
        (Some(-3), _) => Ok((None, false)),
        _ => Err(format!("unexpected reply to taking leases back: {value:?}")),
    }
}

/// Names of locks and fencing tokens.
pub type Leases = Vec<(Arc<str>, u64)>;

/// A cursor, then locks and fences in turn.
pub fn page_of_leases(value: &Value) -> Result<(u64, Leases), String> {
    let page = || {
        let (cursor, rows) = value.items().split_first()?;
        let rows = rows.chunks_exact(2).map(|row| {
            let name: Arc<str> = row[0].text()?.into();
            Some((name, row[1].int()?.unsigned_abs()))
        });
        Some((cursor.int()?.unsigned_abs(), rows.collect::<Option<_>>()?))
    };
    page().ok_or_else(|| format!("unexpected page of leases: {value:?}"))
}

/// What the heartbeat script answered; nothing if a newer connection took over.
pub fn heartbeat_reply(value: &Value) -> Result<Option<HeartbeatReply>, String> {
    let items = value.items();
    match (items.first().and_then(Value::int), items) {
        (
            Some(1),
            [
                _,
                epoch,
                _stamp,
                revoked,
                due,
                taking_back,
                last_number,
                accepted @ ..,
            ],
        ) => Ok(Some(HeartbeatReply::Alive {
            epoch: epoch.text().unwrap_or_default(),
            revoked: revoked.text().unwrap_or_default(),
            accepted: numbers(accepted),
            due: due.int().filter(|due| *due >= 0).map(millis),
            taking_back: taking_back.int() == Some(1),
            last_number: last_number.int().map_or(0, i64::unsigned_abs),
        })),
        (Some(0), _) => Ok(Some(HeartbeatReply::Gone)),
        (Some(-3), _) => Ok(None),
        _ => Err(format!("unexpected reply to a heartbeat: {value:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_written_as_the_protocol_wants_it() {
        let mut out = BytesMut::new();
        command(&mut out, &[b"GET", b"a\r\nb", b""]);
        assert_eq!(&out[..], b"*3\r\n$3\r\nGET\r\n$4\r\na\r\nb\r\n$0\r\n\r\n");
    }

    #[test]
    fn replies_of_the_acquire_script_are_told_apart() {
        let list = |items: &[i64]| Value::List(items.iter().map(|n| Value::Int(*n)).collect());
        assert_eq!(
            acquire_reply(&list(&[5, 7, 9])),
            Ok(AcquireReply::Granted {
                fence: 7,
                stamp: 9,
                claimed: false
            })
        );
        assert_eq!(
            acquire_reply(&list(&[2, 40, 5_000_017, 3])),
            Ok(AcquireReply::Waiting {
                rest: Some(40_000),
                rank: String::from("5000017"),
                place: 3
            })
        );
        assert!(acquire_reply(&list(&[2, 40])).is_err());
        assert!(acquire_reply(&list(&[1, 7])).is_err());
        assert!(acquire_reply(&Value::Nil).is_err());
    }
}
