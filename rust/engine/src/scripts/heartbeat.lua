-- ARGV 1 sid 2 gen 3 stamp 4 longest lease ms
--      5 mode: "n" open a new session, "k"epoch number the same by one who knew that life of the data, and which token or
--        rank it had given out last, "r"epoch number resume one, "h" keep it
--      6 who it is (JSON, where opened) 7 revocations acknowledged, as they were sent
--      8 which process serves, where opened or resumed 9.. pairs lock, fence that are claimed; last: prefix of the inbox channels
-- Replies {1, epoch, stamp, revocations, ms until something comes due or -1, 1 where leases can be taken back,
--          the last token or rank given out, accepted fences...}; {0, epoch} no such session; {-3} older generation
local GRACE, SHORT_GRACE, YOUNG, TAKING_BACK, BATCH, BURIED, RECORDS, DEAD = 3000, 700, 5, 10000, 50, 200, 1000, 1000000000000000
-- Numbers that may have been given out since somebody was told of the last one.
local UNHEARD = 1000000
local sid, gen, stamp, mode = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[5]:sub(1, 1)
local now = judge(KEYS[5], true)
local m = redis.call('HMGET', KEYS[5], 'e', 'i', 'y', 'b', 'f', 't', 'a')
local epoch, taking_back = m[1], tonumber(m[3]) or 0
local last = math.max(tonumber(m[5]) or 0, tonumber(m[6]) or 0, tonumber(m[7]) or 0)
local knew, told = ARGV[5]:match('^[kr](%d+) (%d+)$')
told = tonumber(told) or 0

-- Until then nothing is granted, so that those who held something before the data was lost can take it back.
local function wait_until(ends)
  grace_ends = math.max(grace_ends, ends)
  redis.call('HSET', KEYS[5], 'z', text(grace_ends))
end

if not epoch then
  epoch = text(micros())
  taking_back = now + TAKING_BACK
  redis.call('HSET', KEYS[5], 'e', epoch, 'i', ARGV[8], 'b', text(now), 'y', text(taking_back))
  -- A newcomer can't know whether there was anything. A server that has just started may have lost it.
  if mode == 'k' then
    wait_until(now + GRACE)
  elseif (tonumber(redis.call('INFO', 'server'):match('uptime_in_seconds:(%-?%d+)')) or 0) < YOUNG then
    wait_until(now + SHORT_GRACE)
  end
elseif mode == 'k' and knew ~= epoch and (tonumber(m[5]) or 0) < SEEDED then
  local ends = (tonumber(m[4]) or 0) + GRACE
  if ends > now then wait_until(ends) end
end
if ARGV[8] ~= '' and m[1] and m[2] ~= ARGV[8] then
  -- Another process serves the same data, perhaps without the last of it: numbers that it gave out are not given again.
  taking_back = now + TAKING_BACK
  redis.call('HSET', KEYS[5], 'i', ARGV[8], 'y', text(taking_back))
  -- Where a sweep has come to is a place in the memory of that process.
  redis.call('HDEL', KEYS[5], 'c')
  if last >= SEEDED then told = math.max(told, last, micros() - UNHEARD) end
end
-- Numbers that were given out may be ahead of the data, and of the clock, which may have been stepped back since.
if told >= SEEDED then
  if knew ~= epoch or taking_back > now then told = told + UNHEARD end
  numbers_above(KEYS[5], told)
  last = math.max(last, told)
end

local s = redis.call('HGET', KEYS[1], sid)
if s then
  local had_gen, had_stamp = s:match('^(%d+) (%d+)')
  if tonumber(had_gen) > gen then return {-3} end
  stamp = math.max(stamp, tonumber(had_stamp))
elseif mode ~= 'n' and mode ~= 'k' then
  return {0, epoch}
end
local ends = now + ARGV[4]
redis.call('HSET', KEYS[1], sid, text(gen) .. ' ' .. text(stamp) .. ' ' .. text(now) .. ' ' .. ARGV[4])
redis.call('ZADD', KEYS[6], ends, sid)
if ARGV[6] ~= '' then redis.call('HSET', KEYS[1], '@' .. sid, ARGV[6]) end

local taken = redis.call('HGET', KEYS[1], '!' .. sid)
if taken and ARGV[7] ~= '' and taken:sub(1, #ARGV[7]) == ARGV[7] then
  taken = taken:sub(#ARGV[7] + 1)
  if taken == '' then redis.call('HDEL', KEYS[1], '!' .. sid) else redis.call('HSET', KEYS[1], '!' .. sid, taken) end
end
local accepted = {}
for i = 9, #ARGV - 2, 2 do
  local h, field = held_under(ARGV[i], ARGV[i + 1])
  local _, by, its
  if h then _, _, by, _, _, its = parse(h) end
  -- After a failover it may still be his who has offered it to this session.
  if by == sid and its ~= 'offered' then
    local flag = h:byte(1)
    if flag == 117 then redis.call('HSET', KEYS[2], field, '-' .. h:sub(2))
    elseif flag == 85 then redis.call('HSET', KEYS[2], field, '+' .. h:sub(2)) end
    accepted[#accepted + 1] = ARGV[i + 1]
  end
end

-- Milliseconds until the first lease ends that nobody's session ends: it is offered, or its session is dead. None if there
-- is no such lease.
local function unattended(name, h)
  local first
  local records = holders(name, h)
  local sessions = sessions_of(records, sid_in)
  for _, rec in ipairs(records) do
    local _, _, by, _, _, its = parse(rec)
    if its == 'offered' or is_dead(sessions[by], now) then
      first = math.min(first or math.huge, left(rec, now, sessions))
    end
  end
  return first
end

-- True where somebody could join those who hold it, but for those ahead of him who are silent; or too many of these.
local function held_up(name, h)
  if not joins(h, h:match('^.([^%z]*)%z')) then return false end
  local from, size = 0, 1
  while from < PASSED do
    local some = redis.call('ZRANGEBYLEX', KEYS[3], '[' .. name .. '\0', '(' .. name .. '\1', 'LIMIT', from, size)
    for _, member in ipairs(some) do
      local raw = redis.call('HGET', KEYS[4], 'r' .. request_in(member))
      if not raw then return true end
      local w = waiter(raw)
      if joins(h, w.mode) then return true end
      if not is_silent(w, seen_of(w.sid), now) then return false end
    end
    if #some < size then return false end
    from, size = from + size, PASSED
  end
  return true
end

-- What has come due: locks that are waited for, and sessions.
-- The dead are put aside, where the scores of the living end, until their leases were found; a heartbeat brings one back.
local members = redis.call('ZRANGEBYSCORE', KEYS[6], '-inf', now, 'LIMIT', 0, BATCH)
local looked_at, enough = 0, false
for _, member in ipairs(members) do
  if looked_at > RECORDS then
    -- The rest in the next heartbeat, or the server would serve nobody else meanwhile.
    enough = true
    break
  end
  if member:byte(1) ~= 33 then
    redis.call('ZADD', KEYS[6], text(DEAD + now), member)
  else
    local name = member:sub(2)
    redis.call('ZREM', KEYS[6], member)
    local h, taken, rest = redis.call('HGET', KEYS[2], name)
    looked_at = looked_at + (h and several(h) and tonumber(h:match('%z(%d+)$')) or 1)
    h, taken, rest = prune(name, h, now)
    if taken or not h or nobody(h) then
      if taken and not h and grace_ends <= now then h = call_waiters(name, now) end
      serve(name, h, now)
      -- Those who still hold it are looked after as before.
      if rest > 0 then look_after(name, next_look(h, now, rest)) end
    elseif waited_for(h) then
      -- Whoever comes first may join them since: one ahead has fallen silent, or a grace is over.
      if several(h) and held_up(name, h) then serve(name, h, now, 'late') end
      look_after(name, next_look(h, now, rest))
    else
      local ends = unattended(name, h)
      if ends then look_after(name, now + ends) end
    end
  end
end

-- Sweep, a few entries per heartbeat and only while some session is dead: what it held goes to those who wait.
if redis.call('ZRANGEBYSCORE', KEYS[6], text(DEAD), '+inf', 'LIMIT', 0, 1)[1] then
  local cursor = redis.call('HGET', KEYS[5], 'c') or '0'
  if cursor == '0' then redis.call('HSET', KEYS[5], 'p', text(now)) end
  local page = redis.call('HSCAN', KEYS[2], cursor, 'COUNT', 20)
  for i = 1, #page[2], 2 do
    local field, rec = page[2][i], page[2][i + 1]
    local name, rest = field:match('^[^%z]*'), several(rec) and 1 or left(rec, now)
    if rest > 0 then
      -- Its session forgets it, or is forgotten, before it ends.
      if not several(rec) and is_dead(session(sid_in(rec)), now) then look_after(name, now + rest) end
    -- A page may name an entry twice: the second time it is somebody else's.
    elseif redis.call('HGET', KEYS[2], field) == rec then
      revoke(rec, 'expired')
      local h = drop(name, redis.call('HGET', KEYS[2], name), field)
      if not h and grace_ends <= now then h = call_waiters(name, now) end
      serve(name, h, now)
    end
  end
  redis.call('HSET', KEYS[5], 'c', page[1])
  if page[1] == '0' then
    local begun = text(DEAD + redis.call('HGET', KEYS[5], 'p'))
    for _, d in ipairs(redis.call('ZRANGEBYSCORE', KEYS[6], text(DEAD), begun, 'LIMIT', 0, BURIED)) do
      -- What it had asked for may come late, and be granted behind the sweep: so there is another one, when it can no
      -- longer be.
      if redis.call('HDEL', KEYS[1], d, '@' .. d, '!' .. d) > 0 then
        redis.call('ZADD', KEYS[6], text(DEAD + now), d)
      else
        redis.call('ZREM', KEYS[6], d)
      end
    end
  end
end

local due = -1
if enough or #members == BATCH then
  due = 0
else
  local next_one = redis.call('ZRANGEBYSCORE', KEYS[6], '(' .. text(now), '(' .. text(DEAD), 'WITHSCORES', 'LIMIT', 0, 1)
  if next_one[2] then due = math.ceil(tonumber(next_one[2]) - now) end
end
return {1, epoch, text(stamp), taken or '', due, taking_back > now and 1 or 0, last, unpack(accepted)}
