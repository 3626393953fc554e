//! Scores of events from the rates of the entities that they name.
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use super::window::Window;
use crate::error::CoreError;

const SHORT_SLOTS: usize = 6;
const SHORT_SLOT_US: i64 = 10_000_000;
const LONG_SLOTS: usize = 12;
const LONG_SLOT_US: i64 = 300_000_000;
/// Decades of surprise at which the score is one half.
const HALF: f64 = 6.0;
/// A rate of all events is judged once so many of its windows are known.
const WARM_UP: u32 = 30;
/// Failures that go with a busy entity's work, as a share of its events.
const USUAL_FAILURES: f64 = 0.1;
/// Scores below are not worth a sentence.
const WORTH_A_REASON: f64 = 0.25;
/// Entities looked at to find one that makes room.
const SAMPLED: usize = 8;
const SHOWN_CHARS: usize = 64;

/// What an entity is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dimension {
    /// The acting user.
    User,
    /// The network address that the event came from.
    Address,
    /// The tenant.
    Tenant,
    /// The action.
    Action,
}

impl Dimension {
    /// Failures per short and per long window that are unremarkable for an entity without history,
    /// and events of any outcome per short window.
    const fn floors(self) -> (f64, f64, f64) {
        match self {
            Self::User | Self::Address => (1.0, 3.0, 60.0),
            Self::Tenant | Self::Action => (20.0, 200.0, 600.0),
        }
    }

    const fn phrase(self) -> &'static str {
        match self {
            Self::User => "for user",
            Self::Address => "from",
            Self::Tenant => "in tenant",
            Self::Action => "of action",
        }
    }
}

/// What the detector needs to know of an event.
#[derive(Debug, Clone, Copy, Default)]
pub struct Facts<'a> {
    /// When it happened, microseconds since any fixed origin.
    pub time_us: i64,
    /// Plural noun for the reasons ("logins"); "events" when empty.
    pub noun: &'a str,
    /// Did it fail or was it refused?
    pub failed: bool,
    /// The acting user.
    pub user: Option<&'a str>,
    /// The network address.
    pub address: Option<&'a str>,
    /// The tenant.
    pub tenant: Option<&'a str>,
    /// The action.
    pub action: Option<&'a str>,
}

/// Why an event is surprising.
#[derive(Debug, Clone, PartialEq)]
pub struct Reason {
    /// This reason's own score.
    pub score: f64,
    /// A sentence for a person.
    pub text: String,
}

/// Score of one event.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Verdict {
    /// In [0, 1]; 0.5 stands for a chance of one in a million under the entity's own baseline.
    pub score: f64,
    /// The most surprising first.
    pub reasons: Vec<Reason>,
}

#[derive(Debug, Clone)]
struct Entity {
    key: u64,
    all_short: Window<SHORT_SLOTS>,
    all_long: Window<LONG_SLOTS>,
    failed_short: Window<SHORT_SLOTS>,
    failed_long: Window<LONG_SLOTS>,
}

impl Entity {
    const fn new(key: u64) -> Self {
        Self {
            key,
            all_short: Window::new(true),
            all_long: Window::new(true),
            failed_short: Window::new(false),
            failed_long: Window::new(false),
        }
    }

    fn add(&mut self, time_us: i64, failed: bool, floors: (f64, f64, f64)) {
        let (short, long) = (
            time_us.div_euclid(SHORT_SLOT_US),
            time_us.div_euclid(LONG_SLOT_US),
        );
        self.all_short.add(short, 1, floors.2);
        self.all_long.add(long, 1, floors.2);
        self.failed_short.add(short, u32::from(failed), floors.0);
        self.failed_long.add(long, u32::from(failed), floors.1);
    }
}

/// Scores events one after another from the rates of their users, addresses, tenants and actions.
#[derive(Debug)]
pub struct RateDetector {
    capacity: usize,
    seed: u64,
    chance: fastrand::Rng,
    index: HashMap<u64, usize>,
    entities: Vec<Entity>,
}

impl RateDetector {
    /// A detector that remembers at most `capacity` entities (about 500 bytes each); `seed` drives
    /// both the hashing of names and the choice of what to forget.
    pub fn new(capacity: usize, seed: u64) -> Result<Self, CoreError> {
        if !(4..=16_777_216).contains(&capacity) {
            return Err(CoreError::Invalid {
                field: "capacity",
                value: capacity.to_string(),
                allowed: "give a number of entities from 4 to 16777216",
            });
        }
        Ok(Self {
            capacity,
            seed,
            chance: fastrand::Rng::with_seed(seed),
            index: HashMap::new(),
            entities: Vec::new(),
        })
    }

    /// Entities remembered now.
    pub fn entities(&self) -> usize {
        self.entities.len()
    }

    /// Takes the event in and says how surprising it is.
    pub fn score(&mut self, facts: &Facts<'_>) -> Verdict {
        let mut verdict = Verdict::default();
        let named = [
            (Dimension::Address, facts.address),
            (Dimension::User, facts.user),
            (Dimension::Tenant, facts.tenant),
            (Dimension::Action, facts.action),
        ];
        for (dimension, name) in named {
            let Some(name) = name.filter(|name| !name.is_empty()) else {
                continue;
            };
            let place = self.place_of(dimension, facts.noun, name);
            let entity = &mut self.entities[place];
            entity.add(facts.time_us, facts.failed, dimension.floors());
            judge(entity, dimension, name, facts, &mut verdict.reasons);
        }
        verdict.reasons.sort_by(|a, b| b.score.total_cmp(&a.score));
        verdict.score = verdict.reasons.first().map_or(0.0, |reason| reason.score);
        verdict
            .reasons
            .retain(|reason| reason.score >= WORTH_A_REASON);
        verdict
    }

    /// Entities are kept apart by noun too, so that a sentence counts only what it names.
    fn place_of(&mut self, dimension: Dimension, noun: &str, name: &str) -> usize {
        let mut hasher = DefaultHasher::new();
        (self.seed, dimension, noun, name).hash(&mut hasher);
        let key = hasher.finish();
        if let Some(&place) = self.index.get(&key) {
            return place;
        }
        if self.entities.len() >= self.capacity {
            self.forget_one();
        }
        self.entities.push(Entity::new(key));
        self.index.insert(key, self.entities.len() - 1);
        self.entities.len() - 1
    }

    /// Of a few entities drawn by chance, drops the one not seen for longest.
    fn forget_one(&mut self) {
        let drawn = (0..SAMPLED).map(|_| self.chance.usize(..self.entities.len()));
        let Some(place) = drawn.min_by_key(|&place| self.entities[place].all_short.head()) else {
            return;
        };
        let gone = self.entities.swap_remove(place);
        self.index.remove(&gone.key);
        if let Some(moved) = self.entities.get(place) {
            self.index.insert(moved.key, place);
        }
    }
}

/// One line of evidence: a count against what was to be expected.
struct Evidence {
    score: f64,
    count: u32,
    seconds: u32,
    known: u32,
    usual: f64,
}

impl Evidence {
    fn of<const N: usize>(window: &Window<N>, expected: f64, seconds: u32) -> Self {
        let expected = expected.max(window.mean());
        Self {
            score: surprise(f64::from(window.count()), expected, window.overdispersion()),
            count: window.count(),
            seconds,
            known: window.finished(),
            usual: window.mean(),
        }
    }
}

fn judge(
    entity: &Entity,
    dimension: Dimension,
    name: &str,
    facts: &Facts<'_>,
    reasons: &mut Vec<Reason>,
) {
    let (failed_floor, failed_floor_long, all_floor) = dimension.floors();
    let noun = if facts.noun.is_empty() {
        "events"
    } else {
        facts.noun
    };
    let mut say = |evidence: &Evidence, score: f64, what: &str| {
        if score > 0.0 {
            let Evidence {
                count,
                seconds,
                known,
                usual,
                ..
            } = evidence;
            let history = if *known == 0 {
                "no history yet".to_owned()
            } else {
                format!("usual {usual:.1}")
            };
            let (phrase, shown) = (dimension.phrase(), shortened(name));
            let text = format!("{count} {what}{noun} {phrase} {shown} in {seconds} s; {history}");
            reasons.push(Reason { score, text });
        }
    };
    if facts.failed {
        let spared = |all: u32, floor: f64| floor.max(USUAL_FAILURES * f64::from(all));
        let expected = spared(entity.all_short.count(), failed_floor);
        let short = Evidence::of(&entity.failed_short, expected, 60);
        let expected = spared(entity.all_long.count(), failed_floor_long);
        let long = Evidence::of(&entity.failed_long, expected, 3600);
        // The last minute is the better sentence wherever it is enough by itself.
        let score = short.score.max(long.score);
        let told = if short.score >= 0.5 || short.score >= long.score {
            &short
        } else {
            &long
        };
        say(told, score, "failed ");
    }
    if entity.all_short.finished() >= WARM_UP {
        let evidence = Evidence::of(
            &entity.all_short,
            all_floor.max(entity.all_short.peak()),
            60,
        );
        say(&evidence, evidence.score, "");
    }
}

/// Score of `count` where `expected` is usual: decades of the Chernoff bound, squashed into [0, 1).
fn surprise(count: f64, expected: f64, spread: f64) -> f64 {
    if count <= expected {
        return 0.0;
    }
    let nats = (count * (count / expected).ln() - count + expected) / spread;
    let decades = nats / std::f64::consts::LN_10;
    let score = decades / (decades + HALF);
    (score * 1000.0).round() / 1000.0
}

fn shortened(name: &str) -> String {
    if name.chars().count() <= SHOWN_CHARS {
        return name.to_owned();
    }
    name.chars().take(SHOWN_CHARS).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use super::{Facts, RateDetector, Verdict};
    use proptest::prelude::*;

    const SECOND: i64 = 1_000_000;

    fn login(time_us: i64, user: &str, failed: bool) -> Facts<'_> {
        let address = Some("10.0.0.7");
        Facts {
            time_us,
            noun: "logins",
            failed,
            user: Some(user),
            address,
            ..Facts::default()
        }
    }

    fn detector() -> RateDetector {
        RateDetector::new(1024, 7).expect("the capacity is allowed")
    }

    #[test]
    fn a_burst_of_failures_is_flagged_with_a_reason_that_names_count_address_and_usual() {
        let mut detector = detector();
        let mut last = Verdict::default();
        for number in 0..37 {
            last = detector.score(&login(960_000 * SECOND + number * SECOND, "root", true));
        }
        assert!(last.score > 0.7, "{last:?}");
        assert_eq!(
            last.reasons[0].text,
            "37 failed logins from 10.0.0.7 in 60 s; no history yet"
        );
    }

    #[test]
    fn mistyping_three_times_is_not_an_attack() {
        let mut detector = detector();
        for number in 0..3 {
            let verdict = detector.score(&login(number * 5 * SECOND, "ann", true));
            assert!(verdict.score < 0.25, "{verdict:?}");
        }
    }

    #[test]
    fn a_long_attack_does_not_become_usual() {
        let mut detector = detector();
        for number in 0..24 * 3600 / 3 {
            let verdict = detector.score(&login(number * 3 * SECOND, "root", true));
            assert!(number < 60 || verdict.score > 0.5, "{number}: {verdict:?}");
        }
    }

    #[test]
    fn slow_guessing_is_seen_by_the_long_window() {
        let mut detector = detector();
        let mut last = Verdict::default();
        for number in 0..30 {
            last = detector.score(&login(number * 110 * SECOND, "root", true));
        }
        assert!(
            last.score > 0.5 && last.reasons[0].text.contains("in 3600 s"),
            "{last:?}"
        );
    }

    #[test]
    fn a_tenfold_burst_of_reads_is_flagged_once_the_usual_rate_is_known() {
        let mut detector = detector();
        let read = |time_us| Facts {
            time_us,
            user: Some("bob"),
            ..Facts::default()
        };
        for number in 0..3600 {
            assert!(detector.score(&read(number * SECOND)).score < 0.5);
        }
        let mut last = Verdict::default();
        for number in 0..600 {
            last = detector.score(&read(3600 * SECOND + number * SECOND / 10));
        }
        assert!(last.score > 0.5, "{last:?}");
        assert!(
            last.reasons[0]
                .text
                .contains("events for user bob in 60 s; usual 60"),
            "{last:?}"
        );
    }

    proptest! {
        #[test]
        fn scores_stay_in_range_state_stays_bounded_and_seeds_repeat(
            events in prop::collection::vec((any::<i64>(), 0u8..40, any::<bool>()), 0..400),
            seed in any::<u64>(),
        ) {
            let run = || {
                let mut detector = RateDetector::new(16, seed).expect("the capacity is allowed");
                let mut scores = Vec::new();
                for (time_us, who, failed) in &events {
                    let name = format!("u{who}");
                    let verdict = detector.score(&login(*time_us, &name, *failed));
                    prop_assert!((0.0..=1.0).contains(&verdict.score));
                    prop_assert!(detector.entities() <= 16);
                    prop_assert!(detector.index.len() == detector.entities.len());
                    scores.push(verdict);
                }
                for (key, place) in &detector.index {
                    prop_assert_eq!(detector.entities[*place].key, *key);
                }
                Ok(scores)
            };
            prop_assert_eq!(run()?, run()?);
        }

        #[test]
        fn one_more_failure_never_lowers_the_score_within_a_slot(count in 1u32..200) {
            let mut detector = detector();
            let mut before = 0.0;
            for _ in 0..count {
                let now = detector.score(&login(0, "root", true)).score;
                prop_assert!(now >= before);
                before = now;
            }
        }
    }
}
