-- ARGV 1 lock 2 request 3 prefix of the inbox channels.
-- Replies 1 was waiting, 2 had been granted and is given back, 0 unknown here.
local name, request = ARGV[1], ARGV[2]
local raw = redis.call('HGET', KEYS[4], 'r' .. request)
local h = redis.call('HGET', KEYS[2], name)
if raw then
  leave_queue(request, waiter(raw))
  -- Those behind may have waited for it alone.
  serve(name, h, judge(KEYS[5]))
  return 1
end
local records, fields = holders(name, h)
for i, rec in ipairs(records) do
  local _, _, _, _, _, its = parse(rec)
  if its == request then
    h = drop(name, h, fields[i])
    serve(name, h, judge(KEYS[5]))
    return 2
  end
end
return 0
