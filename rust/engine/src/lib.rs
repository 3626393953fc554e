//! The engine: one thread per process that owns the connections and everything that is leased.
