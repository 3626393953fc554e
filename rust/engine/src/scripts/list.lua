-- ARGV 1 cursor 2 count. Replies {cursor, then for each lock: name, owner, sid, who, fence, since, ms left, waiters}
local now = judge(KEYS[5])
local page = redis.call('HSCAN', KEYS[2], ARGV[1], 'COUNT', ARGV[2])
local reply = {page[1]}
for i = 1, #page[2], 2 do
  local name, h = page[2][i], page[2][i + 1]
  local fence, owner, sid = parse(h)
  local rest = left(h, now)
  if rest > 0 then
    local since = h:match('([^%z]*)$')
    local n = redis.call('ZLEXCOUNT', KEYS[3], '[' .. name .. '\0', '(' .. name .. '\1')
    for _, v in ipairs({name, owner, sid, redis.call('HGET', KEYS[1], '@' .. sid) or '{}', fence, since, text(rest), text(n)}) do
      reply[#reply + 1] = v
    end
  end
end
return reply
