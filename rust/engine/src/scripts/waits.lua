-- ARGV 1 cursor 2 count; or 1 "=" 2 count 3 lock: the first in the queue of one lock, in their order.
-- Replies {cursor, then for each who waits: lock, mode, owners, sid, who, request, since, rank, where}
local reply, raws = {'0'}, {}
if ARGV[1] == '=' then
  local q = redis.call('ZRANGEBYLEX', KEYS[3], '[' .. ARGV[3] .. '\0', '(' .. ARGV[3] .. '\1', 'LIMIT', 0, ARGV[2])
  for _, member in ipairs(q) do
    local request = request_in(member)
    local raw = redis.call('HGET', KEYS[4], 'r' .. request)
    if raw then raws[#raws + 1] = {request, raw} end
  end
else
  local page = redis.call('HSCAN', KEYS[4], ARGV[1], 'COUNT', ARGV[2])
  reply[1] = page[1]
  for i = 1, #page[2], 2 do
    if page[2][i]:byte(1) == 114 then raws[#raws + 1] = {page[2][i]:sub(2), page[2][i + 1]} end
  end
end
for _, pair in ipairs(raws) do
  local w = waiter(pair[2])
  for _, v in ipairs({w.name, w.mode, w.owners, w.sid, redis.call('HGET', KEYS[1], '@' .. w.sid) or '{}', pair[1],
    w.since, w.rank, w.where}) do
    reply[#reply + 1] = v
  end
end
return reply
