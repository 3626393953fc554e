-- ARGV 1 lock 2 request 3 prefix of the inbox channels.
-- Replies 1 was waiting, 2 had been granted and is given back, 0 unknown here.
local name, request = ARGV[1], ARGV[2]
local w = redis.call('HGET', KEYS[4], 'r' .. request)
local h = redis.call('HGET', KEYS[2], name)
if w then
  leave_queue(request, w)
  local more = redis.call('ZRANGEBYLEX', KEYS[3], '[' .. name .. '\0', '(' .. name .. '\1', 'LIMIT', 0, 1)
  if h and not more[1] then
    local flag = h:byte(1)
    if flag == 43 then redis.call('HSET', KEYS[2], name, '-' .. h:sub(2))
    elseif flag == 85 then redis.call('HSET', KEYS[2], name, 'u' .. h:sub(2)) end
  end
  return 1
end
if h then
  local _, _, _, _, _, its = parse(h)
  if its == request then
    grant_next(name, judge(KEYS[5]))
    return 2
  end
end
return 0
