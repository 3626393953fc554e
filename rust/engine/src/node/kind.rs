//! What depends on the kind of server: a node of a cluster or one by itself, as it was said to be or otherwise.

use super::State;
use crate::Outcome;
use crate::transport::Target;
use crate::wire::Value;
use dotmac_core::locks::Failure;

/// Who hears what is published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Channels {
    /// Every subscriber at the server.
    Common,
    /// In a cluster, where channels belong to slots as keys do: those who subscribed to the slot's channels.
    Sharded,
}

impl Channels {
    /// Those of a target.
    pub(super) fn of(target: &Target) -> Self {
        if target.clustered() {
            Self::Sharded
        } else {
            Self::Common
        }
    }
}

impl State {
    /// The command that subscribes to a channel.
    pub fn subscribe(&self) -> &'static [u8] {
        match self.channels {
            Channels::Common => b"SUBSCRIBE",
            Channels::Sharded => b"SSUBSCRIBE",
        }
    }

    pub(super) fn sharded(&self) -> bool {
        self.channels == Channels::Sharded
    }

    /// Whether a push says that this server does not serve the partition's channels any more.
    pub fn left_by(&self, push: &Value) -> bool {
        let kind = push.items().first();
        self.sharded() && matches!(kind, Some(Value::Bytes(kind)) if kind[..] == *b"sunsubscribe")
    }

    /// Key of the hash that holds what is known of the partition as a whole.
    pub fn meta(&self) -> String {
        format!("{}:m", self.tag)
    }

    /// The credentials are refused.
    pub fn denied(&mut self, why: &str) {
        self.refused(why, false);
    }

    /// The server is not what it was said to be.
    pub fn misconfigured(&mut self, why: &str) {
        self.refused(why, true);
    }

    fn refused(&mut self, why: &str, misconfigured: bool) {
        self.disconnected(why);
        self.misconfigured = misconfigured;
        self.client.denied(why);
        for (_, pending) in std::mem::take(&mut self.calls) {
            let outcome = self.failed(Failure::Denied(why.to_owned()));
            pending.sink.put(outcome, &mut self.wake);
        }
        self.settle();
    }

    /// How a failed call ends. To the protocol a server of the wrong kind is one that refuses us.
    pub(super) fn failed(&self, failure: Failure) -> Outcome {
        match failure {
            Failure::Denied(why) if self.misconfigured => Outcome::Misconfigured(why),
            failure => Outcome::Failed(failure),
        }
    }
}
