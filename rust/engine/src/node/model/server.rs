//! The server: the engine's own scripts, run by Lua on data in memory.

use super::redis::{Bytes, Redis, Reply};
use crate::scripts::{COUNT, SCRIPTS};
use mlua::{Function, Lua, LuaOptions, MultiValue, StdLib, Table, Value};
use std::cell::RefCell;
use std::rc::Rc;

/// A change of the scripts that breaks a rule: the text to look for, and what takes its place. An empty text stands
/// for the beginning of the script that is named.
pub type Mutation = (Option<&'static str>, &'static str, &'static str);

/// One server.
pub struct Server {
    data: Rc<RefCell<Redis>>,
    lua: Lua,
    texts: Vec<String>,
    functions: [Option<Function>; COUNT],
    /// Which scripts the server has in its cache.
    cached: [bool; COUNT],
    /// How often the data was lost.
    pub life: u64,
    /// How often the server was started again.
    pub starts: u64,
    /// What a script must not have done.
    pub complaints: Vec<String>,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Server({:?})", self.data)
    }
}

/// Of the library that Redis gives to scripts: texts that end with a zero byte ("s"), and of one length ("c1").
const STRUCT: &str = "struct = {unpack = function(format, text)
  local found, at = {}, 1
  for kind, length in format:gmatch('(%a)(%d*)') do
    local ends = kind == 's' and text:find('\\0', at, true) or at + (tonumber(length) or #text)
    if not ends or ends > #text then error('unfinished string in data', 2) end
    found[#found + 1] = text:sub(at, ends - 1)
    at = kind == 's' and ends + 1 or ends
  end
  found[#found + 1] = at
  return unpack(found)
end}";

/// As Redis does: no script may make a global variable or read one that is not there.
const NO_GLOBALS: &str = "setmetatable(_G, {
  __newindex = function(_, name) error('script attempted to create global variable ' .. tostring(name), 2) end,
  __index = function(_, name) error('script attempted to access nonexistent global variable ' .. tostring(name), 2) end,
})";

impl Server {
    pub fn new(mutations: &[Mutation]) -> mlua::Result<Self> {
        let data = Rc::new(RefCell::new(Redis::default()));
        let libraries = StdLib::STRING | StdLib::TABLE | StdLib::MATH;
        let lua = Lua::new_with(libraries, LuaOptions::default())?;
        let redis = lua.create_table()?;
        for (name, raises) in [("call", true), ("pcall", false)] {
            let data = data.clone();
            let call = lua.create_function(move |lua, args: MultiValue| {
                let args = args
                    .iter()
                    .map(argument)
                    .collect::<mlua::Result<Vec<_>>>()?;
                match data.borrow_mut().call(&args) {
                    Ok(reply) => to_lua(lua, &reply),
                    Err(text) if raises => Err(mlua::Error::runtime(text)),
                    Err(text) => to_lua(lua, &Reply::Error(text)),
                }
            })?;
            redis.set(name, call)?;
        }
        let globals = lua.globals();
        globals.set("redis", redis)?;
        globals.set("KEYS", lua.create_table()?)?;
        globals.set("ARGV", lua.create_table()?)?;
        lua.load(STRUCT).exec()?;
        lua.load(NO_GLOBALS).exec()?;
        Ok(Self {
            data,
            lua,
            texts: mutated(mutations),
            functions: [const { None }; COUNT],
            cached: [false; COUNT],
            life: 0,
            starts: 0,
            complaints: Vec::new(),
        })
    }

    /// Sets the wall clock, in microseconds since 1970.
    pub fn set_time(&self, wall: u64) {
        self.data.borrow_mut().wall = wall;
    }

    /// Everything is gone.
    pub fn lose_data(&mut self) {
        self.data.borrow_mut().lose_data();
        self.life += 1;
    }

    /// Another process serves, without the data.
    pub fn restart(&mut self) {
        self.lose_data();
        self.forget_scripts();
        self.starts += 1;
        let mut data = self.data.borrow_mut();
        data.started = data.wall;
    }

    /// What the server has now, as a replica would.
    pub fn copy(&self) -> Redis {
        self.data.borrow().clone()
    }

    /// Another server takes over, with the data that it has.
    pub fn take_over(&mut self, data: Redis) {
        *self.data.borrow_mut() = data;
        self.starts += 1;
    }

    /// The server forgets the scripts.
    pub fn forget_scripts(&mut self) {
        self.cached = [false; COUNT];
    }

    /// Loads all scripts; answers their hashes, as `SCRIPT LOAD` would.
    pub fn load_scripts(&mut self) -> Vec<bytes::Bytes> {
        self.cached = [true; COUNT];
        (0..COUNT).map(|i| format!("{i:040x}").into()).collect()
    }

    /// What was published since the last call: channel and message.
    pub fn take_published(&self) -> Vec<(Bytes, Bytes)> {
        std::mem::take(&mut self.data.borrow_mut().published)
    }

    /// What is still held or queued: everything but sessions and what the partition knows of itself.
    pub fn leftovers(&self) -> Vec<String> {
        let data = self.data.borrow();
        let sizes = data
            .sizes()
            .filter(|(key, _)| ![":s", ":m", ":x"].iter().any(|kept| key.ends_with(kept)));
        sizes
            .map(|(key, size)| format!("{size} in {key}"))
            .collect()
    }

    /// Carries out `EVALSHA` or `EVAL`.
    pub fn command(&mut self, args: &[Bytes]) -> Reply {
        let (index, rest) = match args {
            [name, hash, rest @ ..] if name == b"EVALSHA" => {
                let text = String::from_utf8_lossy(hash);
                let Ok(index) = usize::from_str_radix(&text, 16) else {
                    return Reply::Error(String::from("ERR not a hash of ours"));
                };
                if !self.cached[index] {
                    return Reply::Error(String::from("NOSCRIPT No matching script."));
                }
                (index, rest)
            }
            [name, text, rest @ ..] if name == b"EVAL" => {
                let known = SCRIPTS.iter().position(|s| s.1.as_bytes() == &text[..]);
                let Some(index) = known else {
                    return Reply::Error(String::from("ERR not a script of ours"));
                };
                self.cached[index] = true;
                (index, rest)
            }
            _ => return Reply::Error(String::from("ERR only scripts are expected here")),
        };
        self.run(index, rest).unwrap_or_else(|error| {
            let text = format!("script {}: {error}", SCRIPTS[index].0);
            self.complaints.push(text.clone());
            Reply::Error(format!("ERR {text}"))
        })
    }

    fn run(&mut self, index: usize, args: &[Bytes]) -> mlua::Result<Reply> {
        let function = if let Some(function) = &self.functions[index] {
            function.clone()
        } else {
            let chunk = self.lua.load(&self.texts[index]).set_name(SCRIPTS[index].0);
            let function = chunk.into_function()?;
            self.functions[index].insert(function).clone()
        };
        let count: usize = args
            .first()
            .and_then(|count| std::str::from_utf8(count).ok()?.parse().ok())
            .ok_or_else(|| mlua::Error::runtime("the number of keys is missing"))?;
        let keys = args
            .get(1..=count)
            .ok_or_else(|| mlua::Error::runtime("fewer keys than announced"))?;
        let globals = self.lua.globals();
        for (name, values) in [("KEYS", keys), ("ARGV", &args[count + 1..])] {
            let values = values.iter().map(|value| self.lua.create_string(value));
            let table = self.lua.create_table()?;
            for (i, value) in (1..).zip(values) {
                table.raw_set(i, value?)?;
            }
            globals.raw_set(name, table)?;
        }
        self.data.borrow_mut().declared = keys.to_vec();
        from_lua(&function.call::<Value>(())?)
    }
}

/// The scripts' texts with the rules taken out that a test wants out.
fn mutated(mutations: &[Mutation]) -> Vec<String> {
    let mut texts: Vec<String> = SCRIPTS.iter().map(|s| s.1.to_owned()).collect();
    for (script, from, to) in mutations {
        let mut found = false;
        for (text, (name, _)) in texts.iter_mut().zip(SCRIPTS) {
            if script.is_some_and(|script| script != name) {
                continue;
            }
            if from.is_empty() {
                text.insert_str(0, to);
                found = true;
            } else if text.contains(from) {
                *text = text.replace(from, to);
                found = true;
            }
        }
        assert!(found, "no script has the text {from:?} ({script:?})");
    }
    texts
}

/// An argument of `redis.call` as Redis writes it.
fn argument(value: &Value) -> mlua::Result<Bytes> {
    match value {
        Value::String(text) => Ok(text.as_bytes().to_vec()),
        Value::Integer(number) => Ok(number.to_string().into_bytes()),
        // Seventeen digits, as `%.17g`; numbers here are whole where they are large.
        Value::Number(number) => Ok(number.to_string().into_bytes()),
        other => Err(mlua::Error::runtime(format!(
            "Lua redis lib command arguments must be strings or integers, not {}",
            other.type_name()
        ))),
    }
}

/// Answers as scripts see them.
fn to_lua(lua: &Lua, reply: &Reply) -> mlua::Result<Value> {
    Ok(match reply {
        Reply::Nil => Value::Boolean(false),
        // Lua 5.1 has one kind of number.
        Reply::Int(number) => Value::Number(*number as f64),
        Reply::Bulk(text) => Value::String(lua.create_string(text)?),
        Reply::Array(items) => {
            let table = lua.create_table()?;
            for (i, item) in (1..).zip(items) {
                table.raw_set(i, to_lua(lua, item)?)?;
            }
            Value::Table(table)
        }
        Reply::Error(text) => {
            let table = lua.create_table()?;
            table.raw_set("err", text.as_str())?;
            Value::Table(table)
        }
    })
}

/// What a script returns as its caller sees it: numbers lose their fractions, a table ends at its first nil.
fn from_lua(value: &Value) -> mlua::Result<Reply> {
    Ok(match value {
        Value::Integer(number) => Reply::Int(*number),
        Value::Number(number) => Reply::Int(*number as i64),
        Value::String(text) => Reply::Bulk(text.as_bytes().to_vec()),
        Value::Boolean(true) => Reply::Int(1),
        Value::Table(table) => from_table(table)?,
        _ => Reply::Nil,
    })
}

fn from_table(table: &Table) -> mlua::Result<Reply> {
    if let Value::String(text) = table.raw_get("err")? {
        return Ok(Reply::Error(text.to_string_lossy()));
    }
    if let Value::String(text) = table.raw_get("ok")? {
        return Ok(Reply::Bulk(text.as_bytes().to_vec()));
    }
    let mut items = Vec::new();
    for i in 1.. {
        match table.raw_get(i)? {
            Value::Nil => break,
            item => items.push(from_lua(&item)?),
        }
    }
    Ok(Reply::Array(items))
}
