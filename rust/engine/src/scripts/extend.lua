-- ARGV 1 lock 2 fence 3 new timeout ms 4 sid 5 gen 6 prefix of the inbox channels.
-- Replies {1, stamp} extended, {0} not held under that fence or already ended, or asked on an older connection:
-- a late command must not shorten what a newer one has made longer.
local s = redis.call('HGET', KEYS[1], ARGV[4])
local gen, stamp = (s or ''):match('^(%d+) (%d+)')
if gen ~= ARGV[5] then return {0} end
local h = redis.call('HGET', KEYS[2], ARGV[1])
if not h or h:sub(2, #ARGV[2] + 2) ~= ARGV[2] .. '\0' then return {0} end
local now = judge(KEYS[5])
if left(h, now) <= 0 then return {0} end
local head, ends, tail = h:match('^(.%d+%z.-%z.-%z)%d+(@?)%d*(%z.*)$')
if ends == '@' then ends = fixed_end(ARGV[4], now, ARGV[3]) end
redis.call('HSET', KEYS[2], ARGV[1], head .. ARGV[3] .. ends .. tail)
if waited_for(h) then look_after(ARGV[1], now + ARGV[3]) end
return {1, stamp}
