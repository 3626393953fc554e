//! Who says where the server of a partition is: the target itself, sentinels, or the nodes of a cluster.

use crate::cluster::Slot;
use crate::greeting::End;
use crate::sentinels::{Primary, Sentinels};
use std::future::pending;
use std::time::Duration;

/// Whom to ask.
#[derive(Debug)]
pub enum Guide {
    /// Nobody: the target names its server itself.
    Target,
    /// The sentinels of a service.
    Sentinels(Sentinels),
    /// The nodes of a cluster, about one slot.
    Slot(Slot),
}

impl Guide {
    /// The server to go to, found within the limit; nothing where the target names it.
    pub async fn primary(&mut self, limit: Duration) -> Result<Option<Primary>, End> {
        match self {
            Self::Target => Ok(None),
            Self::Sentinels(sentinels) => sentinels.primary(limit).await.map(Some),
            Self::Slot(slot) => slot.primary(limit).await.map(Some),
        }
    }

    /// Ends when another server is to be gone to; says why. Cancel safe.
    pub async fn switched(&mut self, from: Option<&Primary>) -> String {
        match (self, from) {
            (Self::Sentinels(sentinels), Some(from)) => sentinels.switched(from).await,
            (Self::Slot(slot), Some(from)) => slot.switched(from).await,
            _ => pending().await,
        }
    }

    /// Ends when there is no need to wait any longer before the next attempt. Cancel safe.
    pub async fn better(&mut self) {
        match self {
            Self::Slot(slot) => slot.better().await,
            _ => pending().await,
        }
    }

    /// A server that says itself that it is the primary was found there.
    pub fn found(&mut self, primary: Option<&Primary>) {
        match (self, primary) {
            (Self::Sentinels(sentinels), Some(primary)) => sentinels.found(primary),
            (Self::Slot(slot), Some(_)) if slot.first() => slot.agree(),
            _ => {}
        }
    }

    /// The connection is over, or could not be made.
    pub fn ended(&mut self, end: &End, from: Option<&Primary>) {
        if let Self::Slot(slot) = self {
            slot.ended(end, from);
        }
    }
}
