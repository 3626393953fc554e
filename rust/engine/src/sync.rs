//! What threads share and wait on. With the feature `shuttle`, which only tests have, its types stand here, and its
//! scheduler decides at every use of them who goes on.

#[cfg(feature = "shuttle")]
pub mod doubles;

#[cfg(not(feature = "shuttle"))]
pub use crate::bell::Bell;
#[cfg(feature = "shuttle")]
pub use doubles::{Bell, Notify};
#[cfg(feature = "shuttle")]
pub use shuttle::sync::{Condvar, Mutex, MutexGuard, atomic};
#[cfg(not(feature = "shuttle"))]
pub use std::sync::{Condvar, Mutex, MutexGuard, atomic};
#[cfg(not(feature = "shuttle"))]
pub use tokio::sync::Notify;
