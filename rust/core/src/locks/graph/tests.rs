//! Promises: what is stuck is what a plain fixpoint finds; a cycle is one, through the request, and no shorter one is
//! there; all who see a cycle choose the same victim, by the rule of the youngest; two readings have in common only what
//! did not change.

use super::*;
use proptest::prelude::*;

fn text(prefix: &str, number: usize) -> Arc<str> {
    format!("{prefix}{number}").into()
}

fn wait(request: usize, lock: usize, owners: &[usize]) -> Wait {
    Wait {
        request: text("r", request),
        lock: text("l", lock),
        owners: owners.iter().map(|owner| text("o", *owner)).collect(),
        order: 5000,
        held: 1,
        victim: Victim::Youngest,
        process: "{}".into(),
        place: "w.py:1".into(),
    }
}

fn taken(permits: Option<usize>, by: &[(usize, u64)]) -> Taken {
    let by = by.iter().map(|(owner, fence)| Holding {
        owner: text("o", *owner),
        fence: *fence,
        since: *fence,
        place: "h.py:2".into(),
    });
    Taken {
        permits,
        by: by.collect(),
    }
}

/// Owner n has asked for lock n at the time 100 + n, holds it, and waits for the next.
fn ring(size: usize) -> Graph {
    let mut graph = Graph::default();
    for n in 0..size {
        graph.add_lock(text("l", n), taken(None, &[(n, 100 + n as u64)]));
        graph.add_wait(wait(n, (n + 1) % size, &[n]));
    }
    graph
}

fn names(cycle: &[Edge<'_>]) -> Vec<String> {
    cycle
        .iter()
        .map(|edge| edge.wait.request.to_string())
        .collect()
}

#[test]
fn a_ring_is_found_from_each_of_its_members_with_the_same_victim() {
    for size in [1, 2, 3, 50] {
        let graph = ring(size);
        for n in 0..size {
            let cycle = graph.stuck().cycle(&text("r", n)).unwrap_or_default();
            assert_eq!(cycle.len(), size);
            assert_eq!(*cycle[0].wait.request, *text("r", n));
            assert_eq!(
                victim(&cycle).map(|wait| &*wait.request),
                Some(&*text("r", size - 1))
            );
            for (edge, next) in cycle.iter().zip(cycle.iter().cycle().skip(1)) {
                assert_eq!(&*edge.by.owner, next.waiter);
            }
        }
    }
}

#[test]
fn fences_of_different_partitions_are_in_no_order() {
    let mut graph = ring(3);
    graph.locks.values_mut().for_each(|taken| {
        taken.by[0].fence = 500 - taken.by[0].fence;
    });
    let stuck = graph.stuck();
    let cycle = stuck.cycle("r0").unwrap_or_default();
    assert_eq!(victim(&cycle).map(|wait| &*wait.request), Some("r2"));
}

#[test]
fn a_cycle_in_words_names_everything() {
    let graph = ring(2);
    let cycle = graph.stuck().cycle("r1").unwrap_or_default();
    let expected = [
        "l0", "o1", "{}", "w.py:1", "o0", "h.py:2", "l1", "o0", "{}", "w.py:1", "o1", "h.py:2",
    ];
    assert_eq!(rows(&cycle), expected);
}

#[test]
fn the_rule_of_the_youngest_decides() {
    let chosen = |change: &dyn Fn(usize, &mut Wait)| {
        let mut graph = ring(4);
        for n in 0..4 {
            let mut wait = wait(n, (n + 1) % 4, &[n]);
            change(n, &mut wait);
            graph.add_wait(wait);
        }
        let stuck = graph.stuck();
        let all: BTreeSet<_> = (0..4)
            .filter_map(|n| victim(&stuck.cycle(&text("r", n))?).map(|wait| wait.request.clone()))
            .collect();
        assert_eq!(all.len(), 1, "they differ");
        all.into_iter().next()
    };
    let all = |rule| move |wait: &mut Wait| wait.victim = rule;
    let by = |rule, n: usize, wait: &mut Wait| {
        all(rule)(wait);
        wait.order = if n < 2 { 5001 } else { 4999 };
        wait.held = if n == 2 { 1 } else { 7 };
    };
    assert_eq!(
        chosen(&|n, w| by(Victim::LowestPriority, n, w)),
        Some("r1".into())
    );
    assert_eq!(
        chosen(&|n, w| by(Victim::FewestLocks, n, w)),
        Some("r2".into())
    );
    assert_eq!(chosen(&|n, w| by(Victim::Closer, n, w)), Some("r3".into()));
    assert_eq!(
        chosen(&|n, w| by(
            if n == 3 {
                Victim::Youngest
            } else {
                Victim::FewestLocks
            },
            n,
            w
        )),
        Some("r3".into())
    );
}

#[test]
fn a_semaphore_blocks_only_when_all_its_permits_are_stuck() {
    let with = |holders: &[(usize, u64)]| {
        let mut graph = ring(2);
        graph.add_lock("l1".into(), taken(Some(2), holders));
        graph.stuck().cycle("r0").is_some()
    };
    assert!(!with(&[(1, 101), (9, 109)]), "o9 can go on");
    assert!(!with(&[(1, 101)]), "a permit is free");
    assert!(with(&[(1, 101), (1, 102)]));
}

#[test]
fn those_who_only_wait_for_a_cycle_are_not_in_it() {
    let mut graph = ring(2);
    graph.add_wait(wait(7, 0, &[7]));
    assert!(graph.stuck().cycle("r7").is_none());
    assert_eq!(graph.stuck().support("r7").len(), 3);
    assert_eq!(graph.stuck().support("r0").len(), 2);
    graph.remove("r1");
    assert!(graph.stuck().support("r7").is_empty());
}

#[test]
fn whoever_awaits_another_waits_for_the_same() {
    let mut graph = Graph::default();
    graph.add_lock("l0".into(), taken(None, &[(0, 1)]));
    graph.add_lock("l1".into(), taken(None, &[(2, 2)]));
    // o0 awaits o1, which waits for o2, which waits for what o0 holds.
    graph.add_wait(wait(1, 1, &[1, 0]));
    graph.add_wait(wait(2, 0, &[2]));
    let cycle = graph.stuck().cycle("r1").unwrap_or_default();
    assert_eq!(names(&cycle), ["r1", "r2"]);
    assert_eq!((cycle[0].waiter, &*cycle[1].by.owner), ("o0", "o0"));
}

#[test]
fn what_changed_between_two_readings_is_no_deadlock() {
    let before = ring(3);
    assert!(before.common(&before).stuck().cycle("r0").is_some());
    let mut regained = ring(3);
    regained.add_lock("l1".into(), taken(None, &[(1, 999)]));
    assert!(before.common(&regained).stuck().cycle("r0").is_none());
    let mut gone = ring(3);
    gone.remove("r1");
    assert!(before.common(&gone).stuck().cycle("r0").is_none());
    assert!(gone.common(&before).stuck().cycle("r0").is_none());
    let semaphore = |fences: &[u64]| {
        let mut graph = ring(2);
        let by: Vec<_> = fences.iter().map(|fence| (1, *fence)).collect();
        graph.add_lock("l1".into(), taken(Some(2), &by));
        graph
    };
    let both = semaphore(&[101, 102]).common(&semaphore(&[101, 103]));
    assert!(both.stuck().cycle("r0").is_none());
    assert!(semaphore(&[101, 102]).stuck().cycle("r0").is_some());
}

/// As it stands in the script that finds cycles within a partition.
fn fixpoint(graph: &Graph) -> BTreeSet<Arc<str>> {
    let mut blocked: BTreeSet<Arc<str>> = graph.waits.keys().cloned().collect();
    loop {
        let on = blocked.iter().find(|request| {
            let Some(taken) = graph.locks.get(&graph.waits[*request].lock) else {
                return true;
            };
            let stuck = |by: &Holding| {
                let mut waits = graph.waits.values();
                waits.any(|w| w.owners.contains(&by.owner) && blocked.contains(&w.request))
            };
            match taken.permits {
                Some(permits) => taken.by.len() < permits || !taken.by.iter().all(stuck),
                None => !taken.by.iter().any(stuck),
            }
        });
        let Some(on) = on.cloned() else {
            return blocked;
        };
        blocked.remove(&on);
    }
}

/// Steps from the request back to one of its owners, among those that are stuck.
fn distance(graph: &Graph, blocked: &BTreeSet<Arc<str>>, request: &Arc<str>) -> Option<usize> {
    let first = &graph.waits[request];
    let mut layer = BTreeSet::from([request.clone()]);
    let mut seen = layer.clone();
    for steps in 1.. {
        let owners: BTreeSet<_> = layer
            .iter()
            .flat_map(|request| &graph.locks[&graph.waits[request].lock].by)
            .map(|by| by.owner.clone())
            .collect();
        let of = |owner: &Arc<str>| {
            let waits = graph.waits.values();
            let mut mine = waits.filter(|w| w.owners.contains(owner));
            mine.any(|w| blocked.contains(&w.request))
        };
        if owners.iter().any(|o| first.owners.contains(o) && of(o)) {
            return Some(steps);
        }
        layer = blocked
            .iter()
            .filter(|r| graph.waits[*r].owners.iter().any(|o| owners.contains(o)))
            .filter(|r| seen.insert((*r).clone()))
            .cloned()
            .collect();
        if layer.is_empty() {
            return None;
        }
    }
    None
}

fn graphs() -> impl Strategy<Value = Graph> {
    let lock = (
        proptest::option::weighted(0.3, 1usize..4),
        proptest::collection::vec(0usize..8, 0..4),
    );
    let request = (0usize..7, proptest::collection::vec(0usize..8, 1..3));
    (
        proptest::collection::vec(lock, 1..7),
        proptest::collection::vec(request, 0..12),
    )
        .prop_map(|(locks, requests)| {
            let (mut graph, mut fence) = (Graph::default(), 0);
            for (n, (permits, owners)) in locks.iter().enumerate() {
                let by: Vec<_> = owners
                    .iter()
                    .map(|owner| {
                        fence += 1;
                        (*owner, fence)
                    })
                    .collect();
                graph.add_lock(text("l", n), taken(*permits, &by));
            }
            for (n, (lock, owners)) in requests.iter().enumerate() {
                graph.add_wait(wait(n, *lock, owners));
            }
            graph
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn stuck_is_what_a_plain_fixpoint_finds(graph in graphs()) {
        let (blocked, stuck) = (fixpoint(&graph), graph.stuck());
        for request in graph.waits.keys() {
            prop_assert_eq!(stuck.request(request).is_some(), blocked.contains(request));
            prop_assert_eq!(stuck.support(request).is_empty(), !blocked.contains(request));
            let expected = blocked
                .contains(request)
                .then(|| distance(&graph, &blocked, request))
                .flatten();
            let cycle = stuck.cycle(request);
            prop_assert_eq!(cycle.as_ref().map(Vec::len), expected);
            let Some(cycle) = cycle else { continue };
            prop_assert_eq!(&*cycle[0].wait.request, &**request);
            for (edge, next) in cycle.iter().zip(cycle.iter().cycle().skip(1)) {
                prop_assert!(blocked.contains(&edge.wait.request));
                prop_assert!(graph.locks[&edge.wait.lock].by.contains(edge.by));
                prop_assert_eq!(&*edge.by.owner, next.waiter);
                prop_assert!(next.wait.owners.contains(&edge.by.owner));
            }
            prop_assert!(victim(&cycle).is_some_and(|w| names(&cycle).contains(&w.request.to_string())));
        }
    }

    #[test]
    fn whoever_is_stuck_leads_to_a_cycle_that_its_members_see(graph in graphs()) {
        let stuck = graph.stuck();
        for request in graph.waits.keys() {
            let support = stuck.support(request);
            let found = support.iter().any(|wait| stuck.cycle(&wait.request).is_some());
            prop_assert_eq!(found, !support.is_empty());
        }
    }

    #[test]
    fn what_two_readings_have_in_common_is_stuck_in_both(
        before in graphs(),
        changes in proptest::collection::vec((0usize..7, 0usize..4, 0usize..8), 0..4),
    ) {
        prop_assert_eq!(&before.common(&before), &before);
        let mut after = before.clone();
        for (lock, holder, owner) in changes {
            after.remove(&text("r", lock));
            if let Some(by) = after.locks.get_mut(&text("l", lock)).and_then(|l| l.by.get_mut(holder)) {
                by.owner = text("o", owner);
                by.fence += u64::from(owner < 4) * 1000;
            }
        }
        let both = before.common(&after);
        for request in both.waits.keys() {
            if both.stuck().request(request).is_some() {
                prop_assert!(before.stuck().request(request).is_some());
                prop_assert!(after.stuck().request(request).is_some());
            }
        }
    }
}
