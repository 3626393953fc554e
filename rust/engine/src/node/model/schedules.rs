//! Random schedules of the lock protocol: the engine's state, the server's scripts, and a bad day between them.
//!
//! Promises proved here, over lost connections with late commands, delays, pushes that overtake answers, paused
//! processes and servers, clock steps, refused commands, forgotten scripts, fixed and renewed leases, extensions, and cancellations at
//! any moment:
//! - no two clients believe in one lock at the same time, unless it is for several; where the server lost its data, only
//!   until the older one hears of it or its own deadline passes, and those who come back in time take theirs back;
//! - fencing tokens of successive holders increase, also over lost data;
//! - nobody is granted a lock before a live one who asked for it earlier;
//! - every call has exactly one result, and when the faults end, everything comes to rest: no place in a queue,
//!   no lease on the server that nobody holds, no length counted for a lease that is gone;
//! - time always advances between two calls of `tick`, and heartbeats do not grow with the number of leases;
//! - each of these checks fails when the rule behind it is switched off.

#![allow(clippy::unwrap_used)] // A test's way to fail.

use super::broken::Broken;
use super::process::Wish;
use super::steps::{CLIENTS, Schedule, Server, Step, schedule as any_schedule};
use super::world::World;
use dotmac_core::lease::Micros;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, TestRunner};

fn play(schedule: &Schedule, broken: Broken) -> World {
    let mut world = World::new(CLIENTS, schedule.seed, broken);
    for (wait, step) in &schedule.steps {
        world.pass(wait * 1_000);
        if !world.violations.is_empty() {
            return world;
        }
        world.play(step);
    }
    world.come_to_rest();
    world
}

/// Schedules per promise, unless `PROPTEST_CASES` says another number.
const CASES: u32 = 150;

fn config() -> ProptestConfig {
    let told = std::env::var_os("PROPTEST_CASES").is_some();
    let standard = ProptestConfig::default();
    ProptestConfig {
        cases: if told { standard.cases } else { CASES },
        failure_persistence: None,
        max_shrink_iters: 20_000,
        ..standard
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn nobody_believes_wrongly_while_the_data_is_kept(schedule in any_schedule(Server::Keeps)) {
        let world = play(&schedule, Broken::Nothing);
        prop_assert!(world.violations.is_empty(), "{:#?}", world.violations);
        prop_assert_eq!(world.counts.overlaps_after_loss, 0);
    }

    #[test]
    fn lost_data_misleads_only_those_who_have_not_heard_of_it(schedule in any_schedule(Server::Forgets)) {
        let world = play(&schedule, Broken::Nothing);
        prop_assert!(world.violations.is_empty(), "{:#?}", world.violations);
    }
}

#[test]
fn tokens_increase_over_lost_data_though_the_clock_was_stepped_back() {
    let wish = Wish {
        lock: 0,
        timeout: 8_000,
        fixed: false,
        wait: true,
        patience: None,
        owner: 0,
        shared: false,
        priority: 0,
    };
    for seed in 0..20 {
        for lost in [Step::Flush, Step::Restart] {
            let steps = vec![
                (0, Step::MoveClock(100)),
                (100, Step::Acquire(0, wish)),
                (500, Step::Release(0, 0)),
                // Who knows of the tokens holds none of them.
                (2_500, Step::MoveClock(-100)),
                (100, lost),
                (5_000, Step::Acquire(1, wish)),
                (500, Step::Release(1, 0)),
            ];
            let world = play(&Schedule { seed, steps }, Broken::Nothing);
            assert!(world.violations.is_empty(), "{:#?}", world.violations);
            assert_eq!(world.counts.granted, 2);
        }
    }
}

/// The first violation in at most so many schedules, the same on every run.
fn first_violation(broken: Broken, server: Server, schedules: usize) -> Option<String> {
    let mut runner = TestRunner::new_with_rng(Config::default(), deterministic());
    let strategy = any_schedule(server);
    (0..schedules).find_map(|_| {
        let schedule = strategy.new_tree(&mut runner).unwrap().current();
        play(&schedule, broken).violations.into_iter().next()
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
        (Broken::WallClock, Server::Keeps, ""),
        (Broken::Generations, Server::Keeps, ""),
        (Broken::LocalDeadline, Server::Keeps, believers),
        (Broken::Releases, Server::Keeps, "not at rest"),
        (Broken::Cancels, Server::Keeps, "not at rest"),
        (Broken::Fences, Server::Forgets, "believed after"),
        (Broken::Order, Server::Keeps, "not in the order"),
        (Broken::Unnoticed, Server::Keeps, "had named"),
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
    let strategy = any_schedule(Server::Forgets);
    let (mut granted, mut lost, mut deadlocks, mut extended) = (0, 0, 0, 0);
    let mut taken_back = 0;
    for _ in 0..200 {
        let schedule = strategy.new_tree(&mut runner).unwrap().current();
        let counts = play(&schedule, Broken::Nothing).counts;
        granted += counts.granted;
        lost += counts.lost;
        deadlocks += counts.deadlocks;
        extended += counts.extended;
        taken_back += counts.taken_back;
    }
    assert!(taken_back > 20, "{taken_back} taken back");
    assert!(
        granted > 1_000 && lost > 200,
        "{granted} granted, {lost} lost"
    );
    assert!(extended > 50, "{extended} extended");
    assert!(deadlocks > 0, "no deadlocks");
}

/// How often two believed in one lock because the data was lost, in so many schedules.
fn overlaps_after_loss(broken: Broken, schedules: usize) -> u64 {
    let mut runner = TestRunner::new_with_rng(Config::default(), deterministic());
    let strategy = any_schedule(Server::Forgets);
    (0..schedules)
        .map(|_| {
            let schedule = strategy.new_tree(&mut runner).unwrap().current();
            play(&schedule, broken).counts.overlaps_after_loss
        })
        .sum()
}

#[test]
fn nothing_is_granted_before_those_who_held_something_could_take_it_back() {
    assert_eq!(overlaps_after_loss(Broken::Nothing, 200), 0);
    assert!(overlaps_after_loss(Broken::Grace, 200) > 0);
}

fn heartbeats_in_a_minute(leases: usize, timeout: Micros) -> u64 {
    let mut world = World::new(1, 7, Broken::Nothing);
    world.calm();
    world.pass(1_000_000);
    for i in 0..leases {
        let wish = Wish {
            lock: i,
            // Many lengths, none of them the shortest.
            timeout: timeout / 1_000 + if i == 0 { 0 } else { i as u64 },
            fixed: false,
            wait: true,
            patience: None,
            owner: i,
            shared: false,
            priority: 0,
        };
        world.acquire(0, wish);
    }
    world.pass(2_000_000);
    assert_eq!(world.processes[0].node.lock().client.held(), leases);
    let before = world.processes[0].node.lock().counts.heartbeats;
    world.pass(60_000_000);
    assert_eq!(world.processes[0].node.lock().client.held(), leases);
    assert!(world.violations.is_empty(), "{:?}", world.violations);
    world.processes[0].node.lock().counts.heartbeats - before
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
