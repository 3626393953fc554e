//! Promises: filters mean what they say; health is not believed below the panic threshold; an answer that says
//! that everything has gone, or that comes from a server that lost its data, does not empty a snapshot at
//! once; load counters and unchanged instances outlive the snapshot; bad stored data is counted, not fatal.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
use proptest::prelude::{prop, prop_assert, prop_assert_eq, proptest};

use super::super::*;

fn entry(id: &str, status: &str, extra: &str) -> Entry {
    Entry {
        raw: format!(
            "s1 1 60000 {status}\0{{\"id\":\"{id}\",\"name\":\"api\",\"version\":\"1\",\"host\":\"h\",\"port\":80,\
             \"ttl\":60,\"registered_at\":1.5{extra}}}"
        ),
    }
}

fn offer(epoch: &str, revision: u64, entries: Vec<Entry>) -> Offer {
    Offer {
        epoch: epoch.into(),
        revision: revision.to_string(),
        entries,
    }
}

fn ids(watch: &Watch) -> Vec<String> {
    watch
        .current()
        .1
        .instances
        .iter()
        .map(|i| i.record.id.clone())
        .collect()
}

fn filter(json: &str) -> Filter {
    serde_json::from_str(json).unwrap()
}

#[test]
fn filters_mean_what_they_say() {
    let watch = Watch::default();
    watch.offer(
        &offer(
            "e",
            1,
            vec![
                entry(
                    "a",
                    "up",
                    r#","tags":["x","y"],"zone":"eu","metadata":{"gpu":1,"list":[1.0,{"k":null}]}"#,
                ),
                entry("b", "up", r#","tags":["y"],"zone":"us""#),
                entry("c", "down", r#","tags":["x"]"#),
            ],
        ),
        Reading::First,
    );
    let snapshot = watch.current().1;
    let chosen = |json: &str| -> String {
        snapshot
            .subset(&filter(json), 0)
            .instances
            .iter()
            .map(|i| i.record.id.as_str())
            .collect()
    };
    assert_eq!(chosen("{}"), "ab");
    assert_eq!(chosen(r#"{"all":["x","y"]}"#), "a");
    assert_eq!(chosen(r#"{"any":["x","z","y"]}"#), "ab");
    assert_eq!(chosen(r#"{"none":["x"]}"#), "b");
    assert_eq!(chosen(r#"{"zone":"us"}"#), "b");
    assert_eq!(chosen(r#"{"metadata":{"gpu":1.0}}"#), "a");
    assert_eq!(chosen(r#"{"metadata":{"list":[1,{"k":null}]}}"#), "a");
    assert_eq!(chosen(r#"{"metadata":{"gpu":"1"}}"#), "");
    assert_eq!(chosen(r#"{"metadata":{"absent":null}}"#), "");
    assert!(std::sync::Arc::ptr_eq(
        &snapshot.subset(&filter("{}"), 0),
        &snapshot.subset(&filter("{}"), 0)
    ));
    assert!(serde_json::from_str::<Filter>(r#"{"tgas":[]}"#).is_err());
}

#[test]
fn below_half_healthy_all_are_chosen_from() {
    let subset = |states: &[&str]| {
        let watch = Watch::default();
        let entries = states
            .iter()
            .enumerate()
            .map(|(i, s)| entry(&i.to_string(), s, ""))
            .collect();
        watch.offer(&offer("e", 1, entries), Reading::First);
        let subset = watch.current().1.subset(&Filter::default(), PANIC_PERCENT);
        (subset.instances.len(), subset.panicking)
    };
    assert_eq!(subset(&["up", "down"]), (1, false));
    assert_eq!(subset(&["up", "down", "down"]), (3, true));
    assert_eq!(subset(&["down"]), (1, true));
    assert_eq!(subset(&[]), (0, false));
}

#[test]
fn everything_gone_is_believed_only_when_read_twice() {
    let watch = Watch::default();
    assert_eq!(
        watch.offer(&offer("e", 1, vec![]), Reading::First),
        Verdict::Accepted
    );
    assert_eq!(
        watch.offer(&offer("e", 2, vec![entry("a", "up", "")]), Reading::First),
        Verdict::Accepted
    );
    assert_eq!(
        watch.offer(&offer("e", 3, vec![]), Reading::First),
        Verdict::Confirm
    );
    assert_eq!(ids(&watch), ["a"]);
    assert!(watch.is_news("3"));
    assert_eq!(
        watch.offer(&offer("e", 3, vec![]), Reading::Second),
        Verdict::Accepted
    );
    assert!(ids(&watch).is_empty() && !watch.is_stale() && !watch.is_news("3"));
}

#[test]
fn a_server_that_lost_its_data_does_not_thin_out_the_snapshot() {
    let watch = Watch::default();
    let all = || {
        vec![
            entry("a", "up", ""),
            entry("b", "up", ""),
            entry("c", "up", ""),
        ]
    };
    watch.offer(&offer("e1", 5, all()), Reading::First);
    assert_eq!(
        watch.offer(&offer("", 0, vec![]), Reading::First),
        Verdict::AfterGrace
    );
    assert_eq!((ids(&watch).len(), watch.is_stale()), (3, true));
    // The first of them has registered again; the others are still on their way.
    assert_eq!(
        watch.offer(
            &offer("e2", 1, vec![entry("b", "down", "")]),
            Reading::First
        ),
        Verdict::AfterGrace
    );
    assert_eq!(ids(&watch), ["a", "b", "c"]);
    assert_eq!(watch.current().1.instances[1].status, Status::Down);
    // After the grace: c never came back.
    assert_eq!(
        watch.offer(&offer("e2", 2, all()[..2].to_vec()), Reading::Settled),
        Verdict::Accepted
    );
    assert_eq!(
        (ids(&watch), watch.is_stale()),
        (vec!["a".into(), "b".into()], false)
    );
}

#[test]
fn counters_and_unchanged_instances_outlive_the_snapshot() {
    let watch = Watch::default();
    watch.offer(
        &offer("e", 1, vec![entry("a", "up", ""), entry("b", "up", "")]),
        Reading::First,
    );
    let (before, first) = watch.current();
    first.instances[0].load.begin();
    watch.offer(
        &offer("e", 2, vec![entry("a", "down", ""), entry("b", "up", "")]),
        Reading::First,
    );
    let (after, second) = watch.current();
    assert!(after > before);
    assert_eq!(
        second.instances[0].load.in_flight(),
        1,
        "of a, whose status changed"
    );
    assert!(
        std::sync::Arc::ptr_eq(&first.instances[1], &second.instances[1]),
        "b did not change"
    );
    watch.offer(
        &offer("e", 2, vec![entry("a", "down", ""), entry("b", "up", "")]),
        Reading::First,
    );
    assert_eq!(
        watch.generation(),
        after,
        "nothing changed, nobody has to look"
    );
}

#[test]
fn what_cannot_be_read_is_left_out_and_counted() {
    let watch = Watch::default();
    let bad = [
        "",
        "s1 1 6 up",
        "s1 1 6 sideways\0{}",
        "s1 x 6 up\0{}",
        "s1 1\0{}",
        "s1 1 6 up\0{\"id\":1}",
    ];
    let mut entries: Vec<Entry> = bad.iter().map(|raw| Entry { raw: (*raw).into() }).collect();
    entries.push(entry("a", "up", r#","weight":0"#));
    watch.offer(&offer("e", 1, entries), Reading::First);
    let snapshot = watch.current().1;
    assert_eq!((snapshot.instances.len(), snapshot.malformed), (1, 6));
    assert_eq!(snapshot.instances[0].record.weight, 1);
}

proptest! {
    #[test]
    fn no_stored_text_is_fatal(raw in ".{0,200}") {
        let watch = Watch::default();
        watch.offer(&offer("e", 1, vec![Entry { raw }]), Reading::First);
        prop_assert!(watch.current().1.instances.len() <= 1);
    }

    /// Whatever comes: no first reading empties a snapshot that had instances.
    #[test]
    fn no_first_reading_empties(steps in prop::collection::vec((0u8..3, 0usize..4, 0usize..3), 1..30)) {
        let watch = Watch::default();
        for (epoch, count, reading) in steps {
            let had = !ids(&watch).is_empty();
            let entries = (0..count).map(|i| entry(&i.to_string(), "up", "")).collect();
            let reading = [Reading::First, Reading::Second, Reading::Settled][reading];
            let verdict = watch.offer(&offer(&epoch.to_string(), 9, entries), reading);
            prop_assert!(verdict != Verdict::Accepted || ids(&watch).len() == count);
            match reading {
                Reading::First => prop_assert!(!had || !ids(&watch).is_empty()),
                Reading::Second => prop_assert!(verdict != Verdict::Confirm),
                Reading::Settled => prop_assert_eq!(verdict, Verdict::Accepted),
            }
        }
    }
}
