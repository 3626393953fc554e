//! The lock client by itself, one answer at a time.
//!
//! Promises proved here, each in the smallest conversation that could break it: fixed leases end at their deadline,
//! extensions are believed only as far as all that is on its way allows, stale grants leave nothing behind, refused
//! releases are sent again, a lost session is renewed once, and what ended takes up no memory.

use dotmac_core::lease::{CLAIM_WINDOW, Lease, LossReason, Micros, drift};
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
        ..Ask::default()
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

fn waiting() -> AcquireReply {
    AcquireReply::Waiting {
        rest: Some(9 * SECOND),
        rank: String::from("50001"),
        place: 1,
    }
}

fn alive(epoch: &str, revoked: &str, accepted: Vec<u64>) -> HeartbeatReply {
    HeartbeatReply::Alive {
        epoch: epoch.into(),
        revoked: revoked.into(),
        accepted,
        due: None,
        taking_back: false,
        last_number: 0,
    }
}

/// Connects at `now`; the server knows all that is claimed.
fn connect(client: &mut Client, now: Micros) -> Heartbeat {
    client.connected(now, false);
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
    client.connected(4 * SECOND, false);
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
fn an_extension_shorter_than_the_last_heartbeat_is_old_ends_nothing() {
    let mut client = open();
    let lease = granted(&mut client, SECOND, 7, ask("a", 10 * SECOND, false));
    let now = SECOND * 9 / 5;
    assert!(client.extend(now, &lease, SECOND / 2, 2));
    // A heartbeat goes ahead, and the server counts from there.
    let sent = heartbeat(&mut client);
    assert_eq!(sent.stamp, now);
    assert_eq!(lease.valid_until(), now + SECOND / 2 - drift(SECOND / 2));
    client.tick(now);
    assert!(client.events.is_empty(), "{:?}", client.events);
}

#[test]
fn a_shorter_extension_is_not_believed_for_longer_than_what_it_shortens() {
    let mut client = open();
    let lease = granted(&mut client, SECOND, 7, ask("a", 10 * SECOND, false));
    let before = lease.valid_until();
    assert!(client.extend(9 * SECOND, &lease, 9 * SECOND, 2));
    assert_eq!(lease.valid_until(), before);
    client.disconnected(9 * SECOND, "cut".into());
    assert!(client.extend(9 * SECOND, &lease, 8 * SECOND, 3));
    assert_eq!(lease.valid_until(), before);
}

#[test]
fn a_grant_that_comes_too_late_leaves_nothing_behind() {
    let mut client = open();
    let id = client.acquire(SECOND, ask("a", 10 * SECOND, false), 1);
    client.on_acquire(SECOND, id, waiting());
    client.commands.clear();
    let now = SECOND + CLAIM_WINDOW;
    let sid = client.session.sid();
    client.on_grant(now, ("a", &sid), id, 7, SECOND);
    let (cancels, asks): (Vec<_>, Vec<_>) = client
        .commands
        .iter()
        .filter(|command| !matches!(command, Command::Heartbeat(_)))
        .partition(|command| matches!(command, Command::Cancel { request, .. } if *request == id));
    assert_eq!((cancels.len(), asks), (1, vec![&Command::Acquire(id + 1)]));
    assert!(client.events.is_empty(), "the wait goes on");
}

/// What a server grants that took over without the last writes, from a queue in which nobody of ours waits any more.
#[test]
fn a_grant_that_nobody_waits_for_is_given_back() {
    let mut client = open();
    let lease = granted(&mut client, SECOND, 5, ask("a", 10 * SECOND, false));
    let id = client.acquire(SECOND, ask("b", 10 * SECOND, false), 1);
    client.on_acquire(SECOND, id, waiting());
    client.cancel(id);
    let sid = client.session.sid();
    client.commands.clear();
    client.on_grant(SECOND, ("b", &sid), id, 6, SECOND);
    assert!(client.commands.is_empty(), "its cancellation is on its way");
    client.on_cancel(id);
    client.on_grant(SECOND, ("b", &sid), id, 7, SECOND);
    let cancel = Command::Cancel {
        request: id,
        sid: sid.as_str().into(),
        name: "b".into(),
    };
    assert_eq!(client.commands, [cancel]);
    client.on_cancel(id);
    client.commands.clear();
    client.on_grant(SECOND, ("a", &sid), lease.id, 5, SECOND);
    assert!(client.commands.is_empty(), "that one is held");
    client.on_grant(SECOND, ("a", &sid), lease.id, 8, SECOND);
    let release = Command::Release {
        name: "a".into(),
        fence: 8,
    };
    assert_eq!(client.commands, [release]);
    client.on_release(SECOND, 8, true);
    assert!(lease.held_at(2 * SECOND));
    assert!(client.release(2 * SECOND, &lease, None));
    client.commands.clear();
    client.on_grant(SECOND, ("a", &sid), lease.id, 5, SECOND);
    assert!(client.commands.is_empty(), "its release is on its way");
}

#[test]
fn a_dropped_place_is_asked_for_again_under_a_new_number() {
    let mut client = open();
    let id = client.acquire(SECOND, ask("a", 10 * SECOND, false), 1);
    client.on_acquire(SECOND, id, waiting());
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
fn a_request_that_overtook_its_own_release_is_asked_again() {
    for refusal in [
        AcquireReply::NotFree(9 * SECOND),
        AcquireReply::Deadlock(Vec::new()),
    ] {
        let mut client = open();
        let lease = granted(&mut client, SECOND, 7, ask("a", 10 * SECOND, false));
        assert!(client.release(SECOND, &lease, Some(2)));
        let id = client.acquire(SECOND, ask("a", 10 * SECOND, false), 3);
        client.commands.clear();
        // The scripts were flushed after the release was sent, and somebody brought the other one back.
        client.on_release_unknown(7);
        assert!(matches!(
            &client.commands[..],
            [Command::Release { fence: 7, .. }]
        ));
        client.on_acquire(SECOND, id, refusal.clone());
        assert!(matches!(client.commands.last(), Some(Command::Acquire(again)) if *again == id));
        client.on_release(SECOND, 7, true);
        client.on_acquire(SECOND, id, refusal);
        assert!(matches!(
            client.events.last(),
            Some(Event::NotFree(3, _) | Event::Deadlock(3, _))
        ));
    }
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
    client.on_release(SECOND, 7, true);
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

/// A client with one lease and one place in a queue that has found out that the server lost its data.
fn bereft() -> (Client, Arc<Lease>, Heartbeat) {
    let mut client = open();
    let lease = granted(&mut client, SECOND, 7, ask("a", 10 * SECOND, false));
    let id = client.acquire(SECOND, ask("b", 10 * SECOND, false), 2);
    client.on_acquire(SECOND, id, waiting());
    client.commands.clear();
    client.tick(2 * SECOND);
    let sent = heartbeat(&mut client);
    client.on_heartbeat(2 * SECOND, &sent, alive("f", "", Vec::new()));
    let opening = heartbeat(&mut client);
    (client, lease, opening)
}

#[test]
fn what_a_server_has_lost_is_taken_back_under_a_new_session() {
    let (mut client, lease, opening) = bereft();
    assert!(lease.held_at(2 * SECOND), "until its own deadline");
    assert_eq!(
        (opening.mode, opening.knew.clone()),
        (Mode::Open, Some((String::from("e"), 7)))
    );
    let mut reply = alive("f", "", Vec::new());
    if let HeartbeatReply::Alive { taking_back, .. } = &mut reply {
        *taking_back = true;
    }
    client.on_heartbeat(3 * SECOND, &opening, reply);
    let [Command::Assert(ids), Command::Acquire(again)] = &client.commands[..] else {
        panic!("{:?}", client.commands);
    };
    let (ids, again) = (ids.clone(), *again);
    assert_eq!(
        client
            .request(again)
            .and_then(|r| r.rank.clone())
            .as_deref(),
        Some("50001")
    );
    // Heartbeats extend it only after the server has said that it knows it.
    client.tick(4 * SECOND);
    let sent = heartbeat(&mut client);
    client.on_heartbeat(4 * SECOND, &sent, alive("f", "", Vec::new()));
    assert_eq!(
        lease.valid_until(),
        SECOND + 10 * SECOND - drift(10 * SECOND)
    );
    client.on_assert(4 * SECOND, &ids, Some(&[7]));
    assert_eq!(
        lease.valid_until(),
        4 * SECOND + 10 * SECOND - drift(10 * SECOND)
    );
    assert!(
        client
            .events
            .iter()
            .all(|event| !matches!(event, Event::Lost(_)))
    );
}

#[test]
fn what_another_holds_by_then_or_comes_too_late_is_lost() {
    let (mut client, lease, opening) = bereft();
    client.on_heartbeat(3 * SECOND, &opening, alive("f", "", Vec::new()));
    assert!(!lease.held_at(3 * SECOND), "nothing is taken back any more");
    let (mut client, lease, opening) = bereft();
    let mut reply = alive("f", "", Vec::new());
    if let HeartbeatReply::Alive { taking_back, .. } = &mut reply {
        *taking_back = true;
    }
    client.on_heartbeat(3 * SECOND, &opening, reply);
    client.on_assert(3 * SECOND, &[lease.id], Some(&[]));
    assert!(!lease.held_at(3 * SECOND));
    assert!(
        client
            .events
            .iter()
            .any(|event| matches!(event, Event::Lost(_)))
    );
}

#[test]
fn a_release_that_finds_the_data_lost_is_no_loss() {
    for lost in [false, true] {
        let mut client = open();
        let lease = granted(&mut client, SECOND, 7, ask("a", 10 * SECOND, false));
        assert!(client.release(SECOND, &lease, Some(2)));
        client.commands.clear();
        client.on_release(SECOND, 7, false);
        assert!(client.events.is_empty(), "it is not known why yet");
        client.tick(SECOND + 1);
        let sent = heartbeat(&mut client);
        client.on_heartbeat(
            SECOND + 1,
            &sent,
            alive(if lost { "f" } else { "e" }, "", Vec::new()),
        );
        assert!(matches!(client.events[..], [Event::Released(2, held)] if held == lost));
        assert_eq!(client.unanswered(), 0);
    }
}

#[test]
fn nor_is_one_that_the_loss_of_the_data_overtakes() {
    let mut client = open();
    let lease = granted(&mut client, SECOND, 7, ask("a", 10 * SECOND, false));
    let id = client.acquire(SECOND, ask("b", 10 * SECOND, false), 1);
    assert!(client.release(SECOND, &lease, Some(2)));
    client.on_acquire(SECOND, id, AcquireReply::NoSession);
    client.on_release(SECOND, 7, false);
    assert!(matches!(client.events[..], [Event::Released(2, true)]));
}

#[test]
fn nor_is_one_between_the_loss_and_the_next_session() {
    let (mut client, lease, opening) = bereft();
    assert!(client.release(2 * SECOND, &lease, Some(9)));
    client.on_heartbeat(3 * SECOND, &opening, alive("f", "", Vec::new()));
    client.on_release(3 * SECOND, 7, false);
    assert!(matches!(
        client.events.last(),
        Some(Event::Released(9, true))
    ));
}

#[test]
fn whoever_closes_a_cycle_may_end_the_wait_of_another() {
    let mut client = open();
    let id = client.acquire(SECOND, ask("a", 10 * SECOND, false), 1);
    client.on_acquire(SECOND, id, waiting());
    for _ in 0..2 {
        client.on_revoked(id, "deadlock:a%2cb%00,me,{},x%20y,you,z");
    }
    let [Event::Deadlock(1, cycle)] = &client.events[..] else {
        panic!("{:?}", client.events);
    };
    assert_eq!(cycle[..], ["a,b\0", "me", "{}", "x y", "you", "z"]);
    assert_eq!(
        client.unanswered(),
        0,
        "the server has taken the place away"
    );
}

#[test]
fn a_lease_ends_when_it_was_held_for_as_long_as_its_holder_allows() {
    let mut client = open();
    let limited = Ask {
        max_hold: Some(3 * SECOND),
        ..ask("a", 10 * SECOND, false)
    };
    let lease = granted(&mut client, SECOND, 7, limited);
    assert!(client.next_tick() <= 4 * SECOND);
    client.tick(4 * SECOND - 1);
    assert!(lease.held_at(4 * SECOND - 1));
    client.tick(4 * SECOND);
    assert!(matches!(client.events[..], [Event::Lost(_)]));
    assert_eq!(lease.loss(), Some(LossReason::HeldTooLong));
    assert!(
        client
            .commands
            .iter()
            .any(|c| matches!(c, Command::Release { fence: 7, .. }))
    );
}

#[test]
fn while_a_loop_stands_still_nothing_is_renewed_or_granted() {
    let mut client = open();
    let lease = granted(&mut client, SECOND, 7, ask("a", 4 * SECOND, false));
    client.stall(SECOND, true);
    for now in 1..=5 {
        client.tick(now * SECOND);
        assert!(
            !client
                .commands
                .iter()
                .any(|c| matches!(c, Command::Heartbeat(_)))
        );
    }
    assert!(!lease.held_at(5 * SECOND));
    client.events.clear();
    client.acquire(5 * SECOND, ask("a", SECOND, false), 9);
    assert!(matches!(
        client.events[..],
        [Event::Failed(9, Failure::Stalled)]
    ));
    client.stall(6 * SECOND, false);
    client.tick(6 * SECOND);
    heartbeat(&mut client);
}

#[test]
fn what_an_older_server_thinks_is_held_is_given_back() {
    let mut client = open();
    let lease = granted(&mut client, SECOND, 7, ask("a", 10 * SECOND, false));
    client.disconnected(2 * SECOND, "failover".into());
    client.connected(3 * SECOND, true);
    let sent = heartbeat(&mut client);
    client.on_heartbeat(3 * SECOND, &sent, alive("e", "", vec![7]));
    assert_eq!(client.commands[..], [Command::Mine(0)]);
    client.commands.clear();
    client.on_mine(3 * SECOND, 42, vec![("a".into(), 7), ("b".into(), 6)]);
    assert_eq!(
        client.commands[..],
        [
            Command::Release {
                name: "b".into(),
                fence: 6
            },
            Command::Mine(42)
        ]
    );
    client.on_release(3 * SECOND, 6, true);
    client.on_mine(3 * SECOND, 0, Vec::new());
    assert!(lease.held_at(3 * SECOND));
    assert_eq!(client.unanswered(), 0);
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
        client.on_grant(SECOND, ("", &sid), id, fence, SECOND);
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

#[test]
fn a_request_made_after_a_refusal_is_refused_too_until_the_server_lets_us_in() {
    let mut client = Client::new("s".into(), 1, SECOND);
    client.connected(SECOND, false);
    client.disconnected(SECOND, "WRONGPASS".into());
    client.denied("WRONGPASS");
    client.acquire(SECOND, ask("a", 10 * SECOND, false), 1);
    client.tick(3 * SECOND);
    assert!(
        matches!(&client.events[..], [Event::Failed(1, Failure::Denied(why))] if why == "WRONGPASS"),
        "{:?}",
        client.events
    );
    client.connected(4 * SECOND, false);
    assert_eq!(client.absence(), Failure::Unavailable("WRONGPASS".into()));
}

#[test]
fn what_is_asked_for_while_a_session_opens_is_announced_first() {
    let mut client = Client::new("s".into(), 1, 5 * SECOND);
    client.connected(SECOND, false);
    let opening = heartbeat(&mut client);
    let id = client.acquire(SECOND, ask("a", 30 * SECOND, false), 1);
    assert!(client.commands.is_empty());
    client.on_heartbeat(SECOND, &opening, alive("e", "", Vec::new()));
    let [Command::Heartbeat(kept), Command::Acquire(asked)] = &client.commands[..] else {
        panic!("{:?}", client.commands);
    };
    assert!(opening.longest < 30 * SECOND && kept.longest >= 30 * SECOND);
    assert_eq!(*asked, id);
}
