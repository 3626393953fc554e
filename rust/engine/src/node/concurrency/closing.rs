//! The end: whoever still asks is answered, and what is held is given back.

use super::SCHEDULES;
use super::world::{World, Writing, ask};
use crate::Outcome;
use crate::node::Node;
use crate::ring::Ring;
use crate::sync::doubles::seek;
use dotmac_core::locks::Failure;
use shuttle::thread;
use std::sync::Arc;

/// Threads ask, and ask again, while one closes. `close` is the closing thread's part.
fn close_while_asking(writing: Writing, names: &[&'static str], close: fn(&Node)) {
    let world = World::new(writing);
    let its = world.start();
    let ring = match Ring::new() {
        Ok(ring) => Arc::new(ring),
        Err(error) => panic!("no ring: {error}"),
    };
    world.node.lock().add_ring(&ring);
    let threads: Vec<_> = names
        .iter()
        .map(|name| {
            let name = *name;
            let world = world.clone();
            thread::spawn(move || {
                // Not for ever: a schedule may let nobody else go on.
                for _ in 0..3 {
                    match world.call(Node::settle, |state, sink| {
                        state.acquire(ask(name, None), sink);
                    }) {
                        Outcome::Granted(lease) => {
                            match world
                                .call(Node::settle, |state, sink| state.release(&lease, sink))
                            {
                                // False if the end was before, and gave it back.
                                Outcome::Released(_) | Outcome::Failed(Failure::Closed) => {}
                                outcome => panic!("{outcome:?}"),
                            }
                        }
                        Outcome::Failed(Failure::Closed) => return,
                        outcome => panic!("{outcome:?}"),
                    }
                }
            })
        })
        .collect();
    close(&world.node);
    for thread in its {
        assert!(thread.join().is_ok());
    }
    for thread in threads {
        assert!(thread.join().is_ok());
    }
    assert_eq!(world.node.lock().client.held(), 0);
}

fn close(node: &Node) {
    let mut state = node.lock();
    state.close();
    let _ = node.settle(state, true);
    node.notify.notify_one();
}

#[test]
fn everybody_is_answered_when_the_engine_is_closed() {
    for writing in [Writing::Callers(64), Writing::Engine] {
        shuttle::check_random(
            move || close_while_asking(writing, &["a", "b"], close),
            SCHEDULES,
        );
        shuttle::check_pct(
            move || close_while_asking(writing, &["a", "b"], close),
            SCHEDULES,
            3,
        );
    }
}

/// The engine is not told, and sleeps on where nothing is left to be read.
fn close_without_a_word(node: &Node) {
    node.lock().close();
}

#[test]
#[should_panic(expected = "deadlock")]
fn defect_the_engine_is_not_told_of_the_end() {
    seek(|| close_while_asking(Writing::Engine, &[], close_without_a_word));
}
