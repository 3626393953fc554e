//! Event ids: UUIDv7 whose time part gives back the event's time to the microsecond.
//!
//! RFC 9562, section 5.7, with section 6.2, method 3: the 12 bits after the millisecond hold the fraction of
//! the millisecond. So the id alone leads to the event's partition, and a retry with the same id meets the
//! same primary key (`occurred_at`, id).

/// A clock that is this far behind has been set back, and is followed.
const NEAR: i64 = 1_000_000;

/// The id of an event at `time_us` (microseconds since 1970, not negative) with 62 bits of chance.
pub fn uuid7(time_us: i64, chance: u64) -> [u8; 16] {
    let millisecond = time_us.div_euclid(1000) as u128;
    // Rounded up, so that `time_of` rounds down to the very same microsecond.
    let twelve = (time_us.rem_euclid(1000) as u128 * 4096).div_ceil(1000);
    let tail = u128::from(chance & ((1 << 62) - 1));
    (millisecond << 80 | 7 << 76 | twelve << 64 | 2 << 62 | tail).to_be_bytes()
}

/// The time in a UUIDv7, microseconds since 1970; None for another kind of id.
pub fn time_of(id: &[u8; 16]) -> Option<i64> {
    let number = u128::from_be_bytes(*id);
    let ours = (number >> 76) & 15 == 7 && (number >> 62) & 3 == 2;
    let fraction = (((number >> 64) & 0xfff) * 1000) >> 12;
    ours.then_some((number >> 80) as i64 * 1000 + fraction as i64)
}

/// Distinct, increasing microseconds while the clock goes on; a step back of more than a second is followed,
/// not waited for.
#[derive(Debug, Default)]
pub struct Times {
    last: i64,
}

impl Times {
    /// The present by a clock that says `now_us`: one later than the last answer at least.
    pub const fn next(&mut self, now_us: i64) -> i64 {
        let behind = self.last - now_us;
        self.last = if 0 <= behind && behind < NEAR {
            self.last + 1
        } else {
            now_us
        };
        self.last
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn times_increase_and_a_step_back_is_followed() {
        let mut times = Times::default();
        let clock = [
            1_000_000_000_000,
            1_000_000_000_000,
            999_999_995_000,
            996_400_000_000,
        ];
        let told: Vec<i64> = clock.iter().map(|&now| times.next(now)).collect();
        assert_eq!(
            told,
            [
                1_000_000_000_000,
                1_000_000_000_001,
                1_000_000_000_002,
                996_400_000_000
            ]
        );
    }

    proptest! {
        #[test]
        fn an_id_gives_back_its_time(time in 0_i64..253_402_300_800_000_000, chance: u64) {
            let id = uuid7(time, chance);
            prop_assert_eq!(time_of(&id), Some(time));
            prop_assert!(id < uuid7(time + 1, 0));
        }
    }
}
