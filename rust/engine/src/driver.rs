//! The engine thread's work for one partition: connect, shake hands, read, keep time, connect again.

use crate::clock;
use crate::frame::next_frame;
use crate::greeting::{Connection, End, hello, is_denial, unfit};
use crate::guide::Guide;
use crate::node::Node;
use crate::scripts::{self, SCRIPTS};
use crate::sentinels::Primary;
use crate::transport::{Direct, Target, Writer};
use crate::wire::{self, Value};
use bytes::{Bytes, BytesMut};
use dotmac_core::lease::Micros;
use std::future::Future;
use std::pin::pin;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::time::{Instant, sleep, timeout_at};

const FIRST_BACKOFF: Duration = Duration::from_millis(20);
const LAST_BACKOFF: Duration = Duration::from_secs(2);
/// Whoever holds something is back before a server that has just started, perhaps without its data, grants it to others.
const HOLDER_BACKOFF: Duration = Duration::from_millis(300);
const DENIED_BACKOFF: Duration = Duration::from_secs(2);
/// Field of partition 0's record in which the number of partitions is kept.
const PARTITIONS: &[u8] = b"partitions";
/// Where a slot is just changing its server, and so will be served in a moment.
const PASSING_BACKOFF: Duration = Duration::from_millis(150);
const READ_BUFFER: usize = 16 * 1024;

/// Runs until the node is closed.
pub async fn run(node: &Node, mut guide: Guide) {
    let mut backoff = FIRST_BACKOFF;
    // A request that is made just after the server is back must not wait out its own time for the next attempt.
    let longest =
        Duration::from_micros(node.target.request_timeout / 4).clamp(FIRST_BACKOFF, LAST_BACKOFF);
    loop {
        let (end, primary) = match with_ticks(node, open(node, &mut guide)).await {
            None => (End::Closed, None),
            Some(Err(end)) => (end, None),
            Some(Ok((connection, primary))) => {
                let end = tokio::select! {
                    biased;
                    end = serve(node, connection) => end,
                    why = guide.switched(primary.as_ref()) => End::Lost(why),
                };
                // A server that lets us in and then refuses to serve us is not to be hammered either.
                if node.lock().open() {
                    backoff = FIRST_BACKOFF;
                }
                match &primary {
                    Some(at) => (end.at(&at.place.to_string()), primary),
                    None => (end, None),
                }
            }
        };
        guide.ended(&end, primary.as_ref());
        let wait = match end {
            End::Closed => break,
            End::Lost(why) => {
                let mut state = node.lock();
                state.disconnected(&format!("{}: {why}", node.target));
                let holds = state.client.held() > 0;
                drop(state);
                let most = if passing(&why) {
                    PASSING_BACKOFF
                } else if holds {
                    longest.min(HOLDER_BACKOFF)
                } else {
                    longest
                };
                let wait = backoff.min(most).mul_f64(0.5 + fastrand::f64() / 2.0);
                backoff = (backoff * 2).min(longest);
                wait
            }
            End::Denied(why) => {
                node.lock().denied(&format!("{}: {why}", node.target));
                DENIED_BACKOFF
            }
            End::Misconfigured(why) => {
                node.lock()
                    .misconfigured(&format!("{}: {why}", node.target));
                DENIED_BACKOFF
            }
        };
        signal(node);
        let rest = async {
            tokio::select! {
                () = sleep(wait) => {}
                () = guide.better() => {}
            }
        };
        if with_ticks(node, rest).await.is_none() {
            break;
        }
    }
    let mut state = node.lock();
    state.answer_echoes();
    // Handles may outlive us, and callers write to the socket themselves: it has to be let go of here.
    state.disconnected("the engine is closed");
    drop(state);
    signal(node);
}

/// A slot that is moving from one server to another is served by neither until all its keys have arrived.
fn passing(why: &str) -> bool {
    ["ASK ", "TRYAGAIN", "MOVED "]
        .iter()
        .any(|code| why.contains(code))
}

pub(crate) fn signal(node: &Node) {
    let wake = node.lock().take_wake();
    for ring in wake {
        ring.signal();
    }
}

/// Runs a future and lets time pass for the callers meanwhile. Nothing when the node was closed.
async fn with_ticks<F: Future>(node: &Node, future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    loop {
        let next = {
            let mut state = node.lock();
            if state.closing {
                return None;
            }
            state.answer_echoes();
            state.arm()
        };
        signal(node);
        tokio::select! {
            output = &mut future => return Some(output),
            () = sleep(clock::until(next)) => {}
            () = node.notify.notified() => {}
        }
        // Not connected: there is no connection whose silence could be an error.
        let _ = node.lock().tick();
    }
}

/// Connects and shakes hands with the server that the target names, or to which the guide leads.
async fn open(node: &Node, guide: &mut Guide) -> Result<(Connection, Option<Primary>), End> {
    let limit = Duration::from_micros(node.target.connect_timeout);
    let deadline = Instant::now() + limit;
    let late = |_| {
        Err(End::Lost(format!(
            "no connection within {} ms",
            limit.as_millis()
        )))
    };
    let Some(primary) = guide.primary(limit).await? else {
        let done = timeout_at(deadline, shake_hands(node, &node.target)).await;
        return Ok((done.unwrap_or_else(late)?, None));
    };
    let target = node.target.at(&primary.place.host, primary.place.port);
    let connection = tokio::select! {
        done = timeout_at(deadline, shake_hands(node, &target)) => done.unwrap_or_else(late),
        why = guide.switched(Some(&primary)) => Err(End::Lost(why)),
    };
    let connection = connection.map_err(|end| end.at(&primary.place.to_string()))?;
    guide.found(Some(&primary));
    Ok((connection, Some(primary)))
}

async fn shake_hands(node: &Node, target: &Target) -> Result<Connection, End> {
    let mut connection = Connection::open(target).await?;
    let run_id = greet(&mut connection, node, target).await?;
    let hashes = load(&mut connection, node).await?;
    let direct = if let Writer::Direct(direct) = &connection.writer {
        Some(direct.clone())
    } else {
        None
    };
    node.lock().connected(direct, hashes, run_id);
    Ok(connection)
}

/// Finds out whether this is the server that is looked for, before much is sent to it; what it calls its own process.
async fn greet(connection: &mut Connection, node: &Node, target: &Target) -> Result<String, End> {
    let mut out = BytesMut::new();
    hello(&mut out, target);
    let db = target.db.to_string();
    wire::command(&mut out, &[b"SELECT", db.as_bytes()]);
    wire::command(&mut out, &[b"INFO", b"server"]);
    let clustered = node.target.clustered();
    let (meta, partitions) = (node.lock().meta(), node.target.partitions.to_string());
    if clustered && node.partition == 0 {
        wire::command(
            &mut out,
            &[
                b"HSETNX",
                meta.as_bytes(),
                PARTITIONS,
                partitions.as_bytes(),
            ],
        );
        wire::command(&mut out, &[b"HGET", meta.as_bytes(), PARTITIONS]);
    }
    connection.send(&out).await?;
    let greeting = connection.greeting().await?;
    match (&greeting.mode[..], clustered) {
        ("sentinel", _) => {
            return Err(End::Denied(String::from(
                "this is a sentinel; sentinels are named by redis+sentinel://host:port/service",
            )));
        }
        ("cluster", false) => {
            return Err(End::Misconfigured(String::from(
                "this server is a node of a cluster; clusters are named by redis+cluster://host1,host2",
            )));
        }
        _ => {}
    }
    // What sentinels and other nodes know may be some seconds old, and a server knows best what it is itself.
    if (clustered || !node.target.sentinels.is_empty()) && greeting.role != "master" {
        return Err(End::Lost(format!(
            "not the primary, it is a {}",
            greeting.role
        )));
    }
    if let Value::Error(text) = connection.answer().await? {
        return Err(unfit(&format!("database {db}"), &text));
    }
    let run_id = match connection.answer().await? {
        Value::Error(text) => return Err(unfit("INFO", &text)),
        value => value
            .text()
            .and_then(|text| run_id(&text))
            .ok_or_else(|| End::Lost(String::from("INFO server names no run_id")))?,
    };
    if clustered && node.partition == 0 {
        if let Value::Error(text) = connection.answer().await? {
            return Err(unfit("HSETNX", &text));
        }
        match connection.answer().await? {
            Value::Error(text) => return Err(unfit("HGET", &text)),
            found if found.text().as_deref() == Some(&partitions) => {}
            found => {
                return Err(End::Misconfigured(format!(
                    "partitions: {partitions} is not allowed; this namespace has {} on the cluster, and all who use \
                     it must be set to the same number",
                    found.text().unwrap_or_default()
                )));
            }
        }
    }
    Ok(run_id)
}

/// Loads the scripts; their hashes.
async fn load(connection: &mut Connection, node: &Node) -> Result<Vec<Bytes>, End> {
    let mut out = BytesMut::new();
    let needed = scripts::needed(node.target.clustered());
    for script in 0..needed {
        let text = scripts::text(script, node.target.clustered());
        wire::command(&mut out, &[b"SCRIPT", b"LOAD", text.as_bytes()]);
    }
    let (channel, subscribe) = {
        let state = node.lock();
        (state.registry_channel(), state.subscribe())
    };
    // Later subscriptions are confirmed by pushes alone; that they are allowed at all is found out here.
    wire::command(&mut out, &[subscribe, channel.as_bytes()]);
    connection.send(&out).await?;
    let mut hashes = Vec::with_capacity(needed);
    for (name, _) in &SCRIPTS[..needed] {
        match connection.answer().await? {
            Value::Bytes(hash) => hashes.push(hash),
            Value::Error(text) => return Err(unfit(&format!("SCRIPT LOAD of {name}"), &text)),
            other => return Err(End::Lost(format!("SCRIPT LOAD of {name}: {other:?}"))),
        }
    }
    match connection.answer().await? {
        Value::Error(text) if text.contains("unknown command") => Err(End::Denied(format!(
            "clusters need Redis 7 or Valkey, which know SSUBSCRIBE: {text}"
        ))),
        Value::Error(text) => Err(unfit(&String::from_utf8_lossy(subscribe), &text)),
        _ => Ok(hashes),
    }
}

/// What the server calls its own process: another one after a restart, and on another server.
fn run_id(info: &str) -> Option<String> {
    info.lines()
        .find_map(|line| line.strip_prefix("run_id:"))
        .map(|id| id.trim().to_owned())
}

async fn serve(node: &Node, mut connection: Connection) -> End {
    let Connection {
        reader,
        writer,
        buffer,
    } = &mut connection;
    let direct: Option<Direct> = if let Writer::Direct(direct) = &*writer {
        Some(direct.clone())
    } else {
        None
    };
    let mut timer = pin!(sleep(Duration::ZERO));
    let mut armed = 0;
    // TLS: nobody but this thread writes, and never without looking at the clock meanwhile.
    let (mut unsent, mut flushed) = (BytesMut::new(), true);
    loop {
        let Turn { next, blocked } = match turn(node, direct.is_some(), &mut unsent) {
            Ok(turn) => turn,
            Err(end) => return end,
        };
        if next != armed {
            armed = next;
            timer
                .as_mut()
                .reset(tokio::time::Instant::now() + clock::until(next));
        }
        buffer.reserve(READ_BUFFER);
        tokio::select! {
            biased;
            read = reader.read(buffer) => match read {
                Ok(0) => return End::Lost(String::from("the server closed the connection")),
                Ok(_) => {
                    if let Err(why) = digest(node, buffer) {
                        return if is_denial(&why) { End::Denied(why) } else { End::Lost(why) };
                    }
                }
                Err(e) => return End::Lost(e.to_string()),
            },
            () = node.notify.notified() => {}
            () = &mut timer => armed = 0,
            ready = writable(direct.as_ref(), blocked) => {
                if let Err(e) = ready {
                    return End::Lost(e.to_string());
                }
            }
            pushed = push(writer, &mut unsent, &mut flushed), if !(unsent.is_empty() && flushed) => {
                if let Err(e) = pushed {
                    return End::Lost(e.to_string());
                }
            }
        }
    }
}

/// Until when the serving loop may wait, and whether it waits for the socket to take more.
pub(crate) struct Turn {
    pub next: Micros,
    pub blocked: bool,
}

/// One turn of the serving loop up to where it waits. Without a socket that anybody may write to, the bytes to write
/// are added to `unsent`.
pub(crate) fn turn(node: &Node, direct: bool, unsent: &mut BytesMut) -> Result<Turn, End> {
    let turn = {
        let mut state = node.lock();
        // Here, not where the timer ends: a steady stream of answers must not keep heartbeats waiting.
        if state.arm() <= clock::now()
            && let Err(why) = state.tick()
        {
            return Err(End::Lost(why));
        }
        state.answer_echoes();
        state.settle();
        let done = state.flush();
        if !direct && state.has_out() {
            unsent.unsplit(state.take_out());
        }
        if state.closing && state.quiet() && unsent.is_empty() {
            return Err(End::Closed);
        }
        Turn {
            next: state.arm(),
            blocked: direct && !done,
        }
    };
    signal(node);
    Ok(turn)
}

/// Writes over TLS; what is left when it is dropped half-way is in `unsent` and `flushed`.
async fn push(
    writer: &mut Writer,
    unsent: &mut BytesMut,
    flushed: &mut bool,
) -> std::io::Result<()> {
    if let Writer::Tls(stream) = writer {
        *flushed = false;
        while !unsent.is_empty() {
            if stream.write_buf(unsent).await? == 0 {
                return Err(std::io::ErrorKind::WriteZero.into());
            }
        }
        stream.flush().await?;
        *flushed = true;
    }
    Ok(())
}

/// Ends with `Ok` when a blocked socket takes more, never when it is not blocked.
async fn writable(direct: Option<&Direct>, blocked: bool) -> std::io::Result<()> {
    match direct {
        Some(direct) if blocked => direct.writable().await,
        _ => std::future::pending().await,
    }
}

/// Every whole frame of the buffer, under one lock, with one wake-up per loop.
pub(crate) fn digest(node: &Node, buffer: &mut BytesMut) -> Result<(), String> {
    let mut state = node.lock();
    while let Some(frame) = next_frame(buffer)? {
        if frame.pushed {
            if state.left_by(&frame.value) {
                return Err(String::from("the slot has moved to another server"));
            }
            state.on_push(&frame.value);
        } else {
            state.on_reply(frame.value)?;
        }
    }
    Ok(())
}
