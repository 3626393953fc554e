//! What the audit trail's proofs are made of: the canonical bytes of an event, its leaf hash, the Merkle
//! root and the chained record of a segment (the events of one tenant that one commit stored).
pub mod batch;
pub mod canonical;
pub mod chains;
pub mod check;
pub mod copy;
pub mod event;
pub mod ids;
pub mod leaf;
pub mod log;
pub mod merkle;
pub mod proofs;
pub mod row;
pub mod segment;

/// A SHA-256 digest.
pub type Hash = [u8; 32];
