//! Promises: weights are met exactly per turn and evenly within it; draws follow weights; ties fall anywhere;
//! least connections and two choices stay even where nothing else tells instances apart; a slow backend hurts
//! two choices less than random, and peak EWMA least.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
use std::cmp::Reverse;
use std::collections::BinaryHeap;

use proptest::prelude::{prop, prop_assert, proptest};

use super::*;

fn candidates(weights: &[u32]) -> Candidates {
    Candidates::new(weights.iter().map(|&w| (w, Arc::default())).collect())
}

fn counts(strategy: Strategy, from: &Candidates, picks: usize) -> Vec<usize> {
    let balancer = Balancer::new(strategy, 7);
    let mut seen = vec![0; from.len()];
    for _ in 0..picks {
        seen[balancer.pick(from, || 0).unwrap()] += 1;
    }
    seen
}

#[test]
fn names_are_read_and_others_refused_with_the_list() {
    for (name, strategy) in Strategy::ALL {
        assert_eq!(name.parse::<Strategy>(), Ok(strategy));
    }
    let error = "best".parse::<Strategy>().unwrap_err().to_string();
    assert!(
        error.contains("\"best\"") || error.contains("best") && error.contains("peak_ewma"),
        "{error}"
    );
}

#[test]
fn nothing_to_choose_from_is_none_and_one_is_that_one() {
    for (_, strategy) in Strategy::ALL {
        let balancer = Balancer::new(strategy, 1);
        assert_eq!(balancer.pick(&candidates(&[]), || 0), None);
        assert_eq!(balancer.pick(&candidates(&[5]), || 0), Some(0));
    }
}

#[test]
fn round_robin_is_even_from_any_start() {
    for seed in 0..50 {
        let (balancer, from) = (
            Balancer::new(Strategy::RoundRobin, seed),
            candidates(&[1; 7]),
        );
        let mut seen = [0; 7];
        for _ in 0..700 {
            seen[balancer.pick(&from, || 0).unwrap()] += 1;
        }
        assert_eq!(seen, [100; 7]);
    }
    let starts: std::collections::HashSet<_> = (0..50)
        .map(|seed| Balancer::new(Strategy::RoundRobin, seed).pick(&candidates(&[1; 7]), || 0))
        .collect();
    assert!(
        starts.len() > 4,
        "clients start in different places: {starts:?}"
    );
}

#[test]
fn a_heavy_instance_is_spread_over_the_turn() {
    let turn = rotation(&[5, 1, 1]);
    assert_eq!(turn.len(), 7);
    // Never four in a row, even where the turn closes on itself.
    let twice: Vec<u32> = turn.iter().chain(turn.iter()).copied().collect();
    assert!(
        twice.windows(4).all(|w| w.iter().any(|&i| i != 0)),
        "{turn:?}"
    );
}

#[test]
fn huge_weights_are_scaled_and_nobody_is_forgotten() {
    let turn = rotation(&[u32::MAX, 1, u32::MAX / 2]);
    assert!(turn.len() <= 4097, "{}", turn.len());
    assert!(turn.contains(&1));
}

#[test]
fn least_connections_fills_the_emptiest_and_breaks_ties_anywhere() {
    let from = candidates(&[1; 10]);
    for (_, load) in &from.members[..9] {
        load.begin();
    }
    assert_eq!(counts(Strategy::LeastConnections, &from, 100)[9], 100);
    from.members[9].1.begin();
    let seen = counts(Strategy::LeastConnections, &from, 10_000);
    assert!(seen.iter().all(|&n| (800..1200).contains(&n)), "{seen:?}");
}

#[test]
fn least_connections_respects_weights_when_idle_and_when_busy() {
    let from = candidates(&[3, 1]);
    let idle = counts(Strategy::LeastConnections, &from, 8_000);
    assert!((5_500..6_500).contains(&idle[0]), "{idle:?}");
    let balancer = Balancer::new(Strategy::LeastConnections, 3);
    for _ in 0..400 {
        from.members[balancer.pick(&from, || 0).unwrap()].1.begin();
    }
    let held = from.members[0].1.in_flight();
    assert!(
        (298..=302).contains(&held),
        "{held} of 400 on the instance of weight 3"
    );
}

#[test]
fn least_connections_stays_bounded_with_many() {
    let from = candidates(&vec![1; 5_000]);
    let balancer = Balancer::new(Strategy::LeastConnections, 3);
    for _ in 0..20_000 {
        from.members[balancer.pick(&from, || 0).unwrap()].1.begin();
    }
    let most = from
        .members
        .iter()
        .map(|(_, l)| l.in_flight())
        .max()
        .unwrap();
    assert!(
        most <= 8,
        "20,000 calls over 5,000 instances: {most} on the fullest"
    );
}

#[test]
fn p2c_keeps_the_peak_far_below_random() {
    let peak = |strategy| {
        let (balancer, from) = (Balancer::new(strategy, 11), candidates(&[1; 64]));
        for _ in 0..64 * 100 {
            from.members[balancer.pick(&from, || 0).unwrap()].1.begin();
        }
        from.members
            .iter()
            .map(|(_, l)| l.in_flight())
            .max()
            .unwrap()
    };
    let (two, one) = (peak(Strategy::PowerOfTwo), peak(Strategy::Random));
    assert!(
        two <= 104 && one > 115,
        "two choices {two}, one choice {one}, mean 100"
    );
}

#[test]
fn an_instance_that_fails_fast_is_not_preferred() {
    let from = candidates(&[1, 1]);
    for _ in 0..20 {
        from.members[0].1.begin();
        from.members[0].1.end(0, 1_000, false);
        from.members[1].1.begin();
        from.members[1].1.end(0, 50_000_000, true);
    }
    let seen = counts(Strategy::PeakEwma, &from, 1_000);
    assert_eq!(seen, [0, 1_000]);
    assert_eq!(from.members[0].1.finished(), (20, 20));
}

#[test]
fn a_peak_counts_at_once_and_fades() {
    let load = Load::default();
    for _ in 0..100 {
        load.begin();
        load.end(0, 1_000_000, true);
    }
    load.begin();
    load.end(0, 80_000_000, true);
    assert!((load.latency(80_000_000) - 80e6).abs() < 1e4);
    assert!(
        load.latency(60_000_000_000) < 1e6,
        "forgotten after six time constants"
    );
    assert_eq!(load.in_flight(), 0);
}

/// Fifty backends, one ten times slower, twenty clients that know only their own calls; p99 latency in ms.
fn simulate(strategy: Strategy, load: f64) -> u64 {
    const MS: u64 = 1_000_000;
    let (backends, clients, calls) = (50usize, 20usize, 40_000u64);
    let mut rng = fastrand::Rng::with_seed(5);
    let sides: Vec<_> = (0..clients)
        .map(|i| {
            (
                Balancer::new(strategy, i as u64 * 7919),
                candidates(&vec![1; backends]),
            )
        })
        .collect();
    let mut free = vec![0u64; backends];
    let mut ends: BinaryHeap<Reverse<(u64, usize, usize, u64)>> = BinaryHeap::new();
    let (mut now, mut latencies) = (0u64, Vec::new());
    for _ in 0..calls {
        // Poisson arrivals, as a share of what all backends together can do.
        let rate = load * (49.0 / 10.0 + 1.0 / 100.0);
        now += (-(1.0 - rng.f64()).ln() / rate * MS as f64) as u64;
        while let Some(&Reverse((at, client, backend, began))) = ends.peek() {
            if at > now {
                break;
            }
            ends.pop();
            sides[client].1.members[backend].1.end(began, at, true);
        }
        let client = rng.usize(..clients);
        let (balancer, from) = &sides[client];
        let backend = balancer.pick(from, || now).unwrap();
        from.members[backend].1.begin();
        let mean = if backend == 0 { 100.0 } else { 10.0 };
        let work = (-(1.0 - rng.f64()).ln() * mean * MS as f64) as u64;
        free[backend] = free[backend].max(now) + work;
        latencies.push(free[backend] - now);
        ends.push(Reverse((free[backend], client, backend, now)));
    }
    latencies.drain(..5_000);
    latencies.sort_unstable();
    latencies[latencies.len() * 99 / 100] / MS
}

/// At a tenth of the capacity. At half of it the three that look at load are level, and above it peak EWMA, which
/// keeps away from a backend for as long as it remembers, is no longer the best.
#[test]
fn one_slow_backend_hurts_peak_ewma_least_at_light_load() {
    let p99: std::collections::HashMap<_, _> = Strategy::ALL
        .iter()
        .map(|&(n, s)| (n, simulate(s, 0.1)))
        .collect();
    assert!(p99["peak_ewma"] * 2 < p99["random"], "{p99:?}");
    assert!(p99["peak_ewma"] * 2 < p99["power_of_two"], "{p99:?}");
    assert!(p99["power_of_two"] * 2 < p99["random"], "{p99:?}");
    assert!(p99["least_connections"] * 2 < p99["random"], "{p99:?}");
}

proptest! {
    #[test]
    fn a_turn_meets_weights_exactly_and_every_prefix_nearly(weights in prop::collection::vec(1u32..40, 1..40)) {
        let turn = rotation(&weights);
        let (total, n) = (turn.len() as f64, weights.len() as f64);
        let scale = f64::from(weights.iter().sum::<u32>()) / total;
        let mut seen = vec![0f64; weights.len()];
        for (t, &index) in turn.iter().enumerate() {
            seen[index as usize] += 1.0;
            for (i, &w) in weights.iter().enumerate() {
                let share = f64::from(w) / scale / total;
                prop_assert!((seen[i] - (t + 1) as f64 * share).abs() <= 1.01 + n * share);
            }
        }
        for (i, &w) in weights.iter().enumerate() {
            prop_assert!((seen[i] * scale - f64::from(w)).abs() < 1e-9);
        }
    }

    #[test]
    fn draws_follow_weights(weights in prop::collection::vec(1u32..1000, 1..30)) {
        let table = Alias::new(&weights);
        let mut rng = fastrand::Rng::with_seed(3);
        let (mut seen, draws) = (vec![0u32; weights.len()], 60_000);
        for _ in 0..draws {
            seen[table.draw(rng.u64(..))] += 1;
        }
        let total = f64::from(weights.iter().sum::<u32>());
        for (i, &w) in weights.iter().enumerate() {
            let expected = f64::from(w) / total * f64::from(draws);
            // Six standard deviations.
            prop_assert!((f64::from(seen[i]) - expected).abs() < 6.0 * expected.sqrt() + 6.0, "{i}: {} of {expected}", seen[i]);
        }
    }

    #[test]
    fn every_pick_is_one_of_them(count in 1usize..200, seed: u64, which in 0usize..5) {
        let from = candidates(&vec![2; count]);
        let balancer = Balancer::new(Strategy::ALL[which].1, seed);
        for now in 0..100 {
            prop_assert!(balancer.pick(&from, || now).unwrap() < count);
        }
    }

    #[test]
    fn two_are_never_the_same(count in 2usize..100, seed: u64) {
        let balancer = Balancer::new(Strategy::PowerOfTwo, seed);
        for _ in 0..100 {
            let (a, b) = balancer.two(count);
            prop_assert!(a != b && a < count && b < count);
        }
    }
}
