//! Random schedules of the lock protocol: real clients, the server's scripts as a model, and a bad day between them.
//!
//! Promises proved here, over lost connections with late commands, delays, pushes that overtake answers, paused
//! processes and servers, clock steps, refused commands, fixed and renewed leases, extensions, and cancellations at
//! any moment:
//! - no two clients believe in one lock at the same time; where the server lost its data, only until the older one
//!   hears of it or its own deadline passes;
//! - fencing tokens of successive holders increase, also over lost data;
//! - nobody is granted a lock past a live one who waits for it;
//! - every call has exactly one final event, and when the faults end, everything comes to rest: no place in a queue,
//!   no lease on the server that nobody holds, no length counted for a lease that is gone;
//! - time always advances between two calls of `tick`, and heartbeats do not grow with the number of leases;
//! - each of these checks fails when the rule behind it is switched off.

#![allow(clippy::unwrap_used)] // A test's way to fail.

mod model;

use dotmac_core::lease::Micros;
use dotmac_core::locks::Ask;
use model::world::{Broken, Step, World};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, TestRunner};

const LOCKS: usize = 3;
const CLIENTS: usize = 4;

/// What may go wrong with the server's data and its wall clock.
#[derive(Debug, Clone, Copy)]
enum Server {
    /// The clock steps back and forth, the data stays.
    Keeps,
    /// The data is lost; the clock only steps forward, or new fences could be below old ones.
    Forgets,
}

fn any_step(server: Server) -> impl Strategy<Value = Step> {
    let client = 0..CLIENTS;
    let timeout = prop_oneof![Just(150), Just(300), Just(1_000), Just(4_000), Just(8_000)];
    let patience = prop_oneof![
        3 => Just(None),
        1 => Just(Some(0)),
        1 => Just(Some(60)),
        2 => Just(Some(700)),
        2 => Just(Some(4_000)),
    ];
    let acquire = (
        client.clone(),
        0..LOCKS,
        timeout.clone(),
        prop::bool::weighted(0.25),
        prop::bool::weighted(0.85),
        patience,
        0..3usize,
    )
        .prop_map(
            |(client, lock, timeout, fixed, wait, patience, owner)| Step::Acquire {
                client,
                lock,
                timeout,
                fixed,
                wait,
                patience,
                owner,
            },
        );
    let keeps = matches!(server, Server::Keeps);
    let tens = if keeps { -40..40i8 } else { 1..40i8 };
    prop_oneof![
        24 => acquire,
        10 => (client.clone(), 0..8usize).prop_map(|(i, n)| Step::Release(i, n)),
        4 => (client.clone(), 0..8usize).prop_map(|(i, n)| Step::Cancel(i, n)),
        8 => (client.clone(), 0..8usize, timeout).prop_map(|(i, n, t)| Step::Extend(i, n, t)),
        4 => (client.clone(), 50..9_000u64).prop_map(|(i, ms)| Step::Pause(i, ms)),
        1 => (50..6_000u64).prop_map(Step::PauseServer),
        2 => tens.prop_map(Step::MoveClock),
        4 => client.clone().prop_map(Step::Cut),
        2 => (client.clone(), 1..4u8).prop_map(|(i, n)| Step::Refuse(i, n)),
        2 => (client, any::<bool>()).prop_map(move |(i, restart)| match (keeps, restart) {
            (true, _) => Step::Cut(i),
            (false, true) => Step::Restart,
            (false, false) => Step::Flush,
        }),
    ]
}

/// Steps, each with the milliseconds before it.
fn schedule(server: Server) -> impl Strategy<Value = (u64, Vec<(u64, Step)>)> {
    let wait = prop_oneof![4 => 0..20u64, 3 => 20..400u64, 1 => 400..3_000u64];
    (
        any::<u64>(),
        prop::collection::vec((wait, any_step(server)), 1..120),
    )
}

fn play(seed: u64, steps: &[(u64, Step)], broken: Broken) -> World {
    let mut world = World::new(CLIENTS, seed, broken);
    for (wait, step) in steps {
        world.pass(wait * 1_000);
        if !world.violations.is_empty() {
            return world;
        }
        world.play(step);
    }
    world.come_to_rest();
    world
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        failure_persistence: None,
        max_shrink_iters: 20_000,
        ..ProptestConfig::default()
    }
}

const CASES: u32 = if cfg!(debug_assertions) { 150 } else { 3_000 };

proptest! {
    #![proptest_config(config(CASES))]

    #[test]
    fn nobody_believes_wrongly_while_the_data_is_kept((seed, steps) in schedule(Server::Keeps)) {
        let world = play(seed, &steps, Broken::Nothing);
        prop_assert!(world.violations.is_empty(), "{:#?}", world.violations);
        prop_assert_eq!(world.counts.overlaps_after_loss, 0);
    }

    #[test]
    fn lost_data_misleads_only_those_who_have_not_heard_of_it((seed, steps) in schedule(Server::Forgets)) {
        let world = play(seed, &steps, Broken::Nothing);
        prop_assert!(world.violations.is_empty(), "{:#?}", world.violations);
    }
}

/// The first violation in at most so many schedules, the same on every run.
fn first_violation(broken: Broken, server: Server, schedules: usize) -> Option<String> {
    let mut runner = TestRunner::new_with_rng(Config::default(), deterministic());
    let strategy = schedule(server);
    (0..schedules).find_map(|_| {
        let (seed, steps) = strategy.new_tree(&mut runner).unwrap().current();
        play(seed, &steps, broken).violations.into_iter().next()
    })
}

fn deterministic() -> proptest::test_runner::TestRng {
    proptest::test_runner::TestRng::deterministic_rng(proptest::test_runner::RngAlgorithm::ChaCha)
}

#[test]
fn every_rule_is_missed_when_it_is_off() {
    let believers = "believe";
    for (broken, server, sign) in [
        (Broken::GrantStamp, Server::Keeps, believers),
        (Broken::HeartbeatStamp, Server::Keeps, believers),
        (Broken::Claim, Server::Keeps, believers),
        (Broken::Gaps, Server::Keeps, believers),
        (Broken::WallClock, Server::Keeps, believers),
        (Broken::Generations, Server::Keeps, ""),
        (Broken::LocalDeadline, Server::Keeps, believers),
        (Broken::Releases, Server::Keeps, "not at rest"),
        (Broken::Cancels, Server::Keeps, "not at rest"),
        (Broken::Fences, Server::Forgets, "believed after"),
    ] {
        let found = first_violation(broken, server, 3_000);
        assert!(
            found.as_ref().is_some_and(|text| text.contains(sign)),
            "{broken:?} off: {found:?}"
        );
    }
}

#[test]
fn the_schedules_reach_every_part_of_the_protocol() {
    let mut runner = TestRunner::new_with_rng(Config::default(), deterministic());
    let strategy = schedule(Server::Forgets);
    let (mut granted, mut lost, mut deadlocks, mut extended, mut overlaps) = (0, 0, 0, 0, 0);
    for _ in 0..200 {
        let (seed, steps) = strategy.new_tree(&mut runner).unwrap().current();
        let counts = play(seed, &steps, Broken::Nothing).counts;
        granted += counts.granted;
        lost += counts.lost;
        deadlocks += counts.deadlocks;
        extended += counts.extended;
        overlaps += counts.overlaps_after_loss;
    }
    assert!(
        granted > 1_000 && lost > 200,
        "{granted} granted, {lost} lost"
    );
    assert!(extended > 50, "{extended} extended");
    assert!(
        deadlocks > 0 && overlaps > 0,
        "{deadlocks} deadlocks, {overlaps} overlaps"
    );
}

fn heartbeats_in_a_minute(leases: usize, timeout: Micros) -> u64 {
    let mut world = World::new(1, 7, Broken::Nothing);
    world.calm();
    world.pass(1_000_000);
    for i in 0..leases {
        let ask = Ask {
            name: format!("lock{i}").into(),
            owner: "me".into(),
            // Many lengths, none of them the shortest.
            timeout: timeout + if i == 0 { 0 } else { i as u64 * 1_000 },
            fixed: false,
            wait: true,
            patience: None,
            since: 0,
        };
        world.acquire(0, ask, i);
    }
    world.pass(2_000_000);
    assert_eq!(world.processes[0].client.held(), leases);
    let before = world.processes[0].heartbeats;
    world.pass(60_000_000);
    assert_eq!(world.processes[0].client.held(), leases);
    assert!(world.violations.is_empty(), "{:?}", world.violations);
    world.processes[0].heartbeats - before
}

#[test]
fn heartbeats_do_not_grow_with_the_leases() {
    for timeout in [600_000, 30_000_000] {
        let one = heartbeats_in_a_minute(1, timeout);
        let many = heartbeats_in_a_minute(2_000, timeout);
        assert!(
            one.abs_diff(many) * 20 <= one,
            "{one} for one, {many} for 2,000"
        );
    }
    assert!(heartbeats_in_a_minute(1, 30_000_000) <= 70);
}
