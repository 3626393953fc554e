-- Shared by every script that leaves its fast path. KEYS, the same in all lock scripts:
--   1 sessions  hash  sid -> "gen stamp seen longest"; "@"sid -> who it is; "!"sid -> what was taken from it
--   2 holders   hash  lock -> RECORD of its one holder; or, where several hold it, "*" or "&" (waited for), then mode
--                     and limit \0 how many hold it, and lock \0 fence -> RECORD of each of them
--                     RECORD: flag fence \0 owner \0 sid \0 timeout[@deadline] \0 request \0 since \0 where
--                     flag: "-" claimed, "+" claimed and waited for, "u" and "U" the same before the claim
--   3 queue     zset  lock \0 rank \0 request for who waits, \0 lock \0 fence for who is one of several holders;
--                     all of score 0. A rank is four digits, less for a higher priority, then a growing number
--   4 waiters   hash  "r"request -> lock \0 rank \0 owners \0 sid \0 timeout[@] \0 since \0 mode limit \0 held[policy] \0 where
--                     "o"owner -> requests, a blank between them
--   5 meta      hash  l logical clock, w wall clock, e epoch, f fence counter, t counter of ranks, c sweep cursor,
--                     p start of the sweep, z end of the grace, b its birth, y end of the time in which leases are taken back,
--                     a numbers of the lost data end below that, i identity of the server
--   6 expiry    zset  sid -> logical time at which its last lease ends, far above that once it is dead; "!"lock, where somebody waits -> when its
--                     lease will have ended if it is not renewed
-- Times are milliseconds. Owners are separated by \1: who asks, then who awaits that one, and so on. Modes: "x" for one
-- holder, "s" for any number, "k" for as many as the limit. A grant out of the queue counts only CLAIM until a
-- heartbeat has claimed it.
local CLAIM = 3000
local GAP = 2000
-- The clock is stored this often at least, by the heartbeats; a script that finds it younger leaves it.
local FRESH = 200
local SEEDED = 1000000000000000

-- Milliseconds in which those who wait have to answer when the holder has died, to be given the lock.
local ROLL_CALL = 15
local CALLED = 500
-- Places in a queue that one script takes away from the silent at most.
local PASSED = 500
-- Stands where somebody waits for a lock that nobody holds, so that nobody finds it free: in a grace, and, with the
-- time of the call behind its second letter, after the death of a holder, while those who wait are called.
local NOBODY, CALL = '&g\0000', '&r'

local function nobody(h) return h == NOBODY or h and h:sub(1, 2) == CALL end

local grace_ends = 0

local function text(n) return string.format('%.0f', n) end

local function micros()
  local t = redis.call('TIME')
  return t[1] * 1000000 + t[2]
end

-- The partition's logical clock: follows the server's, never goes back, and does not advance over a gap that
-- only a step of the clock or a pause of the server can have made.
local function judge(meta, store)
  local w = math.floor(micros() / 1000)
  local m = redis.call('HMGET', meta, 'l', 'w', 'z')
  local l = tonumber(m[1]) or w
  local gap = w - (tonumber(m[2]) or 0)
  grace_ends = tonumber(m[3]) or 0
  if gap > 0 and gap <= GAP then l = l + gap end
  if store or gap < 0 or gap > FRESH then redis.call('HSET', meta, 'l', text(l), 'w', text(w)) end
  return l
end

-- Strictly increasing, also over a server that lost its data: a new counter starts from the server's clock.
local function next_number(meta, counter)
  local n = redis.call('HINCRBY', meta, counter, 1)
  if n < SEEDED then
    n = math.max(micros(), (tonumber(redis.call('HGET', meta, 'a')) or 0) + 1)
    redis.call('HSET', meta, counter, text(n))
  end
  return n
end

-- Nothing is granted in a grace, so this counter stays unseeded and no fast path grants anything either.
local function next_fence(meta) return next_number(meta, 'f') end

local function next_rank(meta, priority) return priority .. text(next_number(meta, 't')) end

-- Whatever the clock says, tokens and ranks that are given out from here on are above that number, which is from before
-- the data was lost.
local function numbers_above(meta, number)
  local m = redis.call('HMGET', meta, 'a', 'f', 't')
  if number > (tonumber(m[1]) or 0) then redis.call('HSET', meta, 'a', text(number)) end
  -- A counter that was seeded before.
  for i, counter in ipairs({'f', 't'}) do
    local n = tonumber(m[i + 1]) or 0
    if n >= SEEDED and n < number then redis.call('HSET', meta, counter, text(number)) end
  end
end

-- What a hash has under each of these fields, false for nothing: by the thousand, as the stack has room for no more.
local function values(key, fields)
  local found = {}
  for first = 1, #fields, 1000 do
    local some = redis.call('HMGET', key, unpack(fields, first, math.min(first + 999, #fields)))
    for i = 1, #some do found[first + i - 1] = some[i] end
  end
  return found
end

local function session(sid) return redis.call('HGET', KEYS[1], sid) end

-- When a session was seen last, and the stamp of that; nil of one that is forgotten. `s` is what `session` gives.
local function seen_in(s)
  if not s then return nil end
  local stamp, seen = s:match('^%d+ (%d+) (%d+)')
  return tonumber(seen), stamp
end

local function seen_of(sid) return seen_in(session(sid)) end

-- The cells of a RECORD. Taken apart by `struct`, as here and below: a pattern takes four times as long, and thirty times
-- one that looks for what stands at the end.
local function parse(h)
  local _, fence, owner, sid, timeout, request, since, at = struct.unpack('c1ssssss', h)
  local lasts, deadline = tonumber(timeout), nil
  if not lasts then lasts, deadline = timeout:match('^(%d+)@(%d*)$') end
  return fence, owner, sid, tonumber(lasts), tonumber(deadline), request, since, h:sub(at)
end

-- The session of a RECORD.
local function sid_in(h) return (select(4, struct.unpack('c1sss', h))) end

-- The request of a member of the queue.
local function request_in(member) return member:sub((select(3, struct.unpack('ss', member)))) end

local function record(flag, fence, owner, sid, timeout, ends, request, since, where)
  return flag .. fence .. '\0' .. owner .. '\0' .. sid .. '\0' .. timeout .. ends .. '\0' .. request .. '\0' .. since
    .. '\0' .. where
end

-- True where several may hold it.
local function several(h) local b = h:byte(1) return b == 42 or b == 38 end

local function waited_for(h) local b = h:byte(1) return b == 43 or b == 85 or b == 38 end

local function unclaimed(h) local b = h:byte(1) return b == 117 or b == 85 end

local WAITED = {['-'] = '+', u = 'U', ['*'] = '&'}
local FREE = {['+'] = '-', U = 'u', ['&'] = '*'}

-- Notes whether anybody waits for it; what is stored from then on.
local function mark(name, h, waits)
  local flag = (waits and WAITED or FREE)[h:sub(1, 1)]
  if not flag then return h end
  h = flag .. h:sub(2)
  redis.call('HSET', KEYS[2], name, h)
  return h
end

-- The text of a fixed deadline. The session's record is kept as long, or nobody would sweep the lease.
local function fixed_end(sid, now, timeout)
  local ends = text(now + timeout)
  redis.call('ZADD', KEYS[6], 'GT', ends, sid)
  return '@' .. ends
end

-- A holder may stop renewing long before its session ends: some heartbeat has to look at the lock then.
local function look_after(name, at) redis.call('ZADD', KEYS[6], 'LT', text(at), '!' .. name) end

-- When to look at a lock that is waited for and whose first holder has that long left. Who could join several holders may
-- stand behind one who falls silent; the more they are, the longer a look takes, and the seldomer there is one.
local function next_look(h, now, rest)
  if several(h) then rest = math.min(rest, CLAIM * math.max(1, tonumber(h:match('%z(%d+)$')) / 100)) end
  return math.max(now + rest, grace_ends)
end

-- True of a session that is forgotten, or has been silent for longer than its longest lease. `s` is what `session` gives.
local function is_dead(s, now)
  local seen, longest = (s or ''):match('^%d+ %d+ (%d+) (%d+)')
  return not seen or seen + longest <= now
end

-- The sessions of all of these, by their ids; `sid_of` says whose each is.
local function sessions_of(all, sid_of)
  local sids, found = {}, {}
  for _, one in ipairs(all) do
    local sid = sid_of(one)
    if found[sid] == nil then
      found[sid] = false
      sids[#sids + 1] = sid
    end
  end
  for i, s in ipairs(values(KEYS[1], sids)) do found[sids[i]] = s end
  return found
end

-- Milliseconds that the lease of a RECORD has left; zero or less when it has ended. `sessions` has its session, if given.
local function left(h, now, sessions)
  local _, _, sid, timeout, deadline = parse(h)
  local seen
  if sessions then seen = seen_in(sessions[sid]) else seen = seen_of(sid) end
  if unclaimed(h) then return seen and seen + math.min(timeout, CLAIM) - now or 0 end
  if deadline then return deadline - now end
  return seen and seen + timeout - now or 0
end

-- The RECORDs of all who hold it, h being what stands under its name, and under which field each stands.
local function holders(name, h)
  if not h then return {}, {} end
  if not several(h) then return {h}, {name} end
  local fields = redis.call('ZRANGEBYLEX', KEYS[3], '[\0' .. name .. '\0', '(\0' .. name .. '\1')
  for i, member in ipairs(fields) do fields[i] = member:sub(2) end
  return values(KEYS[2], fields), fields
end

-- The RECORD under a fence, the field under which it stands, and what stands under the lock's name.
local function held_under(name, fence)
  local h = redis.call('HGET', KEYS[2], name)
  if not h then return nil end
  if not several(h) then
    if h:sub(2, #fence + 2) == fence .. '\0' then return h, name, h end
    return nil
  end
  local field = name .. '\0' .. fence
  return redis.call('HGET', KEYS[2], field) or nil, field, h
end

-- Takes one holder out; what stands under the name then, if anything.
local function drop(name, h, field)
  if field == name then
    redis.call('HDEL', KEYS[2], name)
    return nil
  end
  redis.call('ZREM', KEYS[3], '\0' .. field)
  local head, count = h:match('^([^%z]*%z)(%d+)$')
  if count == '1' then
    redis.call('HDEL', KEYS[2], field, name)
    return nil
  end
  redis.call('HDEL', KEYS[2], field)
  h = head .. text(count - 1)
  redis.call('HSET', KEYS[2], name, h)
  return h
end

-- Writes a holder down; h is what stands under the name so far.
local function hold(name, h, mode, fence, rec)
  if mode == 'x' then
    redis.call('HSET', KEYS[2], name, rec)
    return
  end
  local head, count = (h and '&' or '*') .. mode .. '\0', 0
  if h and not nobody(h) then head, count = h:match('^([^%z]*%z)(%d+)$') end
  redis.call('HSET', KEYS[2], name, head .. text(count + 1), name .. '\0' .. fence, rec)
  redis.call('ZADD', KEYS[3], 0, '\0' .. name .. '\0' .. fence)
end

-- Whether one more may hold it: true, false, or nil where it is used in a way that does not go with this.
local function joins(h, mode)
  if not h or nobody(h) then return true end
  local had, count = 'x', 1
  if several(h) then had, count = h:match('^.([^%z]*)%z(%d+)$') end
  if (mode:byte(1) == 107 or had:byte(1) == 107) and mode ~= had then return nil end
  if mode == 'x' or had == 'x' then return false end
  return mode == 's' or tonumber(count) < tonumber(mode:sub(2))
end

-- Tells a session what it lost, leases by their fences or places in a queue by their numbers: stored until
-- acknowledged, and pushed.
local function tell_all(sid, notes)
  if not redis.call('HGET', KEYS[1], sid) then return end
  local list = {redis.call('HGET', KEYS[1], '!' .. sid) or ''}
  for _, note in ipairs(notes) do
    list[#list + 1] = note[1] .. ' ' .. note[2] .. ';'
    redis.call('PUBLISH', ARGV[#ARGV] .. sid, 'x\0' .. note[1] .. '\0' .. note[2])
  end
  redis.call('HSET', KEYS[1], '!' .. sid, table.concat(list))
end

local function tell(sid, what, reason) tell_all(sid, {{what, reason}}) end

local function revoke(h, reason)
  local fence, _, sid = parse(h)
  tell(sid, fence, reason)
end

-- Takes away what has ended; what stands under the name then, whether anything was taken, and the milliseconds until
-- the first of the others ends, unless it is renewed.
local function prune(name, h, now)
  local records, fields = holders(name, h)
  local sessions = sessions_of(records, sid_in)
  local taken, rest = false, math.huge
  for i, rec in ipairs(records) do
    local its = left(rec, now, sessions)
    if its <= 0 then
      revoke(rec, 'expired')
      h = drop(name, h, fields[i])
      taken = true
    else
      rest = math.min(rest, its)
    end
  end
  return h, taken, rest == math.huge and 0 or rest
end

local function waiter(w)
  local name, rank, owners, sid, timeout, since, mode, held, at = struct.unpack('ssssssss', w)
  local lasts, fixed = timeout:match('^(%d+)(@?)$')
  local count, policy = held:match('^(%d*)(%a?)$')
  return {name = name, rank = rank, owners = owners, sid = sid, timeout = lasts, fixed = fixed, since = since,
    mode = mode, held = tonumber(count), policy = policy, where = w:sub(at)}
end

local function requests_of(owner)
  return (redis.call('HGET', KEYS[4], 'o' .. owner) or ''):gmatch('%S+')
end

-- A task or thread waits for one thing at a time. Somebody who awaits others waits for as many as they do.
local function enter(request, owners, rec)
  if not owners:find('\1', 1, true) and owners:byte(1) ~= 61 then
    redis.call('HSET', KEYS[4], 'r' .. request, rec, 'o' .. owners, request)
    return
  end
  redis.call('HSET', KEYS[4], 'r' .. request, rec)
  for owner in owners:gmatch('[^\1]+') do
    local rest = {request}
    for other in requests_of(owner) do
      if other ~= request then rest[#rest + 1] = other end
    end
    redis.call('HSET', KEYS[4], 'o' .. owner, table.concat(rest, ' '))
  end
end

local function leave(request, owners)
  if not owners:find('\1', 1, true) and owners:byte(1) ~= 61 then
    redis.call('HDEL', KEYS[4], 'r' .. request, 'o' .. owners)
    return
  end
  redis.call('HDEL', KEYS[4], 'r' .. request)
  for owner in owners:gmatch('[^\1]+') do
    local rest = {}
    for other in requests_of(owner) do
      if other ~= request then rest[#rest + 1] = other end
    end
    if rest[1] then
      redis.call('HSET', KEYS[4], 'o' .. owner, table.concat(rest, ' '))
    else
      redis.call('HDEL', KEYS[4], 'o' .. owner)
    end
  end
end

local function leave_queue(request, w)
  redis.call('ZREM', KEYS[3], w.name .. '\0' .. w.rank .. '\0' .. request)
  leave(request, w.owners)
end

-- Too long silent to be given anything.
local function is_silent(w, seen, now) return not seen or seen + math.min(tonumber(w.timeout), CLAIM) <= now end

-- As `serve`, noting whom to tell of a place that is lost, and why.
local function hand_on(name, h, now, notes, why)
  local passed = 0
  local function pass_over(w, request, reason)
    passed = passed + 1
    leave_queue(request, w)
    local its = notes[w.sid] or {}
    notes[w.sid] = its
    its[#its + 1] = {request:match('(%d+)$'), reason}
  end
  if grace_ends > now then
    local waits = redis.call('ZRANGEBYLEX', KEYS[3], '[' .. name .. '\0', '(' .. name .. '\1', 'LIMIT', 0, 1)[1]
    if not waits then
      if nobody(h) then redis.call('HDEL', KEYS[2], name) end
      return
    end
    if not h then redis.call('HSET', KEYS[2], name, NOBODY) end
    look_after(name, grace_ends)
    return
  end
  local called = h and tonumber(h:match('^&r(%d+)'))
  while true do
    if passed >= PASSED then
      -- The rest in another script, or the server would serve nobody else meanwhile.
      if not h then
        redis.call('HSET', KEYS[2], name, NOBODY)
      else
        mark(name, h, true)
      end
      look_after(name, now + 1)
      return true
    end
    local q = redis.call('ZRANGEBYLEX', KEYS[3], '[' .. name .. '\0', '(' .. name .. '\1', 'LIMIT', 0, 2)
    if not q[1] then
      if nobody(h) then
        redis.call('HDEL', KEYS[2], name)
        return false
      end
      if h then mark(name, h, false) end
      return h and true
    end
    local request = request_in(q[1])
    local raw = redis.call('HGET', KEYS[4], 'r' .. request)
    if not raw then
      redis.call('ZREM', KEYS[3], q[1])
    else
      local w = waiter(raw)
      local seen, stamp = seen_of(w.sid)
      if is_silent(w, seen, now) then
        -- If its session comes back, it has to ask again.
        pass_over(w, request, why)
      elseif called and seen < called then
        if now < called + ROLL_CALL then
          look_after(name, called + ROLL_CALL)
          return true
        end
        -- It may have died with the holder. If it has not, it asks again and gets its place back.
        pass_over(w, request, 'late')
      elseif not joins(h, w.mode) then
        mark(name, h, true)
        return true
      else
        leave_queue(request, w)
        local fence = text(next_fence(KEYS[5]))
        local ends = w.fixed == '@' and fixed_end(w.sid, now, w.timeout) or ''
        local owner = w.owners:match('^[^\1]*')
        local flag = w.mode == 'x' and q[2] and 'U' or 'u'
        hold(name, h, w.mode, fence, record(flag, fence, owner, w.sid, w.timeout, ends, request, w.since, w.where))
        if q[2] then look_after(name, now + math.min(tonumber(w.timeout), CLAIM)) end
        redis.call('PUBLISH', ARGV[#ARGV] .. w.sid, 'g\0' .. name .. '\0' .. request .. '\0' .. fence .. '\0' .. stamp)
        if w.mode == 'x' then return true end
        h = redis.call('HGET', KEYS[2], name)
      end
    end
  end
end

-- Hands the lock to those who wait, in their order, as far as it can be had; h is what stands under its name. True where
-- somebody else stands under it then. Who is passed over for his silence loses his place; told "late", he gets it back.
local function serve(name, h, now, why)
  local notes = {}
  local done = hand_on(name, h, now, notes, why or 'dropped')
  for sid, its in pairs(notes) do tell_all(sid, its) end
  return done
end

-- The holder has died, and others may have died with it: those who wait are called, and who answers first in their order
-- is given the lock, where it would else be given to dead ones, each for as long as its session is believed to live.
-- What stands under the name from here on.
local function call_waiters(name, now)
  local called = {}
  for _, member in ipairs(redis.call('ZRANGEBYLEX', KEYS[3], '[' .. name .. '\0', '(' .. name .. '\1', 'LIMIT', 0, CALLED)) do
    local raw = redis.call('HGET', KEYS[4], 'r' .. request_in(member))
    local sid = raw and waiter(raw).sid
    if sid and not called[sid] then
      called[sid] = true
      redis.call('PUBLISH', ARGV[#ARGV] .. sid, 'w\0' .. name)
    end
  end
  if not next(called) then return nil end
  local h = CALL .. text(now) .. '\0000'
  redis.call('HSET', KEYS[2], name, h)
  look_after(name, now + ROLL_CALL)
  return h
end
