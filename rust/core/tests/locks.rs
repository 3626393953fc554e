//! The lock client by itself, one answer at a time.
//!
//! Promises proved here, each in the smallest conversation that could break it: fixed leases end at their deadline,
//! extensions are believed only as far as all that is on its way allows, stale grants leave nothing behind, refused
//! releases are sent again, a lost session is renewed once, and what ended takes up no memory.

use dotmac_core::lease::{CLAIM_WINDOW, Lease, Micros, drift};
use dotmac_core::locks::{
    AcquireReply, Ask, Client, Command, Event, Failure, Heartbeat, HeartbeatReply, Mode,
};
use std::sync::Arc;

const SECOND: Micros = 1_000_000;

fn ask(name: &str, timeout: Micros, fixed: bool) -> Ask {
    Ask {
        name: name.into(),
        owner: "me".into(),
        timeout,
        fixed,
        wait: true,
        patience: None,
        since: 0,
    }
}

/// The heartbeat that the client wants sent.
fn heartbeat(client: &mut Client) -> Heartbeat {
    let at = client
        .commands
        .iter()
        .position(|command| matches!(command, Command::Heartbeat(_)));
    match at.map(|at| client.commands.remove(at)) {
        Some(Command::Heartbeat(heartbeat)) => heartbeat,
        _ => panic!("no heartbeat in {:?}", client.commands),
    }
}

fn alive(epoch: &str, revoked: &str, accepted: Vec<u64>) -> HeartbeatReply {
    HeartbeatReply::Alive {
        epoch: epoch.into(),
        revoked: revoked.into(),
        accepted,
    }
}

/// Connects at `now`; the server knows all that is claimed.
fn connect(client: &mut Client, now: Micros) -> Heartbeat {
    client.connected(now);
    let sent = heartbeat(client);
    let accepted = sent.claims.iter().map(|(_, fence)| *fence).collect();
    client.on_heartbeat(now, &sent, alive("e", "", accepted));
    client.events.clear();
    sent
}

fn open() -> Client {
    let mut client = Client::new("s".into(), 1, 5 * SECOND);
    connect(&mut client, SECOND);
    client
}

fn granted(client: &mut Client, now: Micros, fence: u64, ask: Ask) -> Arc<Lease> {
    let id = client.acquire(now, ask, 1);
    let stamp = client.session.clock.confirmed();
    client.on_acquire(
        now,
        id,
        AcquireReply::Granted {
            fence,
            stamp,
            claimed: true,
        },
    );
    client.commands.clear();
    match client.events.pop() {
        Some(Event::Granted(1, lease)) => lease,
        other => panic!("not granted: {other:?}"),
    }
}

#[test]
fn a_fixed_lease_keeps_its_deadline_over_claims_and_connections() {
    let mut client = open();
    let lease = granted(&mut client, SECOND, 7, ask("a", 10 * SECOND, true));
    let end = 11 * SECOND - drift(10 * SECOND);
    assert_eq!(lease.valid_until(), end);
    client.disconnected(3 * SECOND, "cut".into());
    let resumed = connect(&mut client, 4 * SECOND);
    assert_eq!((resumed.mode, resumed.claims.len()), (Mode::Resume, 1));
    assert_eq!(lease.valid_until(), end);
    client.tick(end);
    assert!(matches!(client.events[..], [Event::Lost(_)]));
}

#[test]
fn a_resumed_session_extends_only_leases_that_it_names() {
    let mut client = open();
    let lease = granted(&mut client, SECOND, 7, ask("a", 10 * SECOND, false));
    client.disconnected(2 * SECOND, "cut".into());
    client.connected(4 * SECOND);
    let sent = heartbeat(&mut client);
    // A server that lost its last writes does not know the lease.
    client.on_heartbeat(4 * SECOND, &sent, alive("e", "", Vec::new()));
    assert!(!lease.held_at(4 * SECOND));
    assert!(matches!(client.events[0], Event::Lost(_)));
    assert_eq!(client.held(), 0);
}

#[test]
fn an_answer_to_an_extension_is_believed_no_longer_than_a_later_one_allows() {
    let mut client = open();
    let lease = granted(&mut client, SECOND, 7, ask("a", 10 * SECOND, false));
    assert!(client.extend(SECOND, &lease, 30 * SECOND, 2));
    assert!(client.extend(SECOND, &lease, 12 * SECOND, 3));
    let ids: Vec<u64> = client
        .commands
        .iter()
        .filter_map(|command| match command {
            Command::Extend(id) => Some(*id),
            _ => None,
        })
        .collect();
    client.on_extend(ids[0], Some(SECOND));
    assert_eq!(lease.timeout(), 12 * SECOND);
    client.on_extend(ids[1], Some(SECOND));
    assert_eq!(lease.timeout(), 12 * SECOND);
}

#[test]
fn a_shorter_extension_counts_from_the_call() {
    let mut client = open();
    let lease = granted(&mut client, SECOND, 7, ask("a", 10 * SECOND, false));
    assert!(client.extend(SECOND, &lease, 2 * SECOND, 2));
    assert_eq!(lease.valid_until(), 3 * SECOND - drift(2 * SECOND));
    // Without an answer the call fails, and the lease stays short.
    client.tick(SECOND);
    client.tick(2 * SECOND);
    assert_eq!(lease.timeout(), 2 * SECOND);
}

#[test]
fn a_grant_that_comes_too_late_leaves_nothing_behind() {
    let mut client = open();
    let id = client.acquire(SECOND, ask("a", 10 * SECOND, false), 1);
    client.on_acquire(SECOND, id, AcquireReply::Waiting);
    client.commands.clear();
    let now = SECOND + CLAIM_WINDOW;
    let sid = client.session.sid();
    client.on_grant(now, &sid, id, 7, SECOND);
    let (cancels, asks): (Vec<_>, Vec<_>) = client
        .commands
        .iter()
        .filter(|command| !matches!(command, Command::Heartbeat(_)))
        .partition(|command| matches!(command, Command::Cancel { request, .. } if *request == id));
    assert_eq!((cancels.len(), asks), (1, vec![&Command::Acquire(id + 1)]));
    assert!(client.events.is_empty(), "the wait goes on");
}

#[test]
fn a_dropped_place_is_asked_for_again_under_a_new_number() {
    let mut client = open();
    let id = client.acquire(SECOND, ask("a", 10 * SECOND, false), 1);
    client.on_acquire(SECOND, id, AcquireReply::Waiting);
    client.commands.clear();
    for _ in 0..2 {
        // Pushed, and named again by the next heartbeat's answer.
        client.on_revoked(id, "dropped");
    }
    assert!(client.request(id).is_none() && client.request(id + 1).is_some());
    assert_eq!(
        client.commands.last(),
        Some(&Command::Acquire(id + 1)),
        "{:?}",
        client.commands
    );
    assert_eq!(client.commands.len(), 2);
}

#[test]
fn a_refused_release_is_told_and_sent_again() {
    let mut client = open();
    let lease = granted(&mut client, SECOND, 7, ask("a", 10 * SECOND, false));
    assert!(client.release(SECOND, &lease, Some(2)));
    let command = client.commands.remove(0);
    client.on_refused(&command, "busy");
    assert!(matches!(
        client.events[..],
        [Event::Failed(2, Failure::Refused(_))]
    ));
    let again = client.next_tick();
    assert!(again <= 2 * SECOND);
    client.tick(again.max(SECOND));
    assert!(client.commands.contains(&command));
    client.on_release(7, true);
    assert_eq!(client.unanswered(), 0);
}

#[test]
fn a_pipeline_under_a_lost_session_opens_one_new_session() {
    let mut client = open();
    let ids: Vec<u64> = (0..50)
        .map(|i| client.acquire(SECOND, ask(&format!("{i}"), 10 * SECOND, false), i))
        .collect();
    client.commands.clear();
    for id in ids {
        client.on_acquire(2 * SECOND, id, AcquireReply::NoSession);
    }
    let opening = heartbeat(&mut client);
    assert_eq!((opening.mode, opening.sid.as_str()), (Mode::Open, "s.1"));
    assert!(client.commands.is_empty());
    client.on_heartbeat(2 * SECOND, &opening, alive("e", "", Vec::new()));
    assert_eq!(client.commands.len(), 50);
}

#[test]
fn another_epoch_ends_the_session_and_asks_again() {
    let mut client = open();
    let lease = granted(&mut client, SECOND, 7, ask("a", 10 * SECOND, false));
    client.acquire(SECOND, ask("b", 10 * SECOND, false), 2);
    client.commands.clear();
    client.tick(2 * SECOND);
    let sent = heartbeat(&mut client);
    client.on_heartbeat(2 * SECOND, &sent, alive("f", "", Vec::new()));
    assert!(!lease.held_at(2 * SECOND));
    let opening = heartbeat(&mut client);
    assert_eq!(opening.mode, Mode::Open);
    client.on_heartbeat(2 * SECOND, &opening, alive("f", "", Vec::new()));
    assert!(matches!(client.commands[..], [Command::Acquire(_)]));
}

#[test]
fn a_lease_whose_end_has_passed_is_not_revived_by_a_late_answer() {
    let mut client = open();
    let lease = granted(&mut client, SECOND, 7, ask("a", SECOND, false));
    client.tick(SECOND + SECOND / 2);
    let sent = heartbeat(&mut client);
    client.on_heartbeat(2 * SECOND, &sent, alive("e", "", Vec::new()));
    assert!(!lease.held_at(2 * SECOND));
    assert!(matches!(client.events[..], [Event::Lost(_)]));
}

#[test]
fn requests_never_sent_need_no_cancellation() {
    let mut client = open();
    client.disconnected(SECOND, "cut".into());
    for i in 0..100 {
        let id = client.acquire(SECOND, ask("a", SECOND, false), i);
        client.cancel(id);
    }
    assert_eq!((client.unanswered(), client.events.len()), (0, 100));
}

#[test]
fn grants_of_one_batch_are_claimed_by_one_heartbeat() {
    let mut client = open();
    let ids: Vec<u64> = (0..100)
        .map(|i| client.acquire(SECOND, ask(&format!("{i}"), 10 * SECOND, false), i))
        .collect();
    client.commands.clear();
    let sid = client.session.sid();
    for (fence, id) in (1..).zip(ids) {
        client.on_grant(SECOND, &sid, id, fence, SECOND);
    }
    client.tick(client.next_tick());
    assert_eq!(heartbeat(&mut client).claims.len(), 100);
    assert!(client.commands.is_empty());
}

#[test]
fn time_advances_between_ticks_with_a_thousand_lengths() {
    let mut client = open();
    let leases: Vec<_> = (1..=1_000)
        .map(|i| {
            granted(
                &mut client,
                SECOND,
                i,
                ask("a", SECOND + i * 7_000, i % 3 == 0),
            )
        })
        .collect();
    let (mut now, mut ticks) = (SECOND, 0);
    while client.held() > 0 {
        let next = client.next_tick();
        assert!(next > now || ticks == 0, "tick {ticks}");
        now = next.max(now);
        client.tick(now);
        client.commands.clear();
        ticks += 1;
    }
    assert!(ticks < 2_500, "{ticks} ticks");
    assert!(leases.iter().all(|lease| lease.loss().is_some()));
    assert_eq!(client.session.interval(), SECOND);
}
