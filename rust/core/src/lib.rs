//! Rules of the platform that need neither a socket, a thread nor a clock.
//!
//! Time comes in as a number, chance comes in as a seed, and what has to be sent goes out as a
//! value, so that every rule of the protocols can be tested without a server.
#![forbid(unsafe_code)]

pub mod anomaly;
pub mod audit;
pub mod balance;
pub mod error;
pub mod export;
pub mod lease;
pub mod locks;
pub mod partition;
pub mod registry;
pub mod session;
