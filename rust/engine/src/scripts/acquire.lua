local name, owner, request = ARGV[1], ARGV[4], ARGV[6]
local now = judge(KEYS[5])
if h then
  if left(h, now) <= 0 then
    revoke(h, 'expired')
    grant_next(name, now)
    h = redis.call('HGET', KEYS[2], name)
  end
end
if h then
  local fence, held_by, _, _, _, its = parse(h)
  -- The same request again: its first answer was lost. The stamp may be younger than a grant out of the queue: so a
  -- fixed length counts anew from here, where its holder learns of it.
  if its == request then
    if ARGV[8] == '@' and unclaimed(h) then
      local head, tail = h:match('^(.%d+%z.-%z.-%z%d+)@%d*(%z.*)$')
      redis.call('HSET', KEYS[2], name, head .. fixed_end(ARGV[2], now, ARGV[5]) .. tail)
    end
    return {unclaimed(h) and 5 or 1, tonumber(fence), stamp}
  end
  local rest = left(h, now)
  if ARGV[9] ~= 'w' then return {0, rest} end
  if redis.call('HGET', KEYS[4], 'r' .. request) then return {2, rest} end
  local cycle, met, at, by = {-1, name}, {}, h, held_by
  while true do
    if by == owner then return cycle end
    if met[by] then break end
    met[by] = true
    local next_request = redis.call('HGET', KEYS[4], 'o' .. by)
    local w = next_request and redis.call('HGET', KEYS[4], 'r' .. next_request)
    if not w then break end
    local wanted = w:match('^(.-)%z')
    at = redis.call('HGET', KEYS[2], wanted)
    if not at or left(at, now) <= 0 then break end
    cycle[#cycle + 1] = wanted
    local _, o = parse(at)
    by = o
  end
  local ticket = text(next_fence(KEYS[5]))
  redis.call('ZADD', KEYS[3], 0, name .. '\0' .. ticket .. '\0' .. request)
  redis.call('HSET', KEYS[4], 'r' .. request, name .. '\0' .. ticket .. '\0' .. owner .. '\0' .. ARGV[2] .. '\0'
    .. ARGV[5] .. ARGV[8] .. '\0' .. ARGV[7], 'o' .. owner, request)
  look_after(name, now + rest)
  local flag = h:byte(1)
  if flag == 45 then redis.call('HSET', KEYS[2], name, '+' .. h:sub(2))
  elseif flag == 117 then redis.call('HSET', KEYS[2], name, 'U' .. h:sub(2)) end
  return {2, rest}
end
local f = next_fence(KEYS[5])
local ends = ARGV[8] == '@' and fixed_end(ARGV[2], now, ARGV[5]) or ''
redis.call('HSET', KEYS[2], name, '-' .. text(f) .. '\0' .. owner .. '\0' .. ARGV[2] .. '\0' .. ARGV[5] .. ends
  .. '\0' .. request .. '\0' .. ARGV[7])
return {1, f, stamp}
