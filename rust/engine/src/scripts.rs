//! The server's side of the protocols: Lua, assembled from files, called by hash.

use bytes::Bytes;
use std::borrow::Cow;

/// A script, by its place in [`SCRIPTS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(usize)]
pub enum Script {
    /// Ask for a lock.
    Acquire,
    /// Give it back.
    Release,
    /// Leave the queue.
    Cancel,
    /// Change a lease's length.
    Extend,
    /// Keep the session.
    Heartbeat,
    /// End the session.
    Close,
    /// Give a lease up to whoever takes it over.
    Offer,
    /// Take leases back on a server that lost them.
    Assert,
    /// Page through what the server thinks that a session holds.
    Mine,
    /// Take a lock away from who holds it.
    Force,
    /// Page through the locks.
    List,
    /// Page through those who wait.
    Waits,
    /// Register an instance.
    Register,
    /// Take it out.
    Deregister,
    /// Read the instances of a service.
    Fetch,
    /// Page through all instances.
    Instances,
    /// Say what a health check found.
    Status,
    /// Meet the others who check health.
    Monitors,
    /// Remove registrations whose session has died.
    Sweep,
    /// Read who waits for whom.
    Chase,
    /// End a wait that can't end otherwise.
    ChaseEnd,
    /// Say who waits for long.
    ChaseNote,
    /// Ask where somebody waits.
    ChaseFind,
}

/// A script of the locks: what all share, then its own text.
macro_rules! lock {
    ($name:literal) => {
        concat!(
            include_str!("scripts/common.lua"),
            include_str!(concat!("scripts/", $name, ".lua"))
        )
    };
}

/// A script of the registry: what all share, then its own text.
macro_rules! registry {
    ($name:literal) => {
        concat!(
            include_str!("scripts/common.lua"),
            include_str!("scripts/registry_common.lua"),
            include_str!(concat!("scripts/registry_", $name, ".lua"))
        )
    };
}

/// How many scripts there are.
pub const COUNT: usize = 23;

/// How many of them, the first ones, are used where there is one partition.
const LONE: usize = 19;

/// All scripts with their names and texts, in the order of [`Script`].
pub const SCRIPTS: [(&str, &str); COUNT] = [
    (
        "acquire",
        concat!(
            include_str!("scripts/acquire_fast.lua"),
            include_str!("scripts/common.lua"),
            include_str!("scripts/cycles.lua"),
            include_str!("scripts/acquire.lua")
        ),
    ),
    (
        "release",
        concat!(
            include_str!("scripts/release_fast.lua"),
            include_str!("scripts/common.lua"),
            include_str!("scripts/release.lua")
        ),
    ),
    ("cancel", lock!("cancel")),
    ("extend", lock!("extend")),
    ("heartbeat", lock!("heartbeat")),
    ("close", include_str!("scripts/close.lua")),
    ("offer", lock!("offer")),
    ("assert", lock!("assert")),
    ("mine", lock!("mine")),
    ("force", lock!("force")),
    ("list", lock!("list")),
    ("waits", lock!("waits")),
    ("registry_register", registry!("register")),
    ("registry_deregister", registry!("deregister")),
    ("registry_fetch", registry!("fetch")),
    ("registry_list", registry!("list")),
    ("registry_status", registry!("status")),
    ("registry_monitors", registry!("monitors")),
    ("registry_sweep", registry!("sweep")),
    ("chase", lock!("chase")),
    (
        "chase_end",
        concat!(
            include_str!("scripts/common.lua"),
            include_str!("scripts/cycles.lua"),
            include_str!("scripts/chase_end.lua")
        ),
    ),
    ("chase_note", include_str!("scripts/chase_note.lua")),
    ("chase_find", include_str!("scripts/chase_find.lua")),
];

/// Keys of the registry's scripts, in the order in which `registry_common.lua` numbers them.
pub const REGISTRY_SUFFIXES: [&str; 7] = ["s", "m", "ri", "rv", "rn", "re", "rm"];

/// Keys of one partition, in the order in which common.lua numbers them. All carry the partition's hash tag.
pub const SUFFIXES: [&str; 6] = ["s", "h", "q", "w", "m", "x"];

/// Keys of the notes on who waits for long, in partition 0.
pub const NOTES_SUFFIXES: [&str; 2] = ["nw", "nt"];

/// How many scripts a server needs, in their order.
pub fn needed(clustered: bool) -> usize {
    if clustered { COUNT } else { LONE }
}

/// `{namespace:partition}`, which every key and channel of a partition begins with.
pub fn tag(namespace: &str, partition: usize) -> String {
    format!("{{{namespace}:{partition}}}")
}

/// A script as it is sent to a server. In a cluster messages go to the subscribers at the slot's own server only.
pub fn text(script: usize, sharded: bool) -> Cow<'static, str> {
    let text = SCRIPTS[script].1;
    if sharded {
        Cow::Owned(text.replace("'PUBLISH'", "'SPUBLISH'"))
    } else {
        Cow::Borrowed(text)
    }
}

/// What a server said about a failed script, completed where it names only the place: Redis 7 tells the hash and the
/// line, and not which command was forbidden.
pub fn explained(said: &str, hashes: &[Bytes], sharded: bool) -> String {
    let found = || {
        let (before, place) = said.split_once("on @user_script:")?;
        let line: usize = place.trim_end_matches('.').parse().ok()?;
        let of = |hash: &Bytes| before.contains(&*String::from_utf8_lossy(hash));
        let script = hashes.iter().position(of)?;
        let (name, text) = (SCRIPTS.get(script)?.0, text(script, sharded));
        let called: Vec<&str> = (text.lines().nth(line.checked_sub(1)?)?)
            .split("redis.call('")
            .skip(1)
            .filter_map(|rest| rest.split('\'').next())
            .collect();
        Some(format!("{said} ({name}: {})", called.join(", ")))
    };
    found().unwrap_or_else(|| said.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_of_a_failed_line_is_named() {
        let hashes: Vec<Bytes> = (0..COUNT)
            .map(|n| Bytes::from(format!("{n:040}")))
            .collect();
        let (name, script) = SCRIPTS[Script::Release as usize];
        let line = 1 + script
            .lines()
            .take_while(|line| !line.contains("'HDEL'"))
            .count();
        let hash = Script::Release as usize;
        let said = format!("ERR can't run script: {hash:040}, on @user_script:{line}.");
        assert_eq!(
            explained(&said, &hashes, false),
            format!("{said} ({name}: HDEL)")
        );
    }

    #[test]
    fn in_a_cluster_every_message_stays_in_its_slot() {
        for script in 0..COUNT {
            let (plain, sharded) = (text(script, false), text(script, true));
            assert!(!sharded.contains("'PUBLISH'"));
            assert_eq!(sharded.contains("'SPUBLISH'"), plain.contains("PUBLISH"));
        }
    }

    #[test]
    fn other_errors_stay_as_they_are() {
        for said in [
            "ERR x",
            "on @user_script:",
            "f, on @user_script:0.",
            "f on @user_script:99999.",
        ] {
            assert_eq!(explained(said, &[Bytes::from_static(b"f")], false), said);
            assert_eq!(explained(said, &[], true), said);
        }
    }
}
