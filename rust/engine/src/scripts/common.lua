-- Shared by every script that leaves its fast path. KEYS, the same in all lock scripts:
--   1 sessions  hash  sid -> "gen stamp seen longest"; "@"sid -> who it is; "!"sid -> what was taken from it
--   2 holders   hash  lock -> flag fence \0 owner \0 sid \0 timeout[@deadline] \0 request \0 since
--                     flag: "-" claimed, "+" claimed and waited for, "u" and "U" the same before the claim
--   3 queue     zset  lock \0 ticket \0 request, all of score 0
--   4 waiters   hash  "r"request -> lock \0 ticket \0 owner \0 sid \0 timeout[@] \0 since; "o"owner -> request
--   5 meta      hash  l logical clock, w wall clock, e epoch, f fence counter, c sweep cursor, p start of the sweep
--   6 expiry    zset  sid -> logical time at which its last lease ends; "!"lock, where somebody waits -> when its
--                     lease will have ended if it is not renewed
-- Times are milliseconds. A grant out of the queue counts only CLAIM until a heartbeat has claimed it.
local CLAIM = 3000
local GAP = 2000

local function text(n) return string.format('%.0f', n) end

-- The partition's logical clock: follows the server's, never goes back, and does not advance over a gap that
-- only a step of the clock or a pause of the server can have made.
local function judge(meta)
  local t = redis.call('TIME')
  local w = t[1] * 1000 + math.floor(t[2] / 1000)
  local m = redis.call('HMGET', meta, 'l', 'w')
  local l = tonumber(m[1]) or w
  local gap = w - (tonumber(m[2]) or w)
  if gap > 0 and gap <= GAP then l = l + gap end
  redis.call('HSET', meta, 'l', text(l), 'w', text(w))
  return l
end

-- Strictly increasing, also over a server that lost its data: a new counter starts from the server's clock.
local function next_fence(meta)
  local f = redis.call('HINCRBY', meta, 'f', 1)
  if f < 1000000000000000 then
    local t = redis.call('TIME')
    f = t[1] * 1000000 + t[2]
    redis.call('HSET', meta, 'f', text(f))
  end
  return f
end

local function seen_of(sid)
  local s = redis.call('HGET', KEYS[1], sid)
  if not s then return nil end
  local stamp, seen = s:match('^%d+ (%d+) (%d+)')
  return tonumber(seen), stamp
end

local function parse(h)
  local fence, owner, sid, timeout, deadline, request = h:match('^.(%d+)%z(.-)%z(.-)%z(%d+)@?(%d*)%z(.-)%z')
  return fence, owner, sid, tonumber(timeout), tonumber(deadline), request
end

-- The text of a fixed deadline. The session's record is kept as long, or nobody would sweep the lease.
local function fixed_end(sid, now, timeout)
  local ends = text(now + timeout)
  redis.call('ZADD', KEYS[6], 'GT', ends, sid)
  return '@' .. ends
end

-- A holder may stop renewing long before its session ends: some heartbeat has to look at the lock then.
local function look_after(name, at) redis.call('ZADD', KEYS[6], 'LT', text(at), '!' .. name) end

local function waited_for(h) local b = h:byte(1) return b == 43 or b == 85 end

local function unclaimed(h) local b = h:byte(1) return b == 117 or b == 85 end

-- Milliseconds that the lease has left; zero or less when it has ended.
local function left(h, now)
  local _, _, sid, timeout, deadline = parse(h)
  local seen = seen_of(sid)
  if unclaimed(h) then return seen and seen + math.min(timeout, CLAIM) - now or 0 end
  if deadline then return deadline - now end
  return seen and seen + timeout - now or 0
end

-- Tells a session what it lost, a lease by its fence or a place in a queue by its number: stored until acknowledged,
-- and pushed.
local function tell(sid, what, reason)
  if not redis.call('HGET', KEYS[1], sid) then return end
  local list = redis.call('HGET', KEYS[1], '!' .. sid) or ''
  redis.call('HSET', KEYS[1], '!' .. sid, list .. what .. ' ' .. reason .. ';')
  redis.call('PUBLISH', ARGV[#ARGV] .. sid, 'x\0' .. what .. '\0' .. reason)
end

local function revoke(h, reason)
  local fence, _, sid = parse(h)
  tell(sid, fence, reason)
end

local function leave_queue(request, w)
  local name, ticket, owner = w:match('^(.-)%z(.-)%z(.-)%z')
  redis.call('ZREM', KEYS[3], name .. '\0' .. ticket .. '\0' .. request)
  redis.call('HDEL', KEYS[4], 'r' .. request)
  if redis.call('HGET', KEYS[4], 'o' .. owner) == request then redis.call('HDEL', KEYS[4], 'o' .. owner) end
end

-- The lock is free: the next live waiter holds it from here on, or nobody does.
local function grant_next(name, now)
  while true do
    local q = redis.call('ZRANGEBYLEX', KEYS[3], '[' .. name .. '\0', '(' .. name .. '\1', 'LIMIT', 0, 2)
    if not q[1] then redis.call('HDEL', KEYS[2], name) return end
    local request = q[1]:match('([^%z]*)$')
    local w = redis.call('HGET', KEYS[4], 'r' .. request)
    if not w then
      redis.call('ZREM', KEYS[3], q[1])
    else
      leave_queue(request, w)
      local _, _, owner, sid, timeout, fixed, since = w:match('^(.-)%z(.-)%z(.-)%z(.-)%z(%d+)(@?)%z(.*)$')
      local seen, stamp = seen_of(sid)
      if seen and seen + math.min(tonumber(timeout), CLAIM) > now then
        local fence = text(next_fence(KEYS[5]))
        local ends = fixed == '@' and fixed_end(sid, now, timeout) or ''
        redis.call('HSET', KEYS[2], name, (q[2] and 'U' or 'u') .. fence .. '\0' .. owner .. '\0' .. sid .. '\0'
          .. timeout .. ends .. '\0' .. request .. '\0' .. since)
        if q[2] then look_after(name, now + math.min(tonumber(timeout), CLAIM)) end
        redis.call('PUBLISH', ARGV[#ARGV] .. sid, 'g\0' .. name .. '\0' .. request .. '\0' .. fence .. '\0' .. stamp)
        return
      end
      -- Too long silent to be given anything; if its session comes back, it has to ask again.
      tell(sid, request:match('(%d+)$'), 'dropped')
    end
  end
end
