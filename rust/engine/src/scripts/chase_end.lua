-- ARGV 1 request 2 lock 3.. the cycle, as `rows` has it; last: prefix of the inbox channels. Ends the wait of a request that
-- was chosen to give up, if it still waits. Replies 1 if it did.
local raw = redis.call('HGET', KEYS[4], 'r' .. ARGV[1])
local w = raw and waiter(raw)
if not w or w.name ~= ARGV[2] then return 0 end
w.request = ARGV[1]
local cells = {}
for i = 3, #ARGV - 1 do cells[#cells + 1] = ARGV[i] end
local now = judge(KEYS[5])
abort(w, cells)
serve(w.name, redis.call('HGET', KEYS[2], w.name), now)
return 1
