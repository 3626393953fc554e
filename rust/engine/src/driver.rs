//! The engine thread's work for one partition: connect, shake hands, read, keep time, connect again.

use crate::clock;
use crate::node::Node;
use crate::scripts::SCRIPTS;
use crate::transport::{Direct, Reader, Writer, connect};
use crate::wire::{self, Value};
use bytes::{Bytes, BytesMut};
use redis_protocol::resp3::decode::complete::decode_bytes_mut;
use redis_protocol::resp3::types::BytesFrame;
use std::future::Future;
use std::pin::pin;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::time::{sleep, timeout};

const FIRST_BACKOFF: Duration = Duration::from_millis(20);
const LAST_BACKOFF: Duration = Duration::from_secs(2);
const DENIED_BACKOFF: Duration = Duration::from_secs(2);
const READ_BUFFER: usize = 64 * 1024;

enum End {
    /// The connection is gone, or could not be made.
    Lost(String),
    /// The server refuses us.
    Denied(String),
    /// `close` was called and everything is said.
    Closed,
}

/// Runs until the node is closed.
pub async fn run(node: &Node) {
    let mut backoff = FIRST_BACKOFF;
    // A request that is made just after the server is back must not wait out its own time for the next attempt.
    let longest =
        Duration::from_micros(node.target.request_timeout / 4).clamp(FIRST_BACKOFF, LAST_BACKOFF);
    loop {
        let end = match with_ticks(node, open(node)).await {
            None => End::Closed,
            Some(Err(end)) => end,
            Some(Ok(connection)) => {
                let end = serve(node, connection).await;
                // A server that lets us in and then refuses to serve us is not to be hammered either.
                if node.lock().open() {
                    backoff = FIRST_BACKOFF;
                }
                end
            }
        };
        let wait = match end {
            End::Closed => break,
            End::Lost(why) => {
                node.lock().disconnected(&format!("{}: {why}", node.target));
                let wait = backoff.mul_f64(0.5 + fastrand::f64() / 2.0);
                backoff = (backoff * 2).min(longest);
                wait
            }
            End::Denied(why) => {
                node.lock().denied(&format!("{}: {why}", node.target));
                DENIED_BACKOFF
            }
        };
        signal(node);
        if with_ticks(node, sleep(wait)).await.is_none() {
            break;
        }
    }
    let mut state = node.lock();
    state.answer_echoes();
    drop(state);
    signal(node);
}

struct Connection {
    reader: Reader,
    writer: Writer,
    buffer: BytesMut,
}

fn signal(node: &Node) {
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

async fn open(node: &Node) -> Result<Connection, End> {
    let limit = Duration::from_micros(node.target.connect_timeout);
    match timeout(limit, shake_hands(node)).await {
        Ok(done) => done,
        Err(_) => Err(End::Lost(format!(
            "no connection within {} ms",
            limit.as_millis()
        ))),
    }
}

async fn shake_hands(node: &Node) -> Result<Connection, End> {
    let target = &node.target;
    let (mut reader, mut writer) = connect(target).await.map_err(End::Lost)?;
    let mut out = BytesMut::new();
    let mut hello: Vec<&[u8]> = vec![b"HELLO", b"3"];
    let user = target.username.as_deref().unwrap_or("default");
    if let Some(password) = &target.password {
        hello.extend([b"AUTH".as_slice(), user.as_bytes(), password.as_bytes()]);
    }
    wire::command(&mut out, &hello);
    let db = target.db.to_string();
    let channel = node.lock().registry_channel();
    wire::command(&mut out, &[b"SELECT", db.as_bytes()]);
    for (_, text) in SCRIPTS {
        wire::command(&mut out, &[b"SCRIPT", b"LOAD", text.as_bytes()]);
    }
    // Later subscriptions are confirmed by pushes alone; that they are allowed at all is found out here.
    wire::command(&mut out, &[b"SUBSCRIBE", channel.as_bytes()]);
    writer
        .write_all(&out)
        .await
        .map_err(|e| End::Lost(e.to_string()))?;
    let mut buffer = BytesMut::with_capacity(READ_BUFFER);
    let hello = answer(&mut reader, &mut buffer).await?;
    if let Value::Error(text) = hello {
        return Err(refusal(&text));
    }
    if let Value::Error(text) = answer(&mut reader, &mut buffer).await? {
        return Err(unfit(&format!("database {db}"), &text));
    }
    let mut hashes = Vec::with_capacity(SCRIPTS.len());
    for (name, _) in SCRIPTS {
        match answer(&mut reader, &mut buffer).await? {
            Value::Bytes(hash) => hashes.push(hash),
            Value::Error(text) => return Err(unfit(&format!("SCRIPT LOAD of {name}"), &text)),
            other => return Err(End::Lost(format!("SCRIPT LOAD of {name}: {other:?}"))),
        }
    }
    if let Value::Error(text) = answer(&mut reader, &mut buffer).await? {
        return Err(unfit("SUBSCRIBE", &text));
    }
    let direct = if let Writer::Direct(direct) = &writer {
        Some(direct.clone())
    } else {
        None
    };
    node.lock().connected(direct, hashes);
    Ok(Connection {
        reader,
        writer,
        buffer,
    })
}

/// Only other rights or credentials would help.
fn is_denial(text: &str) -> bool {
    let codes = ["WRONGPASS", "NOAUTH", "NOPERM", "ERR AUTH"];
    codes.iter().any(|code| text.starts_with(code)) || text.contains("ACL failure in script")
}

/// A command of the handshake failed: for good if rights or the database are missing, else for now (a server that
/// loads its data, or is busy with somebody's script).
fn unfit(what: &str, text: &str) -> End {
    let why = format!("{what}: {text}");
    if is_denial(text) || text.contains("DB index is out of range") {
        End::Denied(why)
    } else {
        End::Lost(why)
    }
}

fn refusal(text: &str) -> End {
    if is_denial(text) {
        return End::Denied(text.to_owned());
    }
    if text.starts_with("NOPROTO") || text.contains("unknown command") {
        return End::Denied(format!(
            "the server does not speak RESP3, which Redis 6 or Valkey is needed for: {text}"
        ));
    }
    End::Lost(text.to_owned())
}

async fn answer(reader: &mut Reader, buffer: &mut BytesMut) -> Result<Value, End> {
    loop {
        if let Some(frame) = next_frame(buffer).map_err(End::Lost)? {
            return Ok(Value::from_frame(frame));
        }
        match reader.read(buffer).await {
            Ok(0) => return Err(End::Lost(String::from("the server closed the connection"))),
            Ok(_) => {}
            Err(e) => return Err(End::Lost(e.to_string())),
        }
    }
}

fn next_frame(buffer: &mut BytesMut) -> Result<Option<BytesFrame>, String> {
    if buffer.is_empty() {
        return Ok(None);
    }
    match decode_bytes_mut(buffer) {
        Ok(frame) => Ok(frame.map(|(frame, _, _): (BytesFrame, usize, Bytes)| frame)),
        Err(e) => Err(format!("not the Redis protocol: {e}")),
    }
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
        let (next, blocked) = {
            let mut state = node.lock();
            // Here, not where the timer ends: a steady stream of answers must not keep heartbeats waiting.
            if state.arm() <= clock::now()
                && let Err(why) = state.tick()
            {
                return End::Lost(why);
            }
            state.answer_echoes();
            state.settle();
            let done = state.flush();
            if direct.is_none() && state.has_out() {
                unsent.unsplit(state.take_out());
            }
            if state.closing && state.quiet() && unsent.is_empty() {
                return End::Closed;
            }
            (state.arm(), direct.is_some() && !done)
        };
        signal(node);
        if next != armed {
            armed = next;
            timer
                .as_mut()
                .reset(tokio::time::Instant::now() + clock::until(next));
        }
        buffer.reserve(READ_BUFFER / 4);
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
fn digest(node: &Node, buffer: &mut BytesMut) -> Result<(), String> {
    let mut state = node.lock();
    while let Some(frame) = next_frame(buffer)? {
        let pushed = matches!(frame, BytesFrame::Push { .. });
        let value = Value::from_frame(frame);
        if pushed {
            state.on_push(&value);
        } else {
            state.on_reply(value)?;
        }
    }
    Ok(())
}
