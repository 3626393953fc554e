-- ARGV 1 lock 2 fence 3 prefix of the inbox channels. Replies 1 given back, 0 not held under that fence.
local h = redis.call('HGET', KEYS[2], ARGV[1])
if not h then return 0 end
local flag = h:byte(1)
if flag ~= 42 and flag ~= 38 then
  if h:sub(2, #ARGV[2] + 2) ~= ARGV[2] .. '\0' then return 0 end
  if flag == 45 or flag == 117 then
    redis.call('HDEL', KEYS[2], ARGV[1])
    return 1
  end
end
-- Waited for, and whoever is next wants nothing unusual: what `serve` does, without the functions that it needs.
if flag == 43 or flag == 85 then
  local q = redis.call('ZRANGEBYLEX', KEYS[3], '[' .. ARGV[1] .. '\0', '(' .. ARGV[1] .. '\1', 'LIMIT', 0, 2)
  local request = q[1] and q[1]:sub((select(3, struct.unpack('ss', q[1]))))
  local w = request and redis.call('HGET', KEYS[4], 'r' .. request)
  local owner, sid, timeout, since, mode, where, _
  if w then
    _, _, owner, sid, timeout, since, mode, _, where = struct.unpack('ssssssss', w)
    where = w:sub(where)
  end
  -- One owner, whose time is not fixed ("@"), and who wants it alone.
  if mode == 'x' and owner:byte(1) ~= 61 and not owner:find('\1', 1, true) and (tonumber(timeout) or 0) >= 3000 then
    local s = redis.call('HGET', KEYS[1], sid)
    local stamp, seen = (s or ''):match('^%d+ (%d+) (%d+)')
    -- The clock as the last heartbeat stored it: as the holder is alive, that is not long ago. It makes who has been
    -- silent for too long seem to be alive for a little longer, and the lock be looked at a little sooner.
    local now = tonumber(redis.call('HGET', KEYS[5], 'l'))
    if seen and now and seen + 3000 > now then
      local f = redis.call('HINCRBY', KEYS[5], 'f', 1)
      if f >= 1000000000000000 then
        local fence = string.format('%.0f', f)
        redis.call('ZREM', KEYS[3], q[1])
        redis.call('HDEL', KEYS[4], 'r' .. request, 'o' .. owner)
        redis.call('HSET', KEYS[2], ARGV[1], (q[2] and 'U' or 'u') .. fence .. '\0' .. owner .. '\0' .. sid .. '\0' .. timeout
          .. '\0' .. request .. '\0' .. since .. '\0' .. where)
        -- A lease that was not claimed itself is looked at before a claim of now would be due.
        if q[2] and flag == 43 then redis.call('ZADD', KEYS[6], 'LT', string.format('%.0f', now + 3000), '!' .. ARGV[1]) end
        redis.call('PUBLISH', ARGV[3] .. sid, 'g\0' .. ARGV[1] .. '\0' .. request .. '\0' .. fence .. '\0' .. stamp)
        return 1
      end
    end
  end
end
