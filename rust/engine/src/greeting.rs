//! A connection up to its greeting: opened, logged in, known for what is at its other end.

use crate::frame::{Frame, next_frame};
use crate::transport::{Reader, Target, Writer, connect};
use crate::wire::{self, Value};
use bytes::BytesMut;

const READ_BUFFER: usize = 64 * 1024;

/// Why there is no connection, or none any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// It is gone, or could not be made.
    Lost(String),
    /// The server refuses us.
    Denied(String),
    /// The server is of another kind, or set up otherwise, than we were told.
    Misconfigured(String),
    /// `close` was called and everything is said.
    Closed,
}

impl End {
    /// The same, saying where it happened.
    pub fn at(self, place: &str) -> Self {
        match self {
            Self::Lost(why) => Self::Lost(format!("{place}: {why}")),
            Self::Denied(why) => Self::Denied(format!("{place}: {why}")),
            Self::Misconfigured(why) => Self::Misconfigured(format!("{place}: {why}")),
            Self::Closed => Self::Closed,
        }
    }
}

/// An open connection.
pub struct Connection {
    /// Its reading half.
    pub reader: Reader,
    /// Its writing half.
    pub writer: Writer,
    /// What was read and is no whole frame yet.
    pub buffer: BytesMut,
}

/// What a server says of itself in its greeting.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Greeting {
    /// `standalone`, `cluster` or `sentinel`.
    pub mode: String,
    /// `master` or `replica`; empty for a sentinel.
    pub role: String,
}

impl Connection {
    /// Opens the socket.
    pub async fn open(target: &Target) -> Result<Self, End> {
        let (reader, writer) = connect(target).await.map_err(End::Lost)?;
        Ok(Self {
            reader,
            writer,
            buffer: BytesMut::with_capacity(READ_BUFFER),
        })
    }

    /// Sends commands.
    pub async fn send(&mut self, commands: &[u8]) -> Result<(), End> {
        let Err(error) = self.writer.write_all(commands).await else {
            return Ok(());
        };
        // Why a peer hung up, such as a certificate that it refuses, is in the last that it said.
        Err(End::Lost(match self.reader.read(&mut self.buffer).await {
            Err(said) if said.kind() == std::io::ErrorKind::InvalidData => said.to_string(),
            _ => error.to_string(),
        }))
    }

    /// The next frame, pushes included. Cancel safe.
    pub async fn frame(&mut self) -> Result<Frame, End> {
        loop {
            if let Some(frame) = next_frame(&mut self.buffer).map_err(End::Lost)? {
                return Ok(frame);
            }
            match self.reader.read(&mut self.buffer).await {
                Ok(0) => return Err(End::Lost(String::from("the server closed the connection"))),
                Ok(_) => {}
                Err(e) => return Err(End::Lost(e.to_string())),
            }
        }
    }

    /// The next answer or push, as a value. Cancel safe.
    pub async fn answer(&mut self) -> Result<Value, End> {
        self.frame().await.map(|frame| frame.value)
    }

    /// The answer to `HELLO`, which [`hello`] has written.
    pub async fn greeting(&mut self) -> Result<Greeting, End> {
        let value = self.answer().await?;
        if let Value::Error(text) = &value {
            return Err(refusal(text));
        }
        let of = |name: &str| wire::field(&value, name).and_then(Value::text);
        Ok(Greeting {
            mode: of("mode").unwrap_or_default(),
            role: of("role").unwrap_or_default(),
        })
    }
}

/// Writes the greeting, which logs in too.
pub fn hello(out: &mut BytesMut, target: &Target) {
    let mut hello: Vec<&[u8]> = vec![b"HELLO", b"3"];
    let user = target.username.as_deref().unwrap_or("default");
    if let Some(password) = &target.password {
        hello.extend([b"AUTH".as_slice(), user.as_bytes(), password.as_bytes()]);
    }
    wire::command(out, &hello);
}

/// Only other rights or credentials would help.
pub fn is_denial(text: &str) -> bool {
    let codes = ["WRONGPASS", "NOAUTH", "NOPERM", "ERR AUTH"];
    // The latter as Valkey, and as Redis 6 and 7 write it.
    let in_scripts = [
        "ACL failure in script",
        "The user executing the script can't",
    ];
    codes.iter().any(|code| text.starts_with(code)) || in_scripts.iter().any(|it| text.contains(it))
}

/// A command of the handshake failed: for good if rights or the database are missing, else for now (a server that
/// loads its data, or is busy with somebody's script).
pub fn unfit(what: &str, text: &str) -> End {
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
