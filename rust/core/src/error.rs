//! The errors that the core can raise; the binding maps each to one Python class.

/// What went wrong, with the field and the value that would have been right.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CoreError {
    /// An argument is out of its range.
    #[error("{field}: {value} is not allowed; {allowed}")]
    Invalid {
        /// Name of the argument.
        field: &'static str,
        /// What was given, shortened.
        value: String,
        /// What would have been right.
        allowed: &'static str,
    },
    /// Stored data can't be read.
    #[error("malformed {what}: {why}")]
    Malformed {
        /// What it should have been.
        what: &'static str,
        /// Why it is not.
        why: String,
    },
}
