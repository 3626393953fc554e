//! A node with the engine's serving loop, a socket that takes few bytes at once, and a server that answers everything.

use crate::driver::{self, Turn, digest};
use crate::greeting::End;
use crate::node::{Node, State};
use crate::ring::{Parker, Sink};
use crate::scripts::{COUNT, Script};
use crate::sync::doubles::Socket;
use crate::sync::{Mutex, MutexGuard};
use crate::transport::{Direct, Target};
use crate::{Outcome, Settings, clock};
use bytes::BytesMut;
use dotmac_core::lease::Micros;
use dotmac_core::locks::Ask;
use shuttle::thread::{self, JoinHandle};
use std::fmt::Write as _;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

pub const SECOND: Micros = 1_000_000;
pub const START: Micros = 1_000 * SECOND;
/// A lock that somebody else holds.
pub const BUSY: &str = "busy";
/// Another one, of which the server does not say so at once.
pub const SLOW: &str = "slow";

pub type Settle = fn(&Node, MutexGuard<'_, State>, bool) -> bool;

/// Who may write to the socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Writing {
    /// Any thread, as much as the socket takes at once.
    Callers(usize),
    /// Only the engine, as with TLS.
    Engine,
}

pub struct World {
    pub node: Arc<Node>,
    /// Bytes from the server, and whether it has hung up.
    inbound: Arc<Mutex<(BytesMut, bool)>>,
    socket: Arc<Socket>,
    writing: Writing,
    time: Arc<Mutex<Micros>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl World {
    /// Connected, with the session's opening on its way.
    pub fn new(writing: Writing) -> Arc<Self> {
        clock::pretend(START);
        let node = Arc::new(Node::new(
            &Settings {
                target: Target {
                    request_timeout: 5 * SECOND,
                    ..Target::default()
                },
                namespace: String::from("test"),
                session: String::from("s"),
                who: String::new(),
                chance: 1,
            },
            0,
        ));
        let capacity = match writing {
            Writing::Callers(capacity) => capacity,
            Writing::Engine => usize::MAX,
        };
        let socket = Arc::new(Socket::new(capacity));
        let direct = (writing != Writing::Engine).then(|| Direct::Double(socket.clone()));
        let hashes = (0..COUNT).map(|i| i.to_string().into()).collect();
        node.lock().connected(direct, hashes, String::from("run"));
        Arc::new(Self {
            node,
            inbound: Arc::default(),
            socket,
            writing,
            time: Arc::new(Mutex::new(START)),
        })
    }

    /// The serving loop, as the driver runs it, with these waits in the place of tokio's.
    fn engine(self: &Arc<Self>) -> JoinHandle<()> {
        let this = self.clone();
        thread::spawn(move || {
            let mut unsent = BytesMut::new();
            let end = loop {
                let Turn { next, blocked } =
                    match driver::turn(&this.node, this.writing != Writing::Engine, &mut unsent) {
                        Ok(turn) => turn,
                        Err(end) => break end,
                    };
                if !unsent.is_empty() {
                    assert!(this.socket.try_write(&unsent).is_ok());
                    unsent.clear();
                    continue;
                }
                this.node.notify.wait(|| {
                    !lock(&this.inbound).0.is_empty()
                        || *lock(&this.time) >= next
                        || (blocked && this.socket.writable())
                });
                let mut buffer = std::mem::take(&mut lock(&this.inbound).0);
                assert!(digest(&this.node, &mut buffer).is_ok());
                assert!(buffer.is_empty());
            };
            assert_eq!(end, End::Closed);
            this.node.lock().disconnected("closed");
            driver::signal(&this.node);
            this.socket.close();
        })
    }

    /// A server that answers every command, those for [`SLOW`] with the next one, and lets those wait who ask for
    /// [`BUSY`] or [`SLOW`].
    fn server(self: &Arc<Self>) -> JoinHandle<()> {
        let this = self.clone();
        thread::spawn(move || {
            let (mut came, mut fence, mut late) = (Vec::new(), 0, String::new());
            while let Some(bytes) = this.socket.read() {
                // There is room again.
                this.node.notify.stir();
                came.extend(bytes);
                let mut answers = String::new();
                while let Some((command, length)) = command(&came) {
                    came.drain(..length);
                    if command.iter().any(|arg| arg == SLOW) && late.is_empty() {
                        answer(&command, &mut fence, &mut late);
                        continue;
                    }
                    answers.push_str(&std::mem::take(&mut late));
                    answer(&command, &mut fence, &mut answers);
                }
                if !answers.is_empty() {
                    lock(&this.inbound).0.extend_from_slice(answers.as_bytes());
                    this.node.notify.stir();
                }
            }
        })
    }

    /// The threads of the engine and of the server, once somebody waits for a lock and the engine has nothing to do: so
    /// nobody has to wake it who does not have to.
    pub fn start(self: &Arc<Self>) -> [JoinHandle<()>; 2] {
        let threads = [self.engine(), self.server()];
        let mut state = self.node.lock();
        state.acquire(ask(BUSY, None), Sink::Nobody);
        self.node.settle(state, true);
        while !self.settled() {
            thread::yield_now();
        }
        threads
    }

    fn settled(&self) -> bool {
        let state = self.node.lock();
        state.open() && state.idle() && self.node.notify.idle()
    }

    /// Ends the engine, and the threads with it.
    pub fn close(&self, threads: [JoinHandle<()>; 2]) {
        let mut state = self.node.lock();
        state.close();
        self.node.settle(state, true);
        self.node.notify.notify_one();
        for thread in threads {
            assert!(thread.join().is_ok());
        }
    }

    /// Time passes.
    pub fn pass(&self, by: Micros) {
        let mut time = lock(&self.time);
        *time += by;
        clock::pretend(*time);
        drop(time);
        self.node.notify.stir();
    }

    /// A blocked thread's call.
    pub fn call(&self, settle: Settle, submit: impl FnOnce(&mut State, Sink)) -> Outcome {
        let parker = Arc::new(Parker::default());
        let mut state = self.node.lock();
        submit(&mut state, Sink::Parker(parker.clone()));
        settle(&self.node, state, true);
        match parker.wait(Duration::MAX) {
            Some(outcome) => outcome,
            None => panic!("woken without a result"),
        }
    }

    /// Nothing that the socket would take is left unsent.
    pub fn assert_sent(&self) {
        let state = self.node.lock();
        let endless = self.writing == Writing::Callers(usize::MAX);
        assert!(!endless || !state.has_out(), "something is left unsent");
    }
}

/// A lock of this name.
pub fn ask(name: &str, patience: Option<Micros>) -> Ask {
    Ask {
        name: name.into(),
        owner: name.into(),
        // Not longer than what the session was opened for, or a heartbeat goes ahead, whose answer wakes the engine.
        timeout: 10 * SECOND,
        fixed: false,
        wait: true,
        patience,
        ..Ask::default()
    }
}

/// The first whole command and its length.
fn command(bytes: &[u8]) -> Option<(Vec<String>, usize)> {
    let mut at = 0;
    let mut line = |kind: u8| -> Option<usize> {
        let end = at + bytes.get(at..)?.windows(2).position(|w| w == b"\r\n")?;
        assert_eq!(bytes[at], kind);
        let number = std::str::from_utf8(&bytes[at + 1..end])
            .ok()?
            .parse()
            .ok()?;
        at = end + 2;
        if kind == b'$' {
            bytes.get(at..at + number + 2)?;
            at += number + 2;
        }
        Some(number)
    };
    let count = line(b'*')?;
    let mut ends = Vec::new();
    for _ in 0..count {
        let length = line(b'$')?;
        ends.push(length);
    }
    let mut args = Vec::new();
    let mut rest = bytes;
    let skip = |rest: &mut &[u8]| {
        let end = rest.windows(2).position(|w| w == b"\r\n").unwrap_or(0);
        *rest = &rest[end + 2..];
    };
    skip(&mut rest);
    for length in ends {
        skip(&mut rest);
        args.push(String::from_utf8_lossy(&rest[..length]).into_owned());
        rest = &rest[length + 2..];
    }
    Some((args, at))
}

/// Scripts are called by their number here.
fn answer(command: &[String], fence: &mut u64, answers: &mut String) {
    if command[0] != "EVALSHA" {
        // A subscription is confirmed by a push, which nothing waits for.
        return;
    }
    let stamp = clock::now();
    let script: usize = command[1].parse().unwrap_or(COUNT);
    let _ = if script == Script::Heartbeat as usize {
        write!(
            answers,
            "*7\r\n:1\r\n$1\r\ne\r\n${}\r\n{stamp}\r\n$0\r\n\r\n:-1\r\n:0\r\n:0\r\n",
            stamp.to_string().len()
        )
    } else if script == Script::Acquire as usize
        && command.iter().any(|arg| arg == BUSY || arg == SLOW)
    {
        write!(answers, "*4\r\n:2\r\n:-1\r\n$1\r\n1\r\n:0\r\n")
    } else if script == Script::Acquire as usize {
        *fence += 1;
        write!(answers, "*3\r\n:1\r\n:{fence}\r\n:{stamp}\r\n")
    } else {
        write!(answers, ":1\r\n")
    };
}
