//! One process and the scripts, one command at a time, for what random schedules meet too rarely.

#![allow(clippy::unwrap_used)] // A test's way to fail.

use super::driver::commands;
use super::network::{pushed, write};
use super::process::{self, Wish};
use super::redis::Bytes;
use super::server::Server;
use crate::driver;
use crate::node::Node;
use crate::ring::Sink;
use bytes::BytesMut;
use dotmac_core::lease::Lease;
use dotmac_core::locks::Ask;
use std::sync::Arc;

/// What the process wants scripts to do.
fn all_said(node: &Node) -> Vec<Vec<Bytes>> {
    let mut state = node.lock();
    state.settle();
    let mut scripts = commands(state.take_out());
    scripts.retain(|args| args[0] != b"SUBSCRIBE");
    scripts
}

/// The same where it is one thing.
fn said(node: &Node) -> Vec<Bytes> {
    let mut scripts = all_said(node);
    assert_eq!(scripts.len(), 1, "scripts to run");
    scripts.remove(0)
}

/// The server's answer, which the process reads.
fn answer(server: &mut Server, node: &Node, command: &[Bytes]) {
    let mut bytes = BytesMut::new();
    write(&mut bytes, &server.command(command));
    driver::digest(node, &mut bytes).unwrap();
}

/// The process and the server talk until neither has anything to say; who else is granted something hears of it.
fn talk(server: &mut Server, node: &Node, others: &[&Node]) {
    loop {
        let scripts = all_said(node);
        for command in &scripts {
            answer(server, node, command);
        }
        let published = server.take_published();
        for (channel, message) in &published {
            for one in [&[node], others].concat() {
                let sid = one.lock().client.session.sid();
                if channel.ends_with(sid.as_bytes()) {
                    let mut bytes = pushed(b"message", channel, Some(message));
                    driver::digest(one, &mut bytes).unwrap();
                }
            }
        }
        if scripts.is_empty() && published.is_empty() {
            return;
        }
    }
}

/// A server at work, and processes that are connected to it.
fn at_work<const N: usize>() -> (Server, [Node; N]) {
    let mut server = Server::new(&[]).unwrap();
    server.set_time(WALL);
    let nodes = std::array::from_fn(|i| process::node(format!("s{i}"), 1));
    for node in &nodes {
        reach(&mut server, node);
    }
    // The grace of a server that has just started.
    server.set_time(WALL + 1_500_000);
    (server, nodes)
}

/// The process is connected to the server that is there now.
fn reach(server: &mut Server, node: &Node) {
    let hashes = server.load_scripts();
    process::connect(&mut node.lock(), hashes, server.starts);
    talk(server, node, &[]);
    assert!(node.lock().open());
}

fn ask(node: &Node, lock: usize) -> Vec<Bytes> {
    want(node, lock, None);
    said(node)
}

fn want(node: &Node, lock: usize, offered: Option<u64>) {
    let wish = Wish {
        lock,
        timeout: 10_000,
        fixed: false,
        wait: offered.is_none(),
        patience: None,
        owner: lock,
        shared: false,
        priority: 0,
    };
    let ask = Ask {
        offered,
        ..wish.ask("me")
    };
    node.lock().acquire(ask, Sink::Nobody);
}

/// The only lease of a process.
fn lease(node: &Node) -> Arc<Lease> {
    let state = node.lock();
    assert_eq!(state.client.held(), 1, "leases");
    (1..9)
        .find_map(|id| state.client.lease(id))
        .unwrap()
        .clone()
}

fn give_back(node: &Node) {
    let lease = lease(node);
    node.lock().release(&lease, Sink::Nobody);
}

const WALL: u64 = 2_000_000_000_000_000;
/// For one holder.
const LOCK: usize = 2;

#[test]
fn what_a_lost_session_asked_is_not_asked_again_for_want_of_a_script() {
    let (node, mut server) = (
        process::node(String::from("s"), 1),
        Server::new(&[]).unwrap(),
    );
    let hashes = server.load_scripts();
    process::connect(&mut node.lock(), hashes, 0);
    let opening = said(&node);
    answer(&mut server, &node, &opening);
    assert!(node.lock().open());
    server.lose_data();
    let (first, second) = (ask(&node, 0), ask(&node, 1));
    // The first is told that its session has gone, so another opens; the second asked under the old one, too.
    answer(&mut server, &node, &first);
    server.forget_scripts();
    answer(&mut server, &node, &second);
    let opening = said(&node);
    assert!(!node.lock().open());
    answer(&mut server, &node, &opening);
    assert!(node.lock().open());
    assert!(server.complaints.is_empty(), "{:?}", server.complaints);
}

/// It would keep a lock from everybody: its session lives, and nobody knows that it holds it.
#[test]
fn a_server_that_took_over_grants_nothing_to_who_has_had_its_answer() {
    let (mut server, [one, two, three]) = at_work();
    for node in [&one, &two] {
        want(node, LOCK, None);
        talk(&mut server, node, &[]);
    }
    let behind = server.copy();
    give_back(&one);
    talk(&mut server, &one, &[&two]);
    talk(&mut server, &two, &[]);
    give_back(&two);
    talk(&mut server, &two, &[]);
    assert!(server.leftovers().is_empty(), "{:?}", server.leftovers());
    server.take_over(behind);
    reach(&mut server, &two);
    reach(&mut server, &three);
    want(&three, LOCK, None);
    talk(&mut server, &three, &[]);
    assert_eq!(three.lock().client.held(), 0);
    let hashes = server.load_scripts();
    process::connect(&mut one.lock(), hashes, server.starts);
    talk(&mut server, &one, &[&two, &three]);
    talk(&mut server, &two, &[&three]);
    talk(&mut server, &three, &[]);
    lease(&three);
}

/// The grant is lost, and the queue from which it came is not.
#[test]
fn what_is_taken_back_is_not_granted_anew() {
    let (mut server, [one, two]) = at_work();
    for node in [&one, &two] {
        want(node, LOCK, None);
        talk(&mut server, node, &[]);
    }
    let behind = server.copy();
    give_back(&one);
    talk(&mut server, &one, &[&two]);
    talk(&mut server, &two, &[]);
    let held = lease(&two);
    server.take_over(behind);
    reach(&mut server, &one);
    // Its request was granted anew meanwhile.
    server.take_published();
    reach(&mut server, &two);
    assert_eq!(lease(&two).fence, held.fence);
    two.lock().release(&held, Sink::Nobody);
    talk(&mut server, &two, &[]);
    assert!(server.leftovers().is_empty(), "{:?}", server.leftovers());
}

/// Its takeover is lost, and the offer is not: under its fence stands somebody else.
#[test]
fn what_was_taken_over_is_taken_back_from_the_offer() {
    let (mut server, [one, two]) = at_work();
    want(&one, LOCK, None);
    talk(&mut server, &one, &[]);
    let fence = lease(&one).fence;
    let offered = lease(&one);
    one.lock().offer(&offered, 30_000_000, Sink::Nobody);
    talk(&mut server, &one, &[]);
    let behind = server.copy();
    want(&two, LOCK, Some(fence));
    talk(&mut server, &two, &[]);
    server.take_over(behind);
    reach(&mut server, &one);
    reach(&mut server, &two);
    assert_eq!(lease(&two).fence, fence);
    reach(&mut server, &one);
    give_back(&two);
    talk(&mut server, &two, &[]);
    assert!(server.leftovers().is_empty(), "it was its own");
}
