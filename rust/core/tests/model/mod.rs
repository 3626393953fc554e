//! A world in which the lock protocol can be watched: the server as a model, the clients as they are.

pub mod server;
pub mod world;
