//! What a schedule is made of.

use super::process::Wish;
use proptest::prelude::*;

/// What happens next in a schedule. Clients, locks and numbers wrap around.
#[derive(Debug, Clone)]
pub enum Step {
    Acquire(usize, Wish),
    Release(usize, usize),
    Cancel(usize, usize),
    Extend(usize, usize, u64),
    /// The process stands still for so many milliseconds.
    Pause(usize, u64),
    PauseServer(u64),
    /// The server's wall clock jumps by so many tens of seconds.
    MoveClock(i8),
    /// The connection is lost.
    Cut(usize),
    /// The process is killed, and another takes its place.
    Kill(usize),
    /// The server comes back without its data.
    Restart,
    /// The data is gone, the connections stay.
    Flush,
    /// The server answers the client's next commands with errors.
    Refuse(usize, u8),
    /// The server forgets the scripts.
    ForgetScripts,
}

const LOCKS: usize = 3;
pub const CLIENTS: usize = 4;

/// What may go wrong with the server's data and its wall clock.
#[derive(Debug, Clone, Copy)]
pub enum Server {
    /// The clock steps back and forth, the data stays.
    Keeps,
    /// The data is lost; the clock only steps forward: a newcomer, who may be granted something first, has heard of no
    /// token.
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
        (0..LOCKS, 0..3usize),
        timeout.clone(),
        prop::bool::weighted(0.25),
        prop::bool::weighted(0.85),
        patience,
        (
            any::<bool>(),
            prop_oneof![8 => Just(0), 1 => Just(-5), 1 => Just(9)],
        ),
    )
        .prop_map(
            |(client, (lock, owner), timeout, fixed, wait, patience, (shared, priority))| {
                let wish = Wish {
                    lock,
                    timeout,
                    fixed,
                    wait,
                    patience,
                    owner,
                    shared,
                    priority,
                };
                Step::Acquire(client, wish)
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
        2 => client.clone().prop_map(Step::Kill),
        2 => (client.clone(), 1..4u8).prop_map(|(i, n)| Step::Refuse(i, n)),
        1 => Just(Step::ForgetScripts),
        2 => (client, any::<bool>()).prop_map(move |(i, restart)| match (keeps, restart) {
            (true, _) => Step::Cut(i),
            (false, true) => Step::Restart,
            (false, false) => Step::Flush,
        }),
    ]
}

/// Steps, each with the milliseconds before it, and the seed of all delays.
#[derive(Clone)]
pub struct Schedule {
    pub seed: u64,
    pub steps: Vec<(u64, Step)>,
}

/// One step per line, as it would be written in a test.
impl std::fmt::Debug for Schedule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "seed {}, after so many milliseconds each:", self.seed)?;
        self.steps
            .iter()
            .try_for_each(|(wait, step)| writeln!(f, "    ({wait}, {step:?}),"))
    }
}

pub fn schedule(server: Server) -> impl Strategy<Value = Schedule> {
    let wait = prop_oneof![4 => 0..20u64, 3 => 20..400u64, 1 => 400..3_000u64];
    let steps = prop::collection::vec((wait, any_step(server)), 1..120);
    (any::<u64>(), steps).prop_map(|(seed, steps)| Schedule { seed, steps })
}
