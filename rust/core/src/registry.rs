//! Service instances as this side sees them: records, filters, immutable snapshots, and how one snapshot
//! replaces another.
//!
//! A [`Watch`] follows one service. Its owner offers it every answer of the server; the watch decides what is
//! believed ([`Watch::offer`]) and keeps the load counters of instances over the change. Readers take the
//! current [`Snapshot`] and ask it for the [`Subset`] that a filter leaves; both are worked out once.
mod filter;
mod record;
mod snapshot;
mod watch;

pub use filter::Filter;
pub use record::{Entry, Instance, Record, Status};
pub use snapshot::{PANIC_PERCENT, Snapshot, Subset};
pub use watch::{Offer, Reading, Verdict, Watch};
