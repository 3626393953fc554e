//! Which partition a lock or a service belongs to, and which slot of a cluster a key lies in.
//!
//! Both follow the rule of Redis Cluster, so that `CLUSTER KEYSLOT` tells them too: CRC-16/XMODEM of the name, or of
//! what stands between its first `{` and the next `}` if that is not empty, modulo 16,384. The partition is the slot
//! modulo the number of partitions. Locks whose names carry the same hash tag share a partition, therefore.

/// Slots of a cluster.
pub const SLOTS: u16 = 16_384;

const TABLE: [u16; 256] = table();

const fn table() -> [u16; 256] {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = (byte as u16) << 8;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 0x8000 == 0 {
                crc << 1
            } else {
                (crc << 1) ^ 0x1021
            };
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
}

fn crc16(bytes: &[u8]) -> u16 {
    bytes.iter().fold(0, |crc, byte| {
        (crc << 8) ^ TABLE[usize::from((crc >> 8) ^ u16::from(*byte))]
    })
}

/// What is hashed of a key.
fn hashed(key: &[u8]) -> &[u8] {
    let Some(open) = key.iter().position(|byte| *byte == b'{') else {
        return key;
    };
    let rest = &key[open + 1..];
    match rest.iter().position(|byte| *byte == b'}') {
        Some(length) if length > 0 => &rest[..length],
        _ => key,
    }
}

/// The slot of a key.
pub fn slot(key: &[u8]) -> u16 {
    crc16(hashed(key)) % SLOTS
}

/// The partition of a lock or a service, of so many.
pub fn of(name: &str, partitions: usize) -> usize {
    if partitions <= 1 {
        return 0;
    }
    usize::from(slot(name.as_bytes())) % partitions
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_those_of_the_specification() {
        assert_eq!(crc16(b"123456789"), 0x31c3);
        for (key, expected) in [
            ("", 0),
            ("foo", 12_182),
            ("bar", 5_061),
            ("{user1000}.following", slot(b"user1000")),
            ("{user1000}.followers", slot(b"user1000")),
            ("foo{}{bar}", crc16(b"foo{}{bar}") % SLOTS),
            ("foo{{bar}}zap", crc16(b"{bar") % SLOTS),
            ("foo{bar}{zap}", 5_061),
            ("foo{bar", crc16(b"foo{bar") % SLOTS),
        ] {
            assert_eq!(slot(key.as_bytes()), expected, "{key}");
        }
    }

    /// The vectors of the deployment page.
    #[test]
    fn partitions_are_those_that_are_documented() {
        for (name, expected) in [
            ("foo", 22),
            ("orders", 41),
            ("user:42", 8),
            ("cart:{42}", 0),
            ("stock:{42}", 0),
            ("Straße", 58),
        ] {
            assert_eq!(of(name, 64), expected, "{name}");
        }
        assert_eq!(of("foo", 1), 0);
        assert_eq!(of("foo", 48), 12_182 % 48);
    }

    #[test]
    fn names_spread_over_all_partitions() {
        let mut counts = [0u32; 64];
        for number in 0..64 * 100 {
            counts[of(&format!("user:{number}"), 64)] += 1;
        }
        assert!(
            counts.iter().all(|count| (50..200).contains(count)),
            "{counts:?}"
        );
    }
}
