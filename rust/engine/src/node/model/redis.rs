//! As much of Redis as the scripts use: hashes and sorted sets in memory, with the time given from outside.

use std::collections::{BTreeMap, BTreeSet};

pub type Bytes = Vec<u8>;

/// What a command answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    Nil,
    Int(i64),
    Bulk(Bytes),
    Array(Vec<Reply>),
    Error(String),
}

impl Reply {
    fn count(number: usize) -> Self {
        Self::Int(number.cast_signed() as i64)
    }

    fn text(text: &impl ToString) -> Self {
        Self::Bulk(text.to_string().into_bytes())
    }

    fn bulks<'a>(items: impl IntoIterator<Item = &'a Bytes>) -> Self {
        Self::Array(items.into_iter().cloned().map(Self::Bulk).collect())
    }
}

/// A score, ordered as Redis does.
#[derive(Debug, Clone, Copy)]
struct Score(f64);

impl PartialEq for Score {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Score {}

impl PartialOrd for Score {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Score {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

/// The fields of a hash in the order in which HSCAN visits them.
type Hash = BTreeMap<(u64, Bytes), Bytes>;

#[derive(Debug, Clone, Default)]
struct Sorted {
    scores: BTreeMap<Bytes, Score>,
    order: BTreeSet<(Score, Bytes)>,
}

#[derive(Debug, Clone)]
enum Stored {
    Hash(Hash),
    Sorted(Sorted),
}

/// The data, its clock, and what was published.
#[derive(Debug, Clone, Default)]
pub struct Redis {
    keys: BTreeMap<Bytes, Stored>,
    /// Microseconds since 1970.
    pub wall: u64,
    /// When the server started, by the same clock.
    pub started: u64,
    /// Channel and message, oldest first.
    pub published: Vec<(Bytes, Bytes)>,
    /// The keys that the running script has declared.
    pub declared: Vec<Bytes>,
}

type Answer = Result<Reply, String>;

const WRONG_TYPE: &str = "WRONGTYPE Operation against a key holding the wrong kind of value";

/// A field's place in a scan: any order will do that does not change.
fn place(field: &[u8]) -> (u64, Bytes) {
    let hash = field.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    });
    (hash >> 16, field.to_vec())
}

fn text(arg: &[u8]) -> String {
    String::from_utf8_lossy(arg).into_owned()
}

fn integer(arg: &[u8]) -> Result<i64, String> {
    text(arg)
        .parse()
        .map_err(|_| String::from("ERR value is not an integer or out of range"))
}

fn float(arg: &[u8]) -> Result<f64, String> {
    match text(arg).as_str() {
        "-inf" => Ok(f64::NEG_INFINITY),
        "+inf" | "inf" => Ok(f64::INFINITY),
        other => other
            .parse()
            .map_err(|_| String::from("ERR value is not a valid float")),
    }
}

/// True for the scores above (or below) a bound, which may begin with `(`.
fn beyond(bound: &[u8], least: bool) -> Result<impl Fn(f64) -> bool, String> {
    let (open, number) = match bound.strip_prefix(b"(") {
        Some(rest) => (true, float(rest)?),
        None => (false, float(bound)?),
    };
    Ok(move |score: f64| match (least, open) {
        (true, true) => score > number,
        (true, false) => score >= number,
        (false, true) => score < number,
        (false, false) => score <= number,
    })
}

/// The same for members.
fn beyond_lex(bound: &[u8], least: bool) -> Result<impl Fn(&[u8]) -> bool, String> {
    let (kind, member) = bound.split_first().ok_or("ERR min or max is empty")?;
    let (kind, member) = (*kind, member.to_vec());
    if !b"[(+-".contains(&kind) {
        return Err(String::from("ERR min or max not valid string range item"));
    }
    Ok(move |at: &[u8]| match (kind, least) {
        (b'[', true) => at >= &member[..],
        (b'(', true) => at > &member[..],
        (b'[', false) => at <= &member[..],
        (b'(', false) => at < &member[..],
        (b'-', least) => least,
        (_, least) => !least,
    })
}

/// `LIMIT offset count`, as the last three of the options.
fn limit(options: &[Bytes]) -> Result<(usize, usize), String> {
    match options {
        [] => Ok((0, usize::MAX)),
        [word, offset, count] if word.eq_ignore_ascii_case(b"LIMIT") => {
            let count = integer(count)?;
            let offset = integer(offset)?.unsigned_abs() as usize;
            Ok((offset, usize::try_from(count).unwrap_or(usize::MAX)))
        }
        _ => Err(String::from("ERR syntax error")),
    }
}

impl Redis {
    /// Everything is gone; the clock goes on.
    pub fn lose_data(&mut self) {
        self.keys.clear();
    }

    /// Names of the keys that hold anything, and how much.
    pub fn sizes(&self) -> impl Iterator<Item = (String, usize)> {
        self.keys.iter().map(|(key, stored)| {
            let size = match stored {
                Stored::Hash(hash) => hash.len(),
                Stored::Sorted(sorted) => sorted.order.len(),
            };
            (text(key), size)
        })
    }

    /// Carries out a command.
    pub fn call(&mut self, args: &[Bytes]) -> Answer {
        let (name, rest) = args.split_first().ok_or("ERR no command")?;
        let name = text(name).to_ascii_uppercase();
        match (name.as_str(), rest) {
            ("TIME", []) => Ok(Reply::Array(vec![
                Reply::text(&(self.wall / 1_000_000)),
                Reply::text(&(self.wall % 1_000_000)),
            ])),
            ("INFO", [section]) if section == b"server" => {
                let age = self.wall.saturating_sub(self.started) / 1_000_000;
                Ok(Reply::text(&format!(
                    "# Server\r\nuptime_in_seconds:{age}\r\n"
                )))
            }
            ("PUBLISH", [channel, message]) => {
                self.published.push((channel.clone(), message.clone()));
                Ok(Reply::Int(1))
            }
            (_, [key, rest @ ..]) => {
                // As a cluster, and an access control list, would have it.
                if !self.declared.contains(key) {
                    return Err(format!("ERR the script did not declare key {}", text(key)));
                }
                let answer = if name.starts_with('H') {
                    self.on_hash(&name, key, rest)
                } else {
                    self.on_sorted(&name, key, rest)
                };
                let empty = match self.keys.get(key) {
                    Some(Stored::Hash(hash)) => hash.is_empty(),
                    Some(Stored::Sorted(sorted)) => sorted.order.is_empty(),
                    None => false,
                };
                if empty {
                    self.keys.remove(key);
                }
                answer
            }
            _ => Err(unknown(&name)),
        }
    }

    fn hash(&mut self, key: &Bytes) -> Result<&mut Hash, String> {
        let stored = self.keys.entry(key.clone());
        match stored.or_insert_with(|| Stored::Hash(Hash::new())) {
            Stored::Hash(hash) => Ok(hash),
            Stored::Sorted(_) => Err(WRONG_TYPE.into()),
        }
    }

    fn sorted(&mut self, key: &Bytes) -> Result<&mut Sorted, String> {
        let stored = self.keys.entry(key.clone());
        match stored.or_insert_with(|| Stored::Sorted(Sorted::default())) {
            Stored::Sorted(sorted) => Ok(sorted),
            Stored::Hash(_) => Err(WRONG_TYPE.into()),
        }
    }

    fn on_hash(&mut self, name: &str, key: &Bytes, args: &[Bytes]) -> Answer {
        let hash = self.hash(key)?;
        let get = |hash: &Hash, field: &Bytes| {
            hash.get(&place(field))
                .map_or(Reply::Nil, |value| Reply::Bulk(value.clone()))
        };
        match (name, args) {
            ("HGET", [field]) => Ok(get(hash, field)),
            ("HMGET", [_, ..]) => Ok(Reply::Array(args.iter().map(|f| get(hash, f)).collect())),
            ("HEXISTS", [field]) => Ok(Reply::Int(hash.contains_key(&place(field)).into())),
            ("HLEN", []) => Ok(Reply::count(hash.len())),
            ("HSET", [_, _, ..]) if args.len().is_multiple_of(2) => {
                let before = hash.len();
                for pair in args.chunks(2) {
                    hash.insert(place(&pair[0]), pair[1].clone());
                }
                Ok(Reply::count(hash.len() - before))
            }
            ("HDEL", [_, ..]) => {
                let gone = args.iter().filter(|f| hash.remove(&place(f)).is_some());
                Ok(Reply::count(gone.count()))
            }
            ("HINCRBY", [field, by]) => {
                let value = hash.entry(place(field)).or_insert_with(|| b"0".to_vec());
                let sum = integer(value)?
                    .checked_add(integer(by)?)
                    .ok_or("ERR increment or decrement would overflow")?;
                *value = sum.to_string().into_bytes();
                Ok(Reply::Int(sum))
            }
            ("HGETALL", []) => Ok(Reply::bulks(hash.iter().flat_map(|((_, f), v)| [f, v]))),
            ("HSCAN", [cursor, options @ ..]) => {
                let count = match options {
                    [] => 10,
                    [word, count] if word.eq_ignore_ascii_case(b"COUNT") => {
                        integer(count)?.max(1) as usize
                    }
                    _ => return Err(String::from("ERR syntax error")),
                };
                let from = (integer(cursor)?.unsigned_abs(), Bytes::new());
                let mut rest = hash.range(from..).peekable();
                let mut page: Vec<&Bytes> = Vec::new();
                let mut next = 0;
                for _ in 0..count {
                    let Some(((at, field), value)) = rest.next() else {
                        break;
                    };
                    page.extend([field, value]);
                    next = at + 1;
                }
                // Redis may name an entry more than once, so a script has to bear that.
                page.extend_from_within(..page.len().min(2));
                let cursor = if rest.peek().is_some() { next } else { 0 };
                Ok(Reply::Array(vec![Reply::text(&cursor), Reply::bulks(page)]))
            }
            _ => Err(unknown(name)),
        }
    }

    fn on_sorted(&mut self, name: &str, key: &Bytes, args: &[Bytes]) -> Answer {
        let sorted = self.sorted(key)?;
        match (name, args) {
            ("ZADD", _) => sorted.add(args),
            ("ZREM", [_, ..]) => {
                let gone = args.iter().filter(|member| sorted.remove(member));
                Ok(Reply::count(gone.count()))
            }
            ("ZSCORE", [member]) => Ok(sorted
                .scores
                .get(member)
                .map_or(Reply::Nil, |score| Reply::text(&score.0))),
            ("ZCARD", []) => Ok(Reply::count(sorted.order.len())),
            ("ZRANGEBYSCORE", [least, most, options @ ..]) => {
                let (above, below) = (beyond(least, true)?, beyond(most, false)?);
                let scores = options.first().is_some_and(|word| word == b"WITHSCORES");
                let (offset, count) = limit(&options[usize::from(scores)..])?;
                let found = sorted.order.iter();
                let found = found.filter(|(score, _)| above(score.0) && below(score.0));
                let mut reply = Vec::new();
                for (score, member) in found.skip(offset).take(count) {
                    reply.push(Reply::Bulk(member.clone()));
                    if scores {
                        reply.push(Reply::text(&score.0));
                    }
                }
                Ok(Reply::Array(reply))
            }
            ("ZRANGEBYLEX", [least, most, options @ ..]) => {
                let (offset, count) = limit(options)?;
                let found = sorted.lex(least, most)?;
                Ok(Reply::bulks(found.into_iter().skip(offset).take(count)))
            }
            ("ZLEXCOUNT", [least, most]) => Ok(Reply::count(sorted.lex(least, most)?.len())),
            _ => Err(unknown(name)),
        }
    }
}

impl Sorted {
    fn add(&mut self, args: &[Bytes]) -> Answer {
        let word = args.first().map(|word| text(word).to_ascii_uppercase());
        let (comparison, pairs) = match word.as_deref() {
            Some(word @ ("LT" | "GT")) => (word, &args[1..]),
            _ => ("", args),
        };
        if pairs.is_empty() || !pairs.len().is_multiple_of(2) {
            return Err(String::from("ERR syntax error"));
        }
        let before = self.order.len();
        for pair in pairs.chunks(2) {
            let (score, member) = (Score(float(&pair[0])?), &pair[1]);
            let had = self.scores.get(member).copied();
            // LT and GT say when an existing member moves; a new one is always added.
            let moves = match (had, comparison) {
                (Some(had), "LT") => score < had,
                (Some(had), "GT") => score > had,
                _ => true,
            };
            if moves {
                self.remove(member);
                self.scores.insert(member.clone(), score);
                self.order.insert((score, member.clone()));
            }
        }
        Ok(Reply::count(self.order.len() - before))
    }

    fn remove(&mut self, member: &Bytes) -> bool {
        let Some(score) = self.scores.remove(member) else {
            return false;
        };
        self.order.remove(&(score, member.clone()))
    }

    /// Members by name; only where all scores are the same does Redis say what that gives.
    fn lex(&self, least: &[u8], most: &[u8]) -> Result<Vec<&Bytes>, String> {
        if let (Some(first), Some(last)) = (self.order.first(), self.order.last())
            && first.0 != last.0
        {
            return Err(String::from("ERR a lexical range over different scores"));
        }
        let (above, below) = (beyond_lex(least, true)?, beyond_lex(most, false)?);
        let members = self.order.iter().map(|(_, member)| member);
        Ok(members.filter(|m| above(m) && below(m)).collect())
    }
}

fn unknown(name: &str) -> String {
    format!("ERR unknown command or wrong number of arguments for {name} (in the test's server)")
}
