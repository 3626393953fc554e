-- ARGV 1 cursor 2 count; or 1 "=" 2 nothing 3 lock: the holders of one lock. Replies {cursor, then for each holder: lock,
-- mode, owner, sid, who, fence, since, ms left, waiters, where}
local now = judge(KEYS[5])
local reply, page = {'0'}, {}
if ARGV[1] == '=' then
  local records, fields = holders(ARGV[3], redis.call('HGET', KEYS[2], ARGV[3]))
  for i, rec in ipairs(records) do
    page[2 * i - 1], page[2 * i] = fields[i], rec
  end
else
  local scanned = redis.call('HSCAN', KEYS[2], ARGV[1], 'COUNT', ARGV[2])
  reply[1], page = scanned[1], scanned[2]
end
for i = 1, #page, 2 do
  local name, h = page[i]:match('^[^%z]*'), page[i + 1]
  if not several(h) then
    local fence, owner, sid, _, _, _, since, where = parse(h)
    local rest = left(h, now)
    if rest > 0 then
      local mode = 'x'
      if #name < #page[i] then mode = (redis.call('HGET', KEYS[2], name) or ''):match('^.([^%z]*)%z') or 's' end
      local n = redis.call('ZLEXCOUNT', KEYS[3], '[' .. name .. '\0', '(' .. name .. '\1')
      for _, v in ipairs({name, mode, owner, sid, redis.call('HGET', KEYS[1], '@' .. sid) or '{}', fence, since,
        text(rest), text(n), where}) do
        reply[#reply + 1] = v
      end
    end
  end
end
return reply
