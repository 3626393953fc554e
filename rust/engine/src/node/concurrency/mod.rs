//! Callers, the engine's serving loop and a server, under shuttle's scheduler: nothing may be left unsent, unheard or
//! unanswered with nobody who will see to it. What is, leaves somebody asleep for ever, which shuttle calls a deadlock.
//! Each test is held against a defect that it has to find.

mod bridge;
mod closing;
mod world;

use super::{MUCH, Node, State};
use crate::Outcome;
use crate::sync::MutexGuard;
use crate::sync::doubles::seek;
use shuttle::thread;
use std::sync::Arc;
use world::{SECOND, SLOW, Settle, World, Writing, ask};

const SCHEDULES: usize = 400;

/// Two threads take a lock each and give it back; then the engine is closed.
fn callers(writing: Writing, settle: Settle) {
    let world = World::new(writing);
    let its = world.start();
    let threads: Vec<_> = ["a", "b"]
        .into_iter()
        .map(|name| {
            let world = world.clone();
            thread::spawn(move || {
                let outcome = world.call(settle, |state, sink| {
                    state.acquire(ask(name, None), sink);
                });
                let Outcome::Granted(lease) = outcome else {
                    panic!("{outcome:?}")
                };
                let outcome = world.call(settle, |state, sink| state.release(&lease, sink));
                assert!(matches!(outcome, Outcome::Released(true)), "{outcome:?}");
            })
        })
        .collect();
    for thread in threads {
        assert!(thread.join().is_ok());
    }
    world.assert_sent();
    world.close(its);
}

/// The engine sleeps until the next heartbeat is due; somebody comes whose patience ends before, and nothing comes from the server.
fn patience(settle: Settle) {
    let world = World::new(Writing::Callers(usize::MAX));
    let its = world.start();
    let theirs = world.clone();
    let thread = thread::spawn(move || {
        let outcome = theirs.call(settle, |state, sink| {
            state.acquire(ask(SLOW, Some(SECOND / 10)), sink);
        });
        assert!(matches!(outcome, Outcome::TimedOut), "{outcome:?}");
    });
    // Time passes before and after the request, but never as far as the next heartbeat.
    for _ in 0..3 {
        thread::yield_now();
        world.pass(SECOND / 20);
    }
    while !asked(&world) {
        thread::yield_now();
    }
    world.pass(SECOND / 10);
    assert!(thread.join().is_ok());
    world.close(its);
}

fn asked(world: &Arc<World>) -> bool {
    world.node.lock().next_token > 1
}

#[test]
fn callers_are_answered_whoever_writes() {
    for writing in [
        Writing::Callers(64),
        Writing::Callers(usize::MAX),
        Writing::Engine,
    ] {
        shuttle::check_random(move || callers(writing, Node::settle), SCHEDULES);
        shuttle::check_pct(move || callers(writing, Node::settle), SCHEDULES, 3);
    }
}

/// Leaves it to nobody to write what the socket did not take.
fn nobody_is_told(node: &Node, mut state: MutexGuard<'_, State>, flush: bool) -> bool {
    state.settle();
    let flush = flush || state.out.len() >= MUCH;
    if flush {
        state.flush();
    }
    let engine = state.client.next_tick().min(state.next_call_timeout()) < state.armed;
    let wake = std::mem::take(&mut state.wake);
    drop(state);
    if engine {
        node.notify.notify_one();
    }
    for ring in wake {
        ring.signal();
    }
    false
}

#[test]
#[should_panic(expected = "deadlock")]
fn defect_nobody_is_told_of_what_the_socket_did_not_take() {
    seek(|| callers(Writing::Callers(64), nobody_is_told));
}

#[test]
#[should_panic(expected = "deadlock")]
fn defect_nobody_is_told_of_what_only_the_engine_may_write() {
    seek(|| callers(Writing::Engine, nobody_is_told));
}

#[test]
fn the_engine_wakes_in_time_for_the_least_patient() {
    shuttle::check_random(|| patience(Node::settle), SCHEDULES);
    shuttle::check_pct(|| patience(Node::settle), SCHEDULES, 3);
}

/// Compares with what the engine would wait for now, not with what it waits for.
fn armed_by_the_caller(node: &Node, mut state: MutexGuard<'_, State>, flush: bool) -> bool {
    state.arm();
    node.settle(state, flush)
}

/// Somebody says that the engine will look in time, and it does not know.
#[test]
#[should_panic(expected = "deadlock")]
fn defect_the_caller_believes_that_the_engine_is_armed() {
    seek(|| patience(armed_by_the_caller));
}
