-- ARGV 1 service. Replies {epoch of the data, revision, then each live instance as it is stored}.
-- The epoch is empty where the server lost its data and no session has opened since.
local now = judge(KEYS[2])
local reply = {redis.call('HGET', KEYS[2], 'e') or '', redis.call('HGET', KEYS[4], ARGV[1]) or '0'}
return add_live(reply, members(ARGV[1], -1), now)
