//! The server's scripts as a model: what `rust/engine/src/scripts/*.lua` do, rule by rule, in memory.

use dotmac_core::lease::Micros;
use dotmac_core::locks::{AcquireReply, Heartbeat, HeartbeatReply};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::ops::Bound;
use std::sync::Arc;

pub type Ms = u64;
/// Number of a request: its session and its number there.
pub type Number = (String, u64);

const CLAIM: Ms = 3_000;
const GAP: i64 = 2_000;
const SWEEP_PAGE: usize = 20;

/// How aliveness is judged; only the first is right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clock {
    /// Stands still over a gap that only a step or a pause can have made.
    Logical,
    /// Advances over every gap.
    CountsGaps,
    /// Is the wall clock.
    Wall,
}

/// A message to a session's inbox.
#[derive(Debug, Clone)]
pub enum Push {
    Grant {
        sid: String,
        id: u64,
        fence: u64,
        stamp: Micros,
    },
    Revoked {
        sid: String,
        /// Or the number of a request.
        fence: u64,
        reason: &'static str,
    },
}

impl Push {
    pub fn sid(&self) -> &str {
        match self {
            Self::Grant { sid, .. } | Self::Revoked { sid, .. } => sid,
        }
    }
}

/// What an acquire says.
#[derive(Debug, Clone)]
pub struct Acquire {
    pub name: Arc<str>,
    pub number: Number,
    pub gen_: u64,
    pub owner: String,
    pub timeout: Ms,
    pub fixed: bool,
    pub wait: bool,
}

#[derive(Debug)]
struct Session {
    gen_: u64,
    stamp: Micros,
    seen: Ms,
    taken: String,
}

fn tell(session: &mut Session, pushes: &mut Vec<Push>, what: (&str, u64), reason: &'static str) {
    let (sid, fence) = (what.0.to_owned(), what.1);
    // Writing to a string can't fail.
    let _ = write!(session.taken, "{fence} {reason};");
    pushes.push(Push::Revoked { sid, fence, reason });
}

#[derive(Debug)]
struct Holder {
    claimed: bool,
    waited_for: bool,
    fence: u64,
    owner: String,
    sid: String,
    timeout: Ms,
    deadline: Option<Ms>,
    number: Number,
}

#[derive(Debug)]
pub struct Server {
    pub clock: Clock,
    /// False: commands of older connections are accepted.
    pub generations: bool,
    /// The fence counter starts from one, not from the clock.
    pub small_fences: bool,
    /// Wall clock, microseconds; set before every command.
    pub wall: Micros,
    pub pushes: Vec<Push>,
    /// What must not have happened.
    pub complaints: Vec<String>,
    /// How often the data was lost, and in which of these lives each fence was given out.
    pub life: u64,
    pub born: BTreeMap<u64, u64>,
    data: Data,
}

#[derive(Debug, Default)]
struct Data {
    sessions: BTreeMap<String, Session>,
    expiry: BTreeMap<String, Ms>,
    holders: BTreeMap<Arc<str>, Holder>,
    queue: BTreeMap<(Arc<str>, u64), Acquire>,
    /// Places in the queue by request, requests by the owner that waits.
    places: BTreeMap<Number, (Arc<str>, u64)>,
    waits: BTreeMap<String, Number>,
    logical: Option<Ms>,
    judged: Option<Ms>,
    epoch: Option<String>,
    fence: u64,
    cursor: Option<Arc<str>>,
    sweep_began: Ms,
}

impl Server {
    pub fn new(clock: Clock, generations: bool) -> Self {
        Self {
            clock,
            generations,
            small_fences: false,
            wall: 0,
            pushes: Vec::new(),
            complaints: Vec::new(),
            life: 0,
            born: BTreeMap::new(),
            data: Data::default(),
        }
    }

    /// Everything is gone.
    pub fn lose_data(&mut self) {
        self.data = Data::default();
        self.life += 1;
    }

    /// The first fence is of data that was lost before the second was given out.
    pub fn of_lost_data(&self, fence: u64, other: u64) -> bool {
        self.born.get(&fence) < self.born.get(&other)
    }

    /// What is left, for the end of a run.
    pub fn leftovers(&self) -> Vec<String> {
        let held = self.data.holders.iter().map(|(n, h)| {
            format!(
                "{n} held by {:?} fence {} claimed {}",
                h.number, h.fence, h.claimed
            )
        });
        let queued = self.data.queue.keys().map(|key| format!("{key:?} queued"));
        held.chain(queued).collect()
    }

    // ---- commands

    /// Nothing where the connection is an older one.
    pub fn heartbeat(&mut self, sent: &Heartbeat) -> Option<HeartbeatReply> {
        let now = self.judge();
        let wall = self.wall;
        let epoch = self
            .data
            .epoch
            .get_or_insert_with(|| wall.to_string())
            .clone();
        let sid = &sent.sid;
        let mut stamp = sent.stamp;
        match self.data.sessions.get(sid) {
            Some(session) if session.gen_ > sent.gen_ && self.generations => return None,
            Some(session) => stamp = stamp.max(session.stamp),
            None if sent.mode != dotmac_core::locks::Mode::Open => {
                return Some(HeartbeatReply::Gone);
            }
            None => {}
        }
        let mut taken = self
            .data
            .sessions
            .get(sid)
            .map_or_else(String::new, |session| session.taken.clone());
        if let Some(rest) = taken.strip_prefix(&sent.acknowledge) {
            taken = rest.to_owned();
        }
        self.data.sessions.insert(
            sid.clone(),
            Session {
                gen_: sent.gen_,
                stamp,
                seen: now,
                taken: taken.clone(),
            },
        );
        let ends = now + sent.longest.div_ceil(1000);
        self.data.expiry.insert(sid.clone(), ends);
        let mut accepted = Vec::new();
        for (name, fence) in &sent.claims {
            if let Some(holder) = self
                .data
                .holders
                .get_mut(name)
                .filter(|h| h.fence == *fence)
            {
                holder.claimed = true;
                accepted.push(*fence);
            }
        }
        self.sweep(now);
        Some(HeartbeatReply::Alive {
            epoch,
            revoked: taken,
            accepted,
        })
    }

    pub fn acquire(&mut self, ask: &Acquire) -> AcquireReply {
        let sid = &ask.number.0;
        let Some(session) = self.data.sessions.get(sid) else {
            return AcquireReply::NoSession;
        };
        if session.gen_ != ask.gen_ && self.generations {
            return AcquireReply::Superseded;
        }
        let stamp = session.stamp;
        if !self.data.holders.contains_key(&ask.name) && !ask.fixed {
            return self.take(ask, stamp, None);
        }
        let now = self.judge();
        if self
            .data
            .holders
            .get(&ask.name)
            .is_some_and(|h| self.left(h, now) <= 0)
        {
            self.revoke(&ask.name);
            self.grant_next(&ask.name, now);
        }
        let deadline = now + ask.timeout;
        let Some(holder) = self.data.holders.get_mut(&ask.name) else {
            let deadline = ask.fixed.then(|| self.keep_record(sid, deadline));
            return self.take(ask, stamp, deadline);
        };
        if holder.number == ask.number {
            let (fence, claimed) = (holder.fence, holder.claimed);
            if ask.fixed && !claimed {
                holder.deadline = Some(deadline);
                self.keep_record(sid, deadline);
            }
            return AcquireReply::Granted {
                fence,
                stamp,
                claimed,
            };
        }
        let rest = self
            .data
            .holders
            .get(&ask.name)
            .map_or(0, |h| self.left(h, now));
        if !ask.wait {
            return AcquireReply::NotFree(rest.unsigned_abs());
        }
        if self.data.places.contains_key(&ask.number) {
            return AcquireReply::Waiting;
        }
        if let Some(cycle) = self.cycle(ask, now) {
            return AcquireReply::Deadlock(cycle);
        }
        let place = (ask.name.clone(), self.next_fence());
        self.data.queue.insert(place.clone(), ask.clone());
        self.data.places.insert(ask.number.clone(), place);
        self.data
            .waits
            .insert(ask.owner.clone(), ask.number.clone());
        if let Some(holder) = self.data.holders.get_mut(&ask.name) {
            holder.waited_for = true;
        }
        AcquireReply::Waiting
    }

    pub fn release(&mut self, name: &Arc<str>, fence: u64) -> bool {
        let Some(holder) = self.data.holders.get(name).filter(|h| h.fence == fence) else {
            return false;
        };
        if holder.waited_for {
            let now = self.judge();
            self.grant_next(name, now);
        } else {
            self.data.holders.remove(name);
        }
        true
    }

    pub fn cancel(&mut self, name: &Arc<str>, number: &Number) {
        if self.leave_queue(number) {
            let more = self.first(name).is_some();
            if let Some(holder) = self.data.holders.get_mut(name).filter(|_| !more) {
                holder.waited_for = false;
            }
        } else if self
            .data
            .holders
            .get(name)
            .is_some_and(|h| h.number == *number)
        {
            let now = self.judge();
            self.grant_next(name, now);
        }
    }

    pub fn extend(
        &mut self,
        (name, fence): (&Arc<str>, u64),
        timeout: Ms,
        (sid, gen_): (&str, u64),
    ) -> Option<Micros> {
        let session = self.data.sessions.get(sid)?;
        if session.gen_ != gen_ && self.generations {
            return None;
        }
        let stamp = session.stamp;
        self.data.holders.get(name).filter(|h| h.fence == fence)?;
        let now = self.judge();
        let holder = self.data.holders.get(name)?;
        if self.left(holder, now) <= 0 {
            return None;
        }
        let fixed = holder.deadline.is_some();
        let deadline = fixed.then(|| self.keep_record(sid, now + timeout));
        let holder = self.data.holders.get_mut(name)?;
        holder.timeout = timeout;
        holder.deadline = deadline;
        Some(stamp)
    }

    // ---- inside

    fn judge(&mut self) -> Ms {
        let wall = self.wall / 1000;
        if self.clock == Clock::Wall {
            return wall;
        }
        let mut logical = self.data.logical.unwrap_or(wall);
        let gap = wall.cast_signed() - self.data.judged.unwrap_or(wall).cast_signed();
        if gap > 0 && (gap <= GAP || self.clock == Clock::CountsGaps) {
            logical += gap.unsigned_abs();
        }
        self.data.logical = Some(logical);
        self.data.judged = Some(wall);
        logical
    }

    fn next_fence(&mut self) -> u64 {
        self.data.fence = if self.data.fence == 0 && !self.small_fences {
            self.wall
        } else {
            self.data.fence + 1
        };
        self.data.fence
    }

    fn left(&self, holder: &Holder, now: Ms) -> i64 {
        let ends = if holder.claimed && holder.deadline.is_some() {
            holder.deadline
        } else {
            let length = if holder.claimed {
                holder.timeout
            } else {
                holder.timeout.min(CLAIM)
            };
            self.data
                .sessions
                .get(&holder.sid)
                .map(|session| session.seen + length)
        };
        ends.map_or(0, |ends| ends.cast_signed() - now.cast_signed())
    }

    fn keep_record(&mut self, sid: &str, until: Ms) -> Ms {
        let ends = self.data.expiry.entry(sid.to_owned()).or_default();
        *ends = until.max(*ends);
        until
    }

    fn hold(
        &mut self,
        ask: &Acquire,
        claimed: bool,
        waited_for: bool,
        deadline: Option<Ms>,
    ) -> u64 {
        let fence = self.next_fence();
        self.born.insert(fence, self.life);
        self.data.holders.insert(
            ask.name.clone(),
            Holder {
                claimed,
                waited_for,
                fence,
                owner: ask.owner.clone(),
                sid: ask.number.0.clone(),
                timeout: ask.timeout,
                deadline,
                number: ask.number.clone(),
            },
        );
        fence
    }

    /// Granted at once: nobody may be in the queue.
    fn take(&mut self, ask: &Acquire, stamp: Micros, deadline: Option<Ms>) -> AcquireReply {
        if let Some(place) = self.first(&ask.name) {
            self.complaints
                .push(format!("{:?} was granted past {place:?}", ask.number));
        }
        let fence = self.hold(ask, true, false, deadline);
        AcquireReply::Granted {
            fence,
            stamp,
            claimed: true,
        }
    }

    fn revoke(&mut self, name: &Arc<str>) {
        if let Some(holder) = self.data.holders.get(name)
            && let Some(session) = self.data.sessions.get_mut(&holder.sid)
        {
            tell(
                session,
                &mut self.pushes,
                (&holder.sid, holder.fence),
                "expired",
            );
        }
    }

    fn first(&self, name: &Arc<str>) -> Option<(Arc<str>, u64)> {
        self.data
            .queue
            .range((name.clone(), 0)..=(name.clone(), u64::MAX))
            .next()
            .map(|(place, _)| place.clone())
    }

    fn leave_queue(&mut self, number: &Number) -> bool {
        let Some(place) = self.data.places.remove(number) else {
            return false;
        };
        if let Some(ask) = self.data.queue.remove(&place)
            && self.data.waits.get(&ask.owner) == Some(number)
        {
            self.data.waits.remove(&ask.owner);
        }
        true
    }

    fn grant_next(&mut self, name: &Arc<str>, now: Ms) {
        while let Some(ask) = self
            .first(name)
            .and_then(|place| self.data.queue.get(&place).cloned())
        {
            self.leave_queue(&ask.number);
            let (sid, id) = &ask.number;
            let Some(session) = self.data.sessions.get_mut(sid) else {
                continue;
            };
            if session.seen + ask.timeout.min(CLAIM) <= now {
                tell(session, &mut self.pushes, (sid, *id), "dropped");
                continue;
            }
            let stamp = session.stamp;
            let deadline = ask.fixed.then(|| self.keep_record(sid, now + ask.timeout));
            let more = self.first(name).is_some();
            let fence = self.hold(&ask, false, more, deadline);
            self.pushes.push(Push::Grant {
                sid: sid.clone(),
                id: *id,
                fence,
                stamp,
            });
            return;
        }
        self.data.holders.remove(name);
    }

    fn cycle(&self, ask: &Acquire, now: Ms) -> Option<Vec<String>> {
        let mut cycle = vec![ask.name.to_string()];
        let mut met = Vec::new();
        let mut at = &ask.name;
        while let Some(holder) = self.data.holders.get(at) {
            if self.left(holder, now) <= 0 || met.contains(&&holder.owner) {
                return None;
            }
            if holder.owner == ask.owner {
                return Some(cycle);
            }
            met.push(&holder.owner);
            let number = self.data.waits.get(&holder.owner)?;
            at = &self.data.places.get(number)?.0;
            cycle.push(at.to_string());
        }
        None
    }

    fn sweep(&mut self, now: Ms) {
        if !self.data.expiry.values().any(|ends| *ends <= now) {
            return;
        }
        if self.data.cursor.is_none() {
            self.data.sweep_began = now;
        }
        let from = self
            .data
            .cursor
            .clone()
            .map_or(Bound::Unbounded, Bound::Excluded);
        let page: Vec<_> = self
            .data
            .holders
            .range::<Arc<str>, _>((from, Bound::Unbounded))
            .map(|(name, _)| name.clone())
            .take(SWEEP_PAGE)
            .collect();
        for name in &page {
            if self
                .data
                .holders
                .get(name)
                .is_some_and(|h| self.left(h, now) <= 0)
            {
                self.revoke(name);
                self.grant_next(name, now);
            }
        }
        self.data.cursor = page.last().filter(|_| page.len() == SWEEP_PAGE).cloned();
        if self.data.cursor.is_none() {
            let until = self.data.sweep_began;
            let sessions = &mut self.data.sessions;
            self.data.expiry.retain(|sid, ends| {
                if *ends <= until {
                    sessions.remove(sid);
                }
                *ends > until
            });
        }
    }
}
