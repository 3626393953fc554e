//! A world in which the lock protocol can be watched: the server as a model, the clients as they are.

mod driver;
mod network;
pub mod server;
pub mod world;
