//! Values as text, appended to one buffer.
use std::io::Write as _;
use std::net::{IpAddr, Ipv6Addr};

const DAY: i64 = 86_400;
const HEX: &[u8; 16] = b"0123456789abcdef";

/// A buffer that grows.
#[derive(Debug, Default)]
pub struct Writer(Vec<u8>);

impl Writer {
    pub fn with_capacity(size: usize) -> Self {
        Self(Vec::with_capacity(size))
    }

    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    pub fn raw(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    pub fn quoted(&mut self, write: impl FnOnce(&mut Self)) {
        self.0.push(b'"');
        write(self);
        self.0.push(b'"');
    }

    /// A JSON string, RFC 8259, section 7.
    pub fn json_text(&mut self, text: &str) {
        self.0.push(b'"');
        let bytes = text.as_bytes();
        let mut written = 0;
        for (place, byte) in bytes.iter().enumerate() {
            if *byte >= 0x20 && *byte != b'"' && *byte != b'\\' {
                continue;
            }
            self.raw(&bytes[written..place]);
            written = place + 1;
            match byte {
                b'"' => self.raw(b"\\\""),
                b'\\' => self.raw(b"\\\\"),
                b'\n' => self.raw(b"\\n"),
                b'\r' => self.raw(b"\\r"),
                b'\t' => self.raw(b"\\t"),
                other => {
                    self.raw(b"\\u00");
                    self.hex(*other);
                }
            }
        }
        self.raw(&bytes[written..]);
        self.0.push(b'"');
    }

    /// A cell in quotes, which no spreadsheet takes for a formula (OWASP, "CSV Injection"). One that begins with
    /// an apostrophe gets another, so that taking one away gives every text back.
    pub fn csv_text(&mut self, text: &str) {
        self.0.push(b'"');
        if text.starts_with([
            '=', '+', '-', '@', '\t', '\r', '\n', '\'', '＝', '＋', '－', '＠',
        ]) {
            self.0.push(b'\'');
        }
        let bytes = text.as_bytes();
        let mut written = 0;
        for (place, byte) in bytes.iter().enumerate() {
            if *byte == b'"' {
                self.raw(&bytes[written..=place]);
                written = place; // once more
            }
        }
        self.raw(&bytes[written..]);
        self.0.push(b'"');
    }

    /// RFC 3339 in UTC with microseconds; years before 0 or after 9999 with their sign.
    pub fn time(&mut self, micros: i64) {
        let (seconds, fraction) = (micros.div_euclid(1_000_000), micros.rem_euclid(1_000_000));
        let (days, second) = (seconds.div_euclid(DAY), seconds.rem_euclid(DAY));
        let (year, month, day) = date(days);
        if (0..=9999).contains(&year) {
            self.two(year / 100);
            self.two(year % 100);
        } else {
            self.show(format_args!("{year:+05}"));
        }
        for (mark, number) in [
            (b'-', month),
            (b'-', day),
            (b'T', second / 3600),
            (b':', second / 60 % 60),
            (b':', second % 60),
        ] {
            self.0.push(mark);
            self.two(number);
        }
        self.0.push(b'.');
        for number in [fraction / 10_000, fraction / 100 % 100, fraction % 100] {
            self.two(number);
        }
        self.raw(b"+00:00");
    }

    pub fn uuid(&mut self, id: &[u8; 16]) {
        for (place, byte) in id.iter().enumerate() {
            if matches!(place, 4 | 6 | 8 | 10) {
                self.0.push(b'-');
            }
            self.hex(*byte);
        }
    }

    /// The shortest text that gives the same number back.
    pub fn float(&mut self, number: f64) {
        self.show(format_args!("{number:?}"));
    }

    pub fn address(&mut self, address: IpAddr) {
        self.raw(shown_address(address).as_bytes());
    }

    fn show(&mut self, what: std::fmt::Arguments<'_>) {
        // Writing to memory does not fail.
        let _ = self.0.write_fmt(what);
    }

    fn hex(&mut self, byte: u8) {
        self.0.push(HEX[usize::from(byte >> 4)]);
        self.0.push(HEX[usize::from(byte & 15)]);
    }

    fn two(&mut self, number: i64) {
        self.0.push(b'0' + (number / 10) as u8);
        self.0.push(b'0' + (number % 10) as u8);
    }
}

/// An address as PostgreSQL's `host()` writes it: also `::192.0.2.7`.
pub fn shown_address(address: IpAddr) -> String {
    match address {
        IpAddr::V6(six) if is_compatible(six) => {
            let [.., a, b, c, d] = six.octets();
            format!("::{a}.{b}.{c}.{d}")
        }
        other => other.to_string(),
    }
}

fn is_compatible(address: Ipv6Addr) -> bool {
    let segments = address.segments();
    segments[..6].iter().all(|one| *one == 0) && segments[6] != 0
}

/// Year, month and day of a day since 1970 (Hinnant, "chrono-Compatible Low-Level Date Algorithms",
/// `civil_from_days`).
fn date(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let of_era = shifted.rem_euclid(146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(write: impl FnOnce(&mut Writer)) -> String {
        let mut out = Writer::default();
        write(&mut out);
        String::from_utf8(out.into_bytes()).expect("UTF-8")
    }

    #[test]
    fn times_at_the_ends_of_days_and_ages() {
        for (micros, text) in [
            (0, "1970-01-01T00:00:00.000000+00:00"),
            (-1, "1969-12-31T23:59:59.999999+00:00"),
            (951_782_400_000_000, "2000-02-29T00:00:00.000000+00:00"),
            (4_107_542_399_999_999, "2100-02-28T23:59:59.999999+00:00"),
            (253_402_300_799_999_999, "9999-12-31T23:59:59.999999+00:00"),
            (
                253_402_300_800_000_000,
                "+10000-01-01T00:00:00.000000+00:00",
            ),
        ] {
            assert_eq!(written(|out| out.time(micros)), text);
        }
        // What `infinity` becomes: no time, and no panic.
        assert!(!written(|out| out.time(i64::MAX)).is_empty());
        assert!(!written(|out| out.time(i64::MIN)).is_empty());
    }

    #[test]
    fn addresses_as_postgresql_writes_them() {
        for text in [
            "192.0.2.7",
            "::1",
            "::",
            "2001:db8::1",
            "::ffff:10.0.0.1",
            "::1.2.3.4",
            "1:0:2::",
        ] {
            let address = text.parse().expect("an address");
            assert_eq!(written(|out| out.address(address)), text);
        }
    }

    #[test]
    fn numbers_give_themselves_back() {
        for number in [0.0, 1.0, 0.1, 1e-9, 1e300, 5e-324, 0.999_999_999_999_999_9] {
            let text = written(|out| out.float(number));
            assert_eq!(
                text.parse::<f64>().expect("a number").to_bits(),
                number.to_bits()
            );
        }
    }
}
