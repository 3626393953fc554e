-- ARGV 1 sid 2 gen 3 stamp 4 longest lease ms 5 mode: "n" open a new session, "r" resume one, "h" keep it
--      6 who it is (JSON, where opened) 7 revocations acknowledged, as they were sent
--      8.. pairs lock, fence that are claimed; last: prefix of the inbox channels
-- Replies {1, epoch, stamp, revocations, accepted fences...}; {0, epoch} no such session; {-3} older generation
local sid, gen, stamp, mode = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[5]
local now = judge(KEYS[5])
local epoch = redis.call('HGET', KEYS[5], 'e')
if not epoch then
  local t = redis.call('TIME')
  epoch = t[1] .. string.format('%06d', t[2])
  redis.call('HSET', KEYS[5], 'e', epoch)
end
local s = redis.call('HGET', KEYS[1], sid)
if s then
  local had_gen, had_stamp = s:match('^(%d+) (%d+)')
  if tonumber(had_gen) > gen then return {-3} end
  stamp = math.max(stamp, tonumber(had_stamp))
elseif mode ~= 'n' then
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
local reply = {1, epoch, text(stamp), taken or ''}
for i = 8, #ARGV - 2, 2 do
  local h = redis.call('HGET', KEYS[2], ARGV[i])
  if h and h:sub(2, #ARGV[i + 1] + 2) == ARGV[i + 1] .. '\0' then
    local flag = h:byte(1)
    if flag == 117 then redis.call('HSET', KEYS[2], ARGV[i], '-' .. h:sub(2))
    elseif flag == 85 then redis.call('HSET', KEYS[2], ARGV[i], '+' .. h:sub(2)) end
    reply[#reply + 1] = ARGV[i + 1]
  end
end

-- What has come due: locks that are waited for, and sessions.
local dead = false
for _, member in ipairs(redis.call('ZRANGEBYSCORE', KEYS[6], '-inf', now, 'LIMIT', 0, 20)) do
  if member:byte(1) ~= 33 then
    dead = true
  else
    local name = member:sub(2)
    local h = redis.call('HGET', KEYS[2], name)
    redis.call('ZREM', KEYS[6], member)
    if h and left(h, now) <= 0 then
      revoke(h, 'expired')
      grant_next(name, now)
    elseif h and waited_for(h) then
      look_after(name, now + left(h, now))
    end
  end
end

-- Sweep, a few entries per heartbeat and only while some session is dead: what it held goes to those who wait.
if dead then
  local cursor = redis.call('HGET', KEYS[5], 'c') or '0'
  if cursor == '0' then redis.call('HSET', KEYS[5], 'p', text(now)) end
  local page = redis.call('HSCAN', KEYS[2], cursor, 'COUNT', 20)
  for i = 1, #page[2], 2 do
    -- A page may name an entry twice: the second time it is somebody else's.
    if left(page[2][i + 1], now) <= 0 and redis.call('HGET', KEYS[2], page[2][i]) == page[2][i + 1] then
      revoke(page[2][i + 1], 'expired')
      grant_next(page[2][i], now)
    end
  end
  redis.call('HSET', KEYS[5], 'c', page[1])
  if page[1] == '0' then
    local ended = redis.call('ZRANGEBYSCORE', KEYS[6], '-inf', redis.call('HGET', KEYS[5], 'p'), 'LIMIT', 0, 50)
    for _, d in ipairs(ended) do
      if d:byte(1) ~= 33 then
        redis.call('HDEL', KEYS[1], d, '@' .. d, '!' .. d)
        redis.call('ZREM', KEYS[6], d)
      end
    end
  end
end
return reply
