//! The server's side of the protocols: Lua, assembled from files, called by hash.

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
    /// Page through the locks.
    List,
}

/// How many scripts there are.
pub const COUNT: usize = 7;

/// All scripts with their names and texts, in the order of [`Script`].
pub const SCRIPTS: [(&str, &str); COUNT] = [
    (
        "acquire",
        concat!(
            include_str!("scripts/acquire_fast.lua"),
            include_str!("scripts/common.lua"),
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
    (
        "cancel",
        concat!(
            include_str!("scripts/common.lua"),
            include_str!("scripts/cancel.lua")
        ),
    ),
    (
        "extend",
        concat!(
            include_str!("scripts/common.lua"),
            include_str!("scripts/extend.lua")
        ),
    ),
    (
        "heartbeat",
        concat!(
            include_str!("scripts/common.lua"),
            include_str!("scripts/heartbeat.lua")
        ),
    ),
    ("close", include_str!("scripts/close.lua")),
    (
        "list",
        concat!(
            include_str!("scripts/common.lua"),
            include_str!("scripts/list.lua")
        ),
    ),
];

/// Keys of one partition, in the order in which common.lua numbers them. All carry the partition's hash tag.
pub const SUFFIXES: [&str; 6] = ["s", "h", "q", "w", "m", "x"];

/// `{namespace:partition}`, which every key and channel of a partition begins with.
pub fn tag(namespace: &str, partition: u32) -> String {
    format!("{{{namespace}:{partition}}}")
}
