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
pub const COUNT: usize = 14;

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
    ("registry_register", registry!("register")),
    ("registry_deregister", registry!("deregister")),
    ("registry_fetch", registry!("fetch")),
    ("registry_list", registry!("list")),
    ("registry_status", registry!("status")),
    ("registry_monitors", registry!("monitors")),
    ("registry_sweep", registry!("sweep")),
];

/// Keys of the registry's scripts, in the order in which `registry_common.lua` numbers them.
pub const REGISTRY_SUFFIXES: [&str; 7] = ["s", "m", "ri", "rv", "rn", "re", "rm"];

/// Keys of one partition, in the order in which common.lua numbers them. All carry the partition's hash tag.
pub const SUFFIXES: [&str; 6] = ["s", "h", "q", "w", "m", "x"];

/// `{namespace:partition}`, which every key and channel of a partition begins with.
pub fn tag(namespace: &str, partition: u32) -> String {
    format!("{{{namespace}:{partition}}}")
}
