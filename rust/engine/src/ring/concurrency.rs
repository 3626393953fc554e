//! Threads that hand results over, under shuttle's scheduler. Each test is held against a defect that it has to find.

use super::{Parker, Ring, Sink};
use crate::Outcome;
use crate::sync::atomic::Ordering;
use crate::sync::doubles::seek;
use shuttle::thread;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

const SCHEDULES: usize = 3_000;
const THREADS: u64 = 2;
const EACH: u64 = 2;

type Drain = fn(&Ring) -> Vec<(u64, Outcome)>;
type Signal = fn(&Ring);

fn ring() -> Arc<Ring> {
    match Ring::new() {
        Ok(ring) => Arc::new(ring),
        Err(error) => panic!("no ring: {error}"),
    }
}

fn slots(drained: &[(u64, Outcome)]) -> Vec<u64> {
    drained.iter().map(|(slot, _)| *slot).collect()
}

/// Pushes from two threads; the loop sleeps until it is woken. What is not handed over leaves it asleep for ever, which
/// shuttle calls a deadlock.
fn hand_over(drain: Drain, signal: Signal) {
    let ring = ring();
    let threads: Vec<_> = (0..THREADS)
        .map(|number| {
            let ring = ring.clone();
            thread::spawn(move || {
                for k in 0..EACH {
                    ring.push(number * 10 + k, Outcome::Echo);
                    signal(&ring);
                }
            })
        })
        .collect();
    let mut seen = Vec::new();
    while seen.len() < (THREADS * EACH) as usize {
        assert!(ring.bell.wait() <= THREADS, "rung for nothing");
        seen.extend(slots(&drain(&ring)));
    }
    for thread in threads {
        assert!(thread.join().is_ok());
    }
    for number in 0..THREADS {
        let its: Vec<_> = seen.iter().filter(|slot| **slot / 10 == number).collect();
        assert!(its.is_sorted_by(|a, b| a < b), "{seen:?}");
    }
    assert!(ring.drain().is_empty());
}

/// The loop ends after its first batch; what comes later is taken when the loop is abandoned.
fn end_early(drain: Drain) {
    let ring = ring();
    let threads: Vec<_> = (0..THREADS)
        .map(|slot| {
            let ring = ring.clone();
            thread::spawn(move || {
                Sink::Ring(ring.clone(), slot).put(Outcome::Echo, &mut Vec::new());
                ring.signal();
            })
        })
        .collect();
    ring.bell.wait();
    let mut seen = slots(&drain(&ring));
    for thread in threads {
        assert!(thread.join().is_ok());
    }
    seen.extend(slots(&ring.drain()));
    seen.sort_unstable();
    assert_eq!(seen, (0..THREADS).collect::<Vec<_>>());
}

fn park(put: fn(Arc<Parker>)) {
    let parker = Arc::new(Parker::default());
    let theirs = parker.clone();
    let thread = thread::spawn(move || put(theirs));
    assert!(matches!(parker.wait(Duration::MAX), Some(Outcome::Echo)));
    assert!(thread.join().is_ok());
}

#[test]
fn every_result_is_handed_over_once_and_in_order() {
    shuttle::check_random(|| hand_over(Ring::drain, Ring::signal), SCHEDULES);
    shuttle::check_pct(|| hand_over(Ring::drain, Ring::signal), SCHEDULES, 3);
}

#[test]
fn a_loop_that_ends_leaves_nothing_behind() {
    shuttle::check_dfs(|| end_early(Ring::drain), Some(20_000));
}

#[test]
fn a_parked_thread_is_woken() {
    shuttle::check_dfs(
        || {
            park(|parker| {
                Sink::Parker(parker).put(Outcome::Echo, &mut Vec::new());
            });
        },
        None,
    );
}

/// A result that comes between the two is taken, and its signal forgotten; or stays, and is not signalled.
fn clear_after_taking(ring: &Ring) -> Vec<(u64, Outcome)> {
    ring.bell.silence();
    let taken = std::mem::take(&mut *ring.items.lock().unwrap_or_else(PoisonError::into_inner));
    ring.signalled.store(false, Ordering::Release);
    taken
}

#[test]
#[should_panic(expected = "deadlock")]
fn defect_the_flag_is_cleared_after_the_results_are_taken() {
    seek(|| hand_over(clear_after_taking, Ring::signal));
}

/// A wake-up that came after the flag was cleared is taken back with the old one.
fn silence_last(ring: &Ring) -> Vec<(u64, Outcome)> {
    ring.signalled.store(false, Ordering::Release);
    let taken = std::mem::take(&mut *ring.items.lock().unwrap_or_else(PoisonError::into_inner));
    ring.bell.silence();
    taken
}

#[test]
#[should_panic(expected = "deadlock")]
fn defect_the_bell_is_silenced_after_the_flag_is_cleared() {
    seek(|| hand_over(silence_last, Ring::signal));
}

/// Two threads see that no wake-up is on its way, and one that is stays unseen.
fn signal_in_two_steps(ring: &Ring) {
    if !ring.signalled.load(Ordering::Acquire) {
        ring.bell.ring();
        ring.signalled.store(true, Ordering::Release);
    }
}

#[test]
#[should_panic(expected = "deadlock")]
fn defect_the_flag_is_set_after_the_bell_is_rung() {
    seek(|| hand_over(Ring::drain, signal_in_two_steps));
}

/// Takes a copy first, and what comes until it clears the ring is gone.
fn take_in_two_steps(ring: &Ring) -> Vec<(u64, Outcome)> {
    ring.bell.silence();
    ring.signalled.store(false, Ordering::Release);
    let taken = ring
        .items
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    ring.items
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clear();
    taken
}

#[test]
#[should_panic(expected = "left")]
fn defect_the_ring_is_copied_and_then_emptied() {
    seek(|| end_early(take_in_two_steps));
}

#[test]
#[should_panic(expected = "deadlock")]
fn defect_a_parked_thread_is_woken_before_its_result_is_there() {
    seek(|| {
        park(|parker| {
            parker.arrived.notify_one();
            *parker
                .outcome
                .lock()
                .unwrap_or_else(PoisonError::into_inner) = Some(Outcome::Echo);
        });
    });
}
