//! Where the primary is, as the sentinels say it.
//!
//! A task per sentinel keeps a connection: it hears of a switch at once, and asks again every two seconds in case a
//! message was lost. Whom to believe where they differ is [`choose`]'s: the newest configuration, as among the
//! sentinels themselves.

use crate::frame::Frame;
use crate::greeting::{Connection, End, hello, unfit};
use crate::transport::Target;
use crate::wire::{self, Value};
use bytes::BytesMut;
use std::fmt;
use std::future::pending;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

const ASK_EVERY: Duration = Duration::from_secs(2);
const SWITCH: &str = "+switch-master";

/// Address of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Name or address.
    pub host: String,
    /// Port.
    pub port: u16,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// A primary and the number of the configuration that made it one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Primary {
    /// Where it is.
    pub place: Place,
    /// The higher, the newer.
    pub epoch: u64,
}

/// What one sentinel said last.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Said {
    Nothing,
    Primary(Primary),
    Unknown,
    Failed(String),
    Denied(String),
}

impl Said {
    fn primary(&self) -> Option<&Primary> {
        if let Self::Primary(primary) = self {
            Some(primary)
        } else {
            None
        }
    }
}

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => f.write_str("has not answered yet"),
            Self::Primary(it) => write!(f, "names {} (epoch {})", it.place, it.epoch),
            Self::Unknown => f.write_str("knows no such service"),
            Self::Failed(why) | Self::Denied(why) => f.write_str(why),
        }
    }
}

/// What was said, and to which round of questions it is an answer.
#[derive(Debug, Clone)]
struct Heard {
    round: u64,
    said: Said,
}

/// The sentinels of one service.
pub struct Sentinels {
    service: String,
    names: Vec<String>,
    rounds: watch::Sender<u64>,
    heard: watch::Receiver<Vec<Heard>>,
    /// The newest configuration that was followed.
    floor: u64,
    tasks: JoinSet<()>,
}

impl Sentinels {
    /// Starts to follow them; nothing for a target that names its server itself. Needs a runtime.
    pub fn follow(target: &Target) -> Option<Self> {
        if target.sentinels.is_empty() {
            return None;
        }
        let (rounds, asked) = watch::channel(0);
        let nothing = Heard {
            round: 0,
            said: Said::Nothing,
        };
        let (said, heard) = watch::channel(vec![nothing; target.sentinels.len()]);
        let mut tasks = JoinSet::new();
        for (number, sentinel) in target.sentinels.iter().enumerate() {
            let follower = Follower {
                number,
                sentinel: sentinel.clone(),
                service: target.service.clone(),
                asked: asked.clone(),
                said: said.clone(),
            };
            tasks.spawn(follower.run());
        }
        Some(Self {
            service: target.service.clone(),
            names: target.sentinels.iter().map(Target::to_string).collect(),
            rounds,
            heard,
            floor: 0,
            tasks,
        })
    }

    /// Asks all of them and believes the first answer that is not older than what was believed before.
    pub async fn primary(&mut self, limit: Duration) -> Result<Primary, End> {
        let round = *self.rounds.borrow() + 1;
        self.rounds.send_replace(round);
        match timeout(limit, self.first(round)).await {
            Ok(done) => done,
            Err(_) => Err(End::Lost(self.nobody())),
        }
    }

    async fn first(&mut self, round: u64) -> Result<Primary, End> {
        loop {
            let fresh: Vec<Said> = (self.heard.borrow_and_update().iter())
                .map(|heard| {
                    if heard.round < round {
                        Said::Nothing
                    } else {
                        heard.said.clone()
                    }
                })
                .collect();
            if let Some(primary) = choose(&fresh, self.floor, None) {
                return Ok(primary);
            }
            if !fresh.contains(&Said::Nothing) {
                // One that merely can't be reached may help later.
                let denied = fresh.iter().all(|said| matches!(said, Said::Denied(_)));
                return Err(if denied {
                    End::Denied(self.nobody())
                } else {
                    End::Lost(self.nobody())
                });
            }
            self.next().await;
        }
    }

    /// Something new was heard. Cancel safe.
    async fn next(&mut self) {
        tokio::select! {
            changed = self.heard.changed() => if changed.is_err() { pending().await },
            Some(ended) = self.tasks.join_next() => if let Err(error) = ended && error.is_panic() {
                // A defect of ours is the engine's to report, not to go on without this sentinel.
                std::panic::resume_unwind(error.into_panic())
            },
        }
    }

    /// A server that says itself that it is the primary was found there.
    pub fn found(&mut self, primary: &Primary) {
        self.floor = self.floor.max(primary.epoch);
    }

    /// Ends when they name another primary; says who does. Cancel safe.
    pub async fn switched(&mut self, from: &Primary) -> String {
        loop {
            self.next().await;
            let said: Vec<Said> = (self.heard.borrow().iter())
                .map(|heard| heard.said.clone())
                .collect();
            if let Some(other) = choose(&said, from.epoch, Some(&from.place))
                && other.place != from.place
            {
                return format!("the sentinels name {} as primary now", other.place);
            }
        }
    }

    fn nobody(&self) -> String {
        let said: Vec<String> = (self.names.iter())
            .zip(self.heard.borrow().iter())
            .map(|(name, heard)| format!("{name}: {}", heard.said))
            .collect();
        format!("no sentinel names a primary to go to: {}", said.join("; "))
    }
}

impl fmt::Debug for Sentinels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sentinels({} of {:?})", self.service, self.names)
    }
}

/// Whom to believe. A configuration older than `floor` counts only where most of all sentinels agree on it, as after
/// the service was taken out of them and put in again, which starts its count anew; one sentinel that was cut off
/// from the others must not lead back to a primary that they have replaced.
fn choose(said: &[Said], floor: u64, current: Option<&Place>) -> Option<Primary> {
    let named = || said.iter().filter_map(Said::primary);
    let agreed = |place: &Place| named().filter(|it| it.place == *place).count();
    named()
        .filter(|it| it.epoch >= floor || 2 * agreed(&it.place) > said.len())
        .max_by_key(|it| (it.epoch >= floor, it.epoch, Some(&it.place) == current))
        .cloned()
}

/// One sentinel, followed.
struct Follower {
    number: usize,
    sentinel: Target,
    service: String,
    asked: watch::Receiver<u64>,
    said: watch::Sender<Vec<Heard>>,
}

impl Follower {
    /// Goes on until nobody asks any more.
    async fn run(mut self) {
        loop {
            let round = *self.asked.borrow_and_update();
            let limit = Duration::from_micros(self.sentinel.connect_timeout);
            let end = match timeout(limit, self.greet()).await {
                Err(_) => End::Lost(format!("no connection within {} ms", limit.as_millis())),
                Ok(Err(end)) => end,
                Ok(Ok(connection)) => self.listen(connection).await,
            };
            let said = match end {
                End::Lost(why) => Said::Failed(why),
                End::Denied(why) | End::Misconfigured(why) => Said::Denied(why),
                End::Closed => return,
            };
            // Whoever asks while this was failing is told so at once, and asks again when it pleases.
            let round = round.max(*self.asked.borrow_and_update());
            self.say(round, said);
            tokio::select! {
                asked = self.asked.changed() => if asked.is_err() { return },
                () = sleep(jittered(ASK_EVERY)) => {}
            }
        }
    }

    fn say(&self, round: u64, said: Said) {
        self.said.send_modify(|all| {
            if let Some(heard) = all.get_mut(self.number) {
                *heard = Heard { round, said };
            }
        });
    }

    async fn greet(&self) -> Result<Connection, End> {
        let mut connection = Connection::open(&self.sentinel).await?;
        let mut out = BytesMut::new();
        hello(&mut out, &self.sentinel);
        wire::command(&mut out, &[b"SUBSCRIBE", SWITCH.as_bytes()]);
        connection.send(&out).await?;
        if connection.greeting().await?.mode != "sentinel" {
            return Err(End::Denied(String::from("is no sentinel")));
        }
        if let Value::Error(text) = connection.answer().await? {
            return Err(unfit("SUBSCRIBE", &text));
        }
        Ok(connection)
    }

    /// Asks, and asks again: when a switch is announced, when somebody wants to know, and every now and then.
    async fn listen(&mut self, mut connection: Connection) -> End {
        let limit = Duration::from_micros(self.sentinel.request_timeout);
        loop {
            let round = *self.asked.borrow_and_update();
            let said = match timeout(limit, self.ask(&mut connection)).await {
                Err(_) => return End::Lost(format!("no answer within {} ms", limit.as_millis())),
                Ok(Err(end)) => return end,
                Ok(Ok(said)) => said,
            };
            self.say(round, said);
            let mut again = std::pin::pin!(sleep(jittered(ASK_EVERY)));
            loop {
                tokio::select! {
                    pushed = connection.frame() => match pushed {
                        Ok(frame) => if self.concerns(&frame) { break },
                        Err(end) => return end,
                    },
                    asked = self.asked.changed() => {
                        if asked.is_err() {
                            return End::Closed;
                        }
                        break;
                    }
                    () = &mut again => break,
                }
            }
        }
    }

    /// The number of the configuration goes first: if a switch falls between the two answers, the new address goes
    /// with the old number, which nobody believes too much, and not the other way round.
    async fn ask(&self, connection: &mut Connection) -> Result<Said, End> {
        let service = self.service.as_bytes();
        let mut out = BytesMut::new();
        wire::command(&mut out, &[b"SENTINEL", b"MASTER", service]);
        wire::command(
            &mut out,
            &[b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", service],
        );
        connection.send(&out).await?;
        let (state, address) = (answer(connection).await?, answer(connection).await?);
        for (what, value) in [
            ("SENTINEL MASTER", &state),
            ("SENTINEL GET-MASTER-ADDR-BY-NAME", &address),
        ] {
            if let Value::Error(text) = value
                && !text.contains("No such master")
            {
                return Err(unfit(what, text));
            }
        }
        let epoch = wire::field(&state, "config-epoch").and_then(Value::int);
        let [host, port] = address.items() else {
            return Ok(Said::Unknown);
        };
        let port = port.int().and_then(|port| u16::try_from(port).ok());
        match (epoch, host.text(), port) {
            (Some(epoch), Some(host), Some(port)) => Ok(Said::Primary(Primary {
                place: Place { host, port },
                epoch: epoch.unsigned_abs(),
            })),
            _ => Err(End::Lost(format!(
                "unexpected answer: {state:?} {address:?}"
            ))),
        }
    }

    /// Was this the announcement of a switch of our service?
    fn concerns(&self, frame: &Frame) -> bool {
        let [_, _, message] = frame.value.items() else {
            return false;
        };
        (message.text().unwrap_or_default().split(' ')).next() == Some(&self.service)
    }
}

/// The next answer, announcements left out: the answer that is under way is young enough.
async fn answer(connection: &mut Connection) -> Result<Value, End> {
    loop {
        let frame = connection.frame().await?;
        if !frame.pushed {
            return Ok(frame.value);
        }
    }
}

pub(crate) fn jittered(time: Duration) -> Duration {
    time.mul_f64(0.75 + fastrand::f64() / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(host: &str, epoch: u64) -> Said {
        let place = Place {
            host: host.into(),
            port: 6379,
        };
        Said::Primary(Primary { place, epoch })
    }

    fn chosen(said: &[Said], floor: u64, current: &str) -> Option<String> {
        let current = Place {
            host: current.into(),
            port: 6379,
        };
        choose(said, floor, Some(&current)).map(|it| it.place.host)
    }

    #[test]
    fn the_newest_configuration_wins() {
        let said = [names("old", 3), names("new", 4), names("old", 3)];
        assert_eq!(chosen(&said, 0, "old").as_deref(), Some("new"));
        assert_eq!(chosen(&said, 4, "old").as_deref(), Some("new"));
    }

    #[test]
    fn an_older_one_is_believed_only_if_most_agree() {
        let cut_off = [names("old", 3), Said::Failed("away".into()), Said::Nothing];
        assert_eq!(chosen(&cut_off, 4, "new"), None);
        let counted_anew = [names("other", 0), names("other", 0), names("new", 4)];
        assert_eq!(chosen(&counted_anew, 4, "new").as_deref(), Some("new"));
        let all_anew = [names("other", 0), names("other", 0), Said::Nothing];
        assert_eq!(chosen(&all_anew, 4, "new").as_deref(), Some("other"));
        assert_eq!(
            chosen(&[names("other", 0)], 4, "new").as_deref(),
            Some("other")
        );
    }

    #[test]
    fn of_two_equals_the_one_in_use_stays() {
        let said = [names("a", 2), names("b", 2)];
        assert_eq!(chosen(&said, 2, "a").as_deref(), Some("a"));
        assert_eq!(chosen(&said, 2, "b").as_deref(), Some("b"));
        assert_eq!(chosen(&[Said::Nothing, Said::Unknown], 0, "a"), None);
    }

    #[test]
    fn addresses_are_shown_as_urls_write_them() {
        let place = |host: &str| Place {
            host: host.into(),
            port: 1,
        };
        assert_eq!(place("::1").to_string(), "[::1]:1");
        assert_eq!(place("h").to_string(), "h:1");
    }
}
