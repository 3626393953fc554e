//! An event loop's side, step by step as `Bridge` of the native crate takes it: what one turn submits goes out together
//! at its end, and what the loop promised to write is written.

use super::SCHEDULES;
use super::world::{World, Writing, ask};
use crate::Outcome;
use crate::node::{Node, State};
use crate::ring::{Ring, Sink};
use crate::sync::Bell;
use crate::sync::doubles::seek;
use dotmac_core::lease::Lease;
use shuttle::thread;
use std::collections::VecDeque;
use std::sync::Arc;

const TASKS: u64 = 2;
const ROUNDS: usize = 2;

/// What the seeded defects leave out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Broken {
    Nothing,
    /// `drain` does not write what its tasks have submitted.
    DrainWritesNothing,
    /// `drain` leaves the flag set, so that nobody is called to write from then on.
    FlagStays,
    /// `flush` clears the flag after it has been promised, and does not write.
    FlushWritesNothing,
}

/// The loop with its callbacks.
struct Loop {
    world: Arc<World>,
    ring: Arc<Ring>,
    broken: Broken,
    flush_due: bool,
    /// `call_soon(flush)` was called this often.
    soon: VecDeque<()>,
    /// Tasks that go on in a later turn.
    later: VecDeque<u64>,
    rounds: Vec<usize>,
    finished: u64,
}

impl Loop {
    fn submit(&mut self, submit: impl FnOnce(&mut State, Sink), slot: u64) {
        let mut state = self.world.node.lock();
        let alone = state.idle() && !self.flush_due;
        submit(&mut state, Sink::Ring(self.ring.clone(), slot));
        if self.world.node.settle(state, alone) && !std::mem::replace(&mut self.flush_due, true) {
            self.soon.push_back(());
        }
    }

    fn acquire(&mut self, slot: u64) {
        let name = format!("lock{slot}");
        self.submit(
            |state, sink| {
                state.acquire(ask(&name, None), sink);
            },
            slot,
        );
    }

    fn release(&mut self, slot: u64, lease: &Arc<Lease>) {
        self.submit(|state, sink| state.release(lease, sink), slot);
    }

    fn drain(&mut self) {
        let results = self.ring.drain();
        self.flush_due = true;
        for (slot, outcome) in results {
            match outcome {
                Outcome::Granted(lease) => self.release(slot, &lease),
                Outcome::Released(true) => {
                    self.rounds[slot as usize] += 1;
                    if self.rounds[slot as usize] < ROUNDS {
                        self.later.push_back(slot);
                    } else {
                        self.finished += 1;
                    }
                }
                other => panic!("{other:?}"),
            }
        }
        self.flush_due = self.broken == Broken::FlagStays;
        if self.broken != Broken::DrainWritesNothing {
            self.world.node.flush();
        }
        self.assert_written();
    }

    /// The promise is kept; where others do not keep it for us, in the end.
    fn assert_written(&self) {
        if self.broken == Broken::FlushWritesNothing || self.broken == Broken::Nothing {
            self.world.assert_sent();
        }
    }

    fn flush(&mut self) {
        self.flush_due = false;
        if self.broken != Broken::FlushWritesNothing {
            self.world.node.flush();
        }
        self.assert_written();
    }
}

/// Tasks of one loop lock and give back, a thread beside it does so, too.
fn turns(writing: Writing, broken: Broken) {
    let world = World::new(writing);
    let its = world.start();
    let ring = match Ring::new() {
        Ok(ring) => Arc::new(ring),
        Err(error) => panic!("no ring: {error}"),
    };
    world.node.lock().add_ring(&ring);
    let theirs = world.clone();
    let beside = thread::spawn(move || {
        let outcome = theirs.call(Node::settle, |state, sink| {
            state.acquire(ask("beside", None), sink);
        });
        assert!(matches!(outcome, Outcome::Granted(_)), "{outcome:?}");
    });
    let mut it = Loop {
        world: world.clone(),
        ring,
        broken,
        flush_due: false,
        soon: VecDeque::new(),
        later: VecDeque::new(),
        rounds: vec![0; TASKS as usize],
        finished: 0,
    };
    for slot in 0..TASKS {
        it.acquire(slot);
    }
    while it.finished < TASKS {
        if it.soon.pop_front().is_some() {
            it.flush();
        } else if let Some(slot) = it.later.pop_front() {
            it.acquire(slot);
        } else {
            Bell::wait(&it.ring.bell);
            it.drain();
        }
    }
    assert!(beside.join().is_ok());
    while it.soon.pop_front().is_some() {
        it.flush();
    }
    world.close(its);
}

#[test]
fn what_a_loop_submits_goes_out() {
    for writing in [
        Writing::Callers(64),
        Writing::Callers(usize::MAX),
        Writing::Engine,
    ] {
        shuttle::check_random(move || turns(writing, Broken::Nothing), SCHEDULES);
        shuttle::check_pct(move || turns(writing, Broken::Nothing), SCHEDULES, 3);
    }
}

#[test]
#[should_panic(expected = "deadlock")]
fn defect_a_drain_writes_nothing() {
    let writing = Writing::Callers(usize::MAX);
    seek(move || turns(writing, Broken::DrainWritesNothing));
}

#[test]
#[should_panic(expected = "deadlock")]
fn defect_the_flag_stays_set() {
    let writing = Writing::Callers(usize::MAX);
    seek(move || turns(writing, Broken::FlagStays));
}

#[test]
#[should_panic(expected = "left unsent")]
fn defect_a_flush_writes_nothing() {
    let writing = Writing::Callers(usize::MAX);
    seek(move || turns(writing, Broken::FlushWritesNothing));
}
