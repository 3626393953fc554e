//! A world in which the lock protocol can be watched: the engine's own state, encoding, decoding and scripts, with a
//! network, a server's memory and clocks between them that a schedule directs.
//!
//! Nothing of the protocol is written down here a second time: commands leave [`super::State`] as bytes, the scripts
//! run in Lua on data in memory, and answers come back as bytes. A rule is switched off by a change of a script's text.

mod broken;
mod conversations;
mod driver;
mod network;
mod process;
mod redis;
mod schedules;
mod server;
mod steps;
mod world;
