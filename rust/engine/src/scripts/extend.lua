-- ARGV 1 lock 2 fence 3 new timeout ms 4 sid 5 gen 6 prefix of the inbox channels.
-- Replies {1, stamp} extended, {0} not held under that fence or already ended.
local h = redis.call('HGET', KEYS[2], ARGV[1])
if not h or h:sub(2, #ARGV[2] + 2) ~= ARGV[2] .. '\0' then return {0} end
local now = judge(KEYS[5])
if left(h, now) <= 0 then return {0} end
local head, ends, tail = h:match('^(.%d+%z.-%z.-%z)%d+(@?)%d*(%z.*)$')
if ends == '@' then ends = '@' .. text(now + ARGV[3]) end
redis.call('HSET', KEYS[2], ARGV[1], head .. ARGV[3] .. ends .. tail)
local _, stamp = seen_of(ARGV[4])
return {1, stamp or '0'}
