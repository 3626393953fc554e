-- ARGV 1 monitor 2 how long a silent one is believed to live, ms; 0 leaves at once
-- Replies {life of the data and count of all changes, monitors that live...}: whoever checks the health of others meets here.
local now = judge(KEYS[2])
if ARGV[2] == '0' then
  redis.call('ZREM', KEYS[7], ARGV[1])
else
  redis.call('ZADD', KEYS[7], now + ARGV[2], ARGV[1])
end
redis.call('ZREMRANGEBYSCORE', KEYS[7], '-inf', now)
local reply = redis.call('ZRANGE', KEYS[7], 0, -1)
table.insert(reply, 1, (redis.call('HGET', KEYS[2], 'e') or '') .. ' ' .. (redis.call('HGET', KEYS[2], 'g') or '0'))
return reply
