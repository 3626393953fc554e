-- In partition 0 stands who waits for long anywhere, so that nobody has to ask everywhere. KEYS:
--   1 notes  zset  owner \0 request, all of score 0     2 ages  zset  the same -> when it was last said, server ms
-- ARGV 1 how many of these wait, the others do so no more 2.. owner \0 request. Who has died says nothing any more.
local OLD, BATCH = 30000, 100
local t = redis.call('TIME')
local now = math.floor(t[1] * 1000 + t[2] / 1000)
for i = 2, #ARGV do
  if i <= ARGV[1] + 1 then
    redis.call('ZADD', KEYS[1], 0, ARGV[i])
    redis.call('ZADD', KEYS[2], now, ARGV[i])
  else
    redis.call('ZREM', KEYS[1], ARGV[i])
    redis.call('ZREM', KEYS[2], ARGV[i])
  end
end
for _, note in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now - OLD, 'LIMIT', 0, BATCH)) do
  redis.call('ZREM', KEYS[1], note)
  redis.call('ZREM', KEYS[2], note)
end
return 1
