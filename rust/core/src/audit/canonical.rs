//! Canonical JSON: RFC 8785 (JSON Canonicalization Scheme), and a rule for numbers that no double holds.
//!
//! A number whose exact decimal value is the shortest form of an IEEE 754 double is written as RFC 8785,
//! section 3.2.2.3, says. Any other (an integer beyond 2^53 such as 9007199254740993, 0.1 with twenty more
//! digits) is written as its exact decimal digits, without exponent and without zeros at either end. So two
//! texts have the same canonical bytes if and only if they have the same value, whatever PostgreSQL's jsonb
//! made of them in between: it keeps every digit, but neither exponents, key order nor white space.
//!
//! A text is read once, and what is read is written at once: this runs for every event that is verified, and
//! a tree of values would cost more than hashing does. Only the members of an object that came in another
//! order are moved, once all of them are written.
use std::borrow::Cow;
use std::cmp::Ordering;
use std::ops::Range;

use crate::error::CoreError;

/// Arrays and objects inside one another at most.
pub const MAX_DEPTH: usize = 128;
/// Characters of one number at most; PostgreSQL's numeric has fewer.
const MAX_NUMBER: usize = 200_000;
/// No shortest form of a double has more digits.
const DOUBLE_DIGITS: usize = 17;

/// The canonical bytes of a JSON text.
///
/// Refused: what is not JSON, two members of one name, lone surrogates, more than `MAX_DEPTH` levels.
pub fn canonicalize(text: &str) -> Result<Vec<u8>, CoreError> {
    let mut out = Vec::with_capacity(text.len());
    canonicalize_into(&mut out, text)?;
    Ok(out)
}

/// As `canonicalize`, after what `out` holds already; on an error its end is undefined.
pub fn canonicalize_into(out: &mut Vec<u8>, text: &str) -> Result<(), CoreError> {
    out.reserve(text.len());
    let mut rewriter = Rewriter {
        text,
        place: 0,
        out,
        members: Vec::with_capacity(8),
    };
    rewriter.value(0)?;
    rewriter.skip_space();
    if rewriter.place < text.len() {
        return Err(rewriter.wrong("the end"));
    }
    Ok(())
}

/// Order of member names: by UTF-16 code units (RFC 8785, section 3.2.3).
pub fn compare_names(one: &str, other: &str) -> Ordering {
    let mut pairs = one.bytes().zip(other.bytes());
    match pairs.find(|(one, other)| one != other) {
        None => one.len().cmp(&other.len()),
        Some((one, other)) => utf16_rank(one).cmp(&utf16_rank(other)),
    }
}

/// The bytes of UTF-8 in the order of UTF-16. They have the same but for U+E000 to U+FFFF (first byte 0xee or
/// 0xef), which come after the surrogates that stand for all from U+10000 on (0xf0 to 0xf4).
fn utf16_rank(byte: u8) -> u8 {
    if matches!(byte, 0xee | 0xef) {
        byte + 0x10
    } else {
        byte
    }
}

/// A string in quotes (RFC 8785, section 3.2.2.2).
pub fn write_string(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    let mut left = text.as_bytes();
    loop {
        let (plain, rest) = left.split_at(plain_length(left));
        out.extend_from_slice(plain);
        let Some((&special, rest)) = rest.split_first() else {
            break;
        };
        match special {
            b'"' => out.extend_from_slice(b"\\\""),
            b'\\' => out.extend_from_slice(b"\\\\"),
            0x08 => out.extend_from_slice(b"\\b"),
            0x09 => out.extend_from_slice(b"\\t"),
            0x0a => out.extend_from_slice(b"\\n"),
            0x0c => out.extend_from_slice(b"\\f"),
            0x0d => out.extend_from_slice(b"\\r"),
            other => {
                const DIGITS: &[u8; 16] = b"0123456789abcdef";
                out.extend_from_slice(b"\\u00");
                out.push(DIGITS[usize::from(other >> 4)]);
                out.push(DIGITS[usize::from(other & 15)]);
            }
        }
        left = rest;
    }
    out.push(b'"');
}

/// How many bytes come before the first that a string can't hold as it is: a quote, a backslash, a control.
fn plain_length(bytes: &[u8]) -> usize {
    const ONES: u64 = u64::from_ne_bytes([1; 8]);
    const HIGHS: u64 = ONES << 7;
    // The highest bit of each byte below `limit` is set, and maybe of some after the first such byte.
    let below = |word: u64, limit: u8| word.wrapping_sub(ONES * u64::from(limit)) & !word & HIGHS;
    let (words, rest) = bytes.as_chunks();
    for (place, word) in words.iter().enumerate() {
        let word = u64::from_le_bytes(*word); // the first byte is the lowest, whatever the machine's order
        let quotes = below(word ^ (ONES * u64::from(b'"')), 1);
        let backslashes = below(word ^ (ONES * u64::from(b'\\')), 1);
        let found = below(word, 0x20) | quotes | backslashes;
        if found != 0 {
            return place * 8 + found.trailing_zeros() as usize / 8;
        }
    }
    let special = |byte: &u8| matches!(byte, 0..=0x1f | b'"' | b'\\');
    let in_rest = rest.iter().position(special).unwrap_or(rest.len());
    bytes.len() - rest.len() + in_rest
}

/// An integer; exact, since no integer of 64 bits reaches the 10^21 where exponents begin.
pub fn write_integer(out: &mut Vec<u8>, value: i64) {
    out.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
}

/// A finite double as ECMAScript's `Number::toString` writes it (RFC 8785, section 3.2.2.3).
pub fn write_double(out: &mut Vec<u8>, value: f64) {
    if value == 0.0 {
        out.push(b'0'); // most scores; -0 too
        return;
    }
    let shortest = Shortest::of(value);
    let (digits, point) = shortest.decimal();
    if value < 0.0 {
        out.push(b'-');
    }
    write_as_double(out, digits, point);
}

/// A number as it stands in a JSON text.
pub fn write_number(out: &mut Vec<u8>, literal: &str) -> Result<(), CoreError> {
    let (negative, unsigned) = match literal.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, literal),
    };
    let plain = unsigned.len() <= 15 && unsigned.bytes().all(|byte| byte.is_ascii_digit());
    if plain && !unsigned.starts_with('0') {
        out.extend_from_slice(literal.as_bytes()); // most numbers are small integers
        return Ok(());
    }
    let (mantissa, exponent) = match unsigned.find(['e', 'E']) {
        Some(place) => (&unsigned[..place], parse_exponent(&unsigned[place + 1..])),
        None => (unsigned, 0),
    };
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let all: String = [whole, fraction].concat();
    let leading = all.len() - all.trim_start_matches('0').len();
    let digits = all.trim_matches('0').as_bytes();
    if digits.is_empty() {
        out.push(b'0'); // -0 too
        return Ok(());
    }
    // The value is 0.digits × 10^point.
    let offset =
        i64::try_from(whole.len()).unwrap_or(i64::MAX) - i64::try_from(leading).unwrap_or(i64::MAX);
    let point = exponent.saturating_add(offset);
    if negative {
        out.push(b'-');
    }
    if digits.len() <= DOUBLE_DIGITS
        && let Ok(double) = unsigned.parse::<f64>()
        && double.is_finite()
    {
        let shortest = Shortest::of(double);
        if shortest.decimal() == (digits, point) {
            write_as_double(out, digits, point);
            return Ok(());
        }
    }
    write_exactly(out, digits, point)
}

fn parse_exponent(text: &str) -> i64 {
    let (negative, digits) = match text.as_bytes().first() {
        Some(b'-') => (true, &text[1..]),
        Some(b'+') => (false, &text[1..]),
        _ => (false, text),
    };
    let size = digits.bytes().fold(0_i64, |sum, digit| {
        sum.saturating_mul(10)
            .saturating_add(i64::from(digit - b'0'))
    });
    // Far from the ends, so that sums with lengths of texts can't overflow.
    let size = size.min(i64::MAX / 4);
    if negative { -size } else { size }
}

/// The digits of 0.digits × 10^point, without an exponent.
fn write_exactly(out: &mut Vec<u8>, digits: &[u8], point: i64) -> Result<(), CoreError> {
    let length = usize::try_from(point.unsigned_abs()).unwrap_or(usize::MAX);
    if length.saturating_add(digits.len()) > MAX_NUMBER {
        return Err(malformed("a number of more than 200000 digits".to_owned()));
    }
    if point <= 0 {
        out.extend_from_slice(b"0.");
        out.resize(out.len() + length, b'0');
        out.extend_from_slice(digits);
    } else if digits.len() <= length {
        out.extend_from_slice(digits);
        out.resize(out.len() + length - digits.len(), b'0');
    } else {
        out.extend_from_slice(&digits[..length]);
        out.push(b'.');
        out.extend_from_slice(&digits[length..]);
    }
    Ok(())
}

/// ECMAScript's `Number::toString` (ECMA-262, section 6.1.6.1.20) of 0.digits × 10^point, without the sign.
fn write_as_double(out: &mut Vec<u8>, digits: &[u8], point: i64) {
    let Some((first, rest)) = digits.split_first() else {
        out.push(b'0');
        return;
    };
    if (-5..=21).contains(&point) {
        // Short: the bound on lengths can't be met.
        let written = write_exactly(out, digits, point);
        debug_assert!(written.is_ok());
        return;
    }
    out.push(*first);
    if !rest.is_empty() {
        out.push(b'.');
        out.extend_from_slice(rest);
    }
    out.push(b'e');
    if point > 0 {
        out.push(b'+');
    }
    write_integer(out, point - 1);
}

/// The fewest digits that name a finite double.
struct Shortest {
    digits: [u8; 32],
    length: usize,
    point: i64,
}

impl Shortest {
    fn of(value: f64) -> Self {
        let mut buffer = zmij::Buffer::new();
        let text = buffer.format_finite(value.abs());
        let mut found = Self {
            digits: [0; 32],
            length: 0,
            point: 0,
        };
        let (mantissa, exponent) = text.split_once('e').unwrap_or((text, "0"));
        let (mut before_point, mut zeros) = (true, 0);
        for byte in mantissa.bytes() {
            match byte {
                b'.' => before_point = false,
                b'0' if found.length == 0 => found.point -= i64::from(!before_point),
                b'0' => {
                    zeros += 1;
                    found.point += i64::from(before_point);
                }
                digit => {
                    found.length += zeros; // those between are zeros already
                    found.digits[found.length] = digit - b'0';
                    found.length += 1;
                    found.point += i64::from(before_point);
                    zeros = 0;
                }
            }
        }
        found.digits[..found.length]
            .iter_mut()
            .for_each(|digit| *digit += b'0');
        found.point += parse_exponent(exponent);
        found
    }

    /// Digits without zeros at either end, and the point's place before them.
    fn decimal(&self) -> (&[u8], i64) {
        (&self.digits[..self.length], self.point)
    }
}

/// A member of an object that is not closed yet.
struct Member<'a> {
    name: Cow<'a, str>,
    /// Where it is in what was written, without the comma after it.
    place: Range<usize>,
}

/// Reads a text and writes its canonical form.
struct Rewriter<'a, 'out> {
    text: &'a str,
    place: usize,
    out: &'out mut Vec<u8>,
    /// Those of all open objects, the innermost object's at the end.
    members: Vec<Member<'a>>,
}

impl<'a> Rewriter<'a, '_> {
    fn value(&mut self, depth: usize) -> Result<(), CoreError> {
        if depth > MAX_DEPTH {
            return Err(malformed(format!("nested more than {MAX_DEPTH} deep")));
        }
        self.skip_space();
        match self.peek() {
            Some(b'{') => self.object(depth),
            Some(b'[') => self.array(depth),
            Some(b'"') => self.string().map(drop),
            Some(b'-' | b'0'..=b'9') => self.number(),
            _ => self.word(),
        }
    }

    fn word(&mut self) -> Result<(), CoreError> {
        for word in ["null", "true", "false"] {
            if self.text.as_bytes()[self.place..].starts_with(word.as_bytes()) {
                self.place += word.len();
                self.out.extend_from_slice(word.as_bytes());
                return Ok(());
            }
        }
        Err(self.wrong("a value"))
    }

    fn array(&mut self, depth: usize) -> Result<(), CoreError> {
        self.place += 1;
        self.out.push(b'[');
        self.skip_space();
        if self.take(b']') {
            self.out.push(b']');
            return Ok(());
        }
        loop {
            self.value(depth + 1)?;
            self.skip_space();
            if self.take(b']') {
                self.out.push(b']');
                return Ok(());
            }
            if !self.take(b',') {
                return Err(self.wrong("',' or ']'"));
            }
            self.out.push(b',');
        }
    }

    fn object(&mut self, depth: usize) -> Result<(), CoreError> {
        self.place += 1;
        self.out.push(b'{');
        self.skip_space();
        if self.take(b'}') {
            self.out.push(b'}');
            return Ok(());
        }
        let first = self.members.len();
        loop {
            self.member(depth)?;
            self.skip_space();
            if self.take(b'}') {
                break;
            }
            if !self.take(b',') {
                return Err(self.wrong("',' or '}'"));
            }
            self.out.push(b',');
        }
        self.arrange(first)?;
        self.out.push(b'}');
        Ok(())
    }

    fn member(&mut self, depth: usize) -> Result<(), CoreError> {
        self.skip_space();
        if self.peek() != Some(b'"') {
            return Err(self.wrong("a name"));
        }
        let begin = self.out.len();
        let name = self.string()?;
        self.skip_space();
        if !self.take(b':') {
            return Err(self.wrong("':'"));
        }
        self.out.push(b':');
        self.value(depth + 1)?;
        let place = begin..self.out.len();
        self.members.push(Member { name, place });
        Ok(())
    }

    /// Puts the members from `first` on, which are the last that was written, in order.
    fn arrange(&mut self, first: usize) -> Result<(), CoreError> {
        let members = &mut self.members[first..];
        let in_order = |one: &Member<'_>, other: &Member<'_>| {
            compare_names(&one.name, &other.name) == Ordering::Less
        };
        if !members.is_sorted_by(in_order) {
            let begin = members.first().map_or(0, |member| member.place.start);
            let end = self.out.len();
            members.sort_unstable_by(|one, other| compare_names(&one.name, &other.name));
            if let Some(pair) = members
                .windows(2)
                .find(|pair| !in_order(&pair[0], &pair[1]))
            {
                let name = shown(&pair[0].name);
                return Err(malformed(format!("two members of the name {name:?}")));
            }
            // As long in any order: they are written once more behind, and take the place of the old ones.
            for (place, member) in members.iter().enumerate() {
                if place > 0 {
                    self.out.push(b',');
                }
                self.out.extend_from_within(member.place.clone());
            }
            self.out.copy_within(end.., begin);
            self.out.truncate(end);
        }
        self.members.truncate(first);
        Ok(())
    }

    fn number(&mut self) -> Result<(), CoreError> {
        let begin = self.place;
        self.take(b'-');
        if !self.take(b'0') {
            self.digits()?;
        }
        if self.take(b'.') {
            self.digits()?;
        }
        if self.take(b'e') || self.take(b'E') {
            if !self.take(b'+') {
                self.take(b'-');
            }
            self.digits()?;
        }
        write_number(self.out, &self.text[begin..self.place])
    }

    fn digits(&mut self) -> Result<(), CoreError> {
        let begin = self.place;
        while matches!(self.peek(), Some(b'0'..=b'9')) {
            self.place += 1;
        }
        if self.place == begin {
            return Err(self.wrong("a digit"));
        }
        Ok(())
    }

    /// Writes it, and says what it means.
    fn string(&mut self) -> Result<Cow<'a, str>, CoreError> {
        let begin = self.place;
        self.place += 1;
        let plain = self.plain();
        if self.take(b'"') {
            // Nothing in it was escaped, so nothing needs to be.
            self.out
                .extend_from_slice(&self.text.as_bytes()[begin..self.place]);
            return Ok(Cow::Borrowed(plain));
        }
        let mut whole = plain.to_owned();
        while !self.take(b'"') {
            if !self.take(b'\\') {
                return Err(self.wrong("a character of a string"));
            }
            whole.push(self.escaped()?);
            whole.push_str(self.plain());
        }
        write_string(self.out, &whole);
        Ok(Cow::Owned(whole))
    }

    fn plain(&mut self) -> &'a str {
        let begin = self.place;
        self.place += plain_length(&self.text.as_bytes()[begin..]);
        &self.text[begin..self.place]
    }

    fn escaped(&mut self) -> Result<char, CoreError> {
        let kind = self.peek();
        self.place += 1;
        Ok(match kind {
            Some(b'"') => '"',
            Some(b'\\') => '\\',
            Some(b'/') => '/',
            Some(b'b') => '\u{8}',
            Some(b'f') => '\u{c}',
            Some(b'n') => '\n',
            Some(b'r') => '\r',
            Some(b't') => '\t',
            Some(b'u') => {
                let first = self.unit()?;
                let code = if (0xd800..0xdc00).contains(&first) {
                    if !(self.take(b'\\') && self.take(b'u')) {
                        return Err(malformed("half of a surrogate pair".to_owned()));
                    }
                    let second = self.unit()?;
                    if !(0xdc00..0xe000).contains(&second) {
                        return Err(malformed("half of a surrogate pair".to_owned()));
                    }
                    0x1_0000 + ((first - 0xd800) << 10) + (second - 0xdc00)
                } else {
                    first
                };
                char::from_u32(code)
                    .ok_or_else(|| malformed("half of a surrogate pair".to_owned()))?
            }
            _ => {
                self.place -= 1;
                return Err(self.wrong("an escape"));
            }
        })
    }

    fn unit(&mut self) -> Result<u32, CoreError> {
        let digits = self.text.as_bytes().get(self.place..self.place + 4);
        let digits = digits.filter(|digits| digits.iter().all(u8::is_ascii_hexdigit));
        let Some(digits) = digits else {
            return Err(self.wrong("four hexadecimal digits"));
        };
        self.place += 4;
        Ok(digits.iter().fold(0, |sum, &digit| {
            sum * 16 + char::from(digit).to_digit(16).unwrap_or(0)
        }))
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.place).copied()
    }

    fn take(&mut self, wanted: u8) -> bool {
        let found = self.peek() == Some(wanted);
        self.place += usize::from(found);
        found
    }

    fn skip_space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.place += 1;
        }
    }

    fn wrong(&self, wanted: &str) -> CoreError {
        malformed(format!("{wanted} is missing at byte {}", self.place))
    }
}

fn malformed(why: String) -> CoreError {
    CoreError::Malformed { what: "JSON", why }
}

fn shown(name: &str) -> String {
    name.chars().take(64).collect()
}

#[cfg(test)]
mod tests;
