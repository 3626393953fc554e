-- ARGV 1 lock 2 fence 3 new timeout ms 4 sid 5 gen 6 prefix of the inbox channels.
-- Replies {1, stamp} extended, {0} not held under that fence by that session, or already ended, {-2} no such session, {-3} asked on an
-- older connection: a late command must not shorten what a newer one has made longer.
local s = redis.call('HGET', KEYS[1], ARGV[4])
if not s then return {-2} end
local gen, stamp = s:match('^(%d+) (%d+)')
if gen ~= ARGV[5] then return {-3} end
local rec, field, at = held_under(ARGV[1], ARGV[2])
if not rec then return {0} end
local _, _, sid, _, _, its = parse(rec)
-- It was offered before this came, or is somebody else's by now.
if sid ~= ARGV[4] or its == 'offered' then return {0} end
local now = judge(KEYS[5])
if left(rec, now) <= 0 then return {0} end
local head, ends, tail = rec:match('^(.%d+%z[^%z]*%z[^%z]*%z)%d+(@?)%d*(%z.*)$')
if ends == '@' then ends = fixed_end(ARGV[4], now, ARGV[3]) end
redis.call('HSET', KEYS[2], field, head .. ARGV[3] .. ends .. tail)
if waited_for(at) then look_after(ARGV[1], now + ARGV[3]) end
return {1, stamp}
