//! Rules that can be switched off, to see that their absence is noticed.

use super::server::Mutation;

/// A rule that is switched off, to see that its absence is noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Broken {
    Nothing,
    /// A grant's stamp is younger than the last heartbeat before it.
    GrantStamp,
    /// A lease counts from the arrival of a heartbeat's answer.
    HeartbeatStamp,
    /// The server takes a grant back sooner than its holder may believe without a claim.
    Claim,
    /// The logical clock advances over gaps.
    Gaps,
    /// The server judges on its wall clock.
    WallClock,
    /// The server accepts commands of older connections.
    Generations,
    /// A holder believes until it is told, whatever its own deadline says.
    LocalDeadline,
    /// Releases never arrive.
    Releases,
    /// Cancellations never arrive.
    Cancels,
    /// The fence counter starts anew with the data.
    Fences,
    /// Whoever comes finds a place before those who wait.
    Order,
    /// A server that lost its data grants at once.
    Grace,
    /// A connection is replaced by another without the client's knowledge, and its leases go on.
    Unnoticed,
}

impl Broken {
    /// How the scripts have to be changed to switch the rule off.
    pub fn mutations(self) -> &'static [Mutation] {
        match self {
            Self::Nothing | Self::HeartbeatStamp | Self::LocalDeadline | Self::Unnoticed => &[],
            Self::Order => &[
                (
                    Some("acquire"),
                    "string.format('5000%.0f', n)",
                    "string.format('5000%.0f', 9000000000000000 - n)",
                ),
                (
                    None,
                    "return priority .. text(next_number(meta, 't'))",
                    "return priority .. text(9000000000000000 - next_number(meta, 't'))",
                ),
            ],
            Self::GrantStamp => &[
                (
                    None,
                    "return {1, f, stamp}",
                    "return {1, f, stamp + 3000000}",
                ),
                (None, "'\\0' .. stamp)", "'\\0' .. text(stamp + 3000000))"),
            ],
            Self::Claim => &[(None, "local CLAIM = 3000", "local CLAIM = 300")],
            Self::Gaps => &[(None, "if gap > 0 and gap <= GAP then", "if gap > 0 then")],
            Self::WallClock => &[(
                None,
                "text(w)) end\n  return l\nend",
                "text(w)) end\n  return w\nend",
            )],
            Self::Generations => &[
                (None, "if gen ~= ARGV[3] then return {-3} end", ""),
                (None, "if gen ~= ARGV[5] then return {-3} end", ""),
                (None, "if tonumber(had_gen) > gen then return {-3} end", ""),
            ],
            Self::Releases => &[(Some("release"), "", "if KEYS then return 0 end ")],
            Self::Cancels => &[(Some("cancel"), "", "if KEYS then return 0 end ")],
            Self::Grace => &[(None, "grace_ends = math.max(grace_ends, ends)", "ends = 0")],
            Self::Fences => &[
                (None, "if f >= 1000000000000000 then", "if f >= 0 then"),
                (None, "if n < SEEDED then", "if n < 0 then"),
            ],
        }
    }
}
