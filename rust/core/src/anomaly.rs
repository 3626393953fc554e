//! Streaming anomaly scores: how surprising is the rate of each entity that an event names?
//!
//! Every event names up to four entities (user, address, tenant, action). For each of them the
//! detector counts events and failed events over a short (60 s) and a long (1 h) window, compares
//! the count with the entity's own exponentially weighted baseline, and turns the surprise into a
//! score. Under a Poisson model with mean λ the chance of at least `c > λ` events is at most
//! `exp(-(c ln(c/λ) - c + λ))` (Chernoff; Mitzenmacher and Upfal, "Probability and Computing",
//! theorem 5.4). With `s` the negative decimal logarithm of that bound, divided by the measured
//! overdispersion, the score is `s / (s + 6)`: 0.5 stands for one chance in a million.
//!
//! State is bounded (a fixed number of entities, the stalest of a few sampled ones makes room),
//! event time comes in as a number, and chance comes in as a seed: the same events give the same
//! scores.
mod detector;
mod window;

pub use detector::{Dimension, Facts, RateDetector, Reason, Verdict};
