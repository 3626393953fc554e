-- ARGV 1 sid 2 gen, then for each lease 3 lock 4 fence 5 owner 6 timeout ms 7 ms left, where it has a fixed deadline
--      8 request 9 since 10 mode 11 where; last: prefix of the inbox channels
-- A session takes back what it holds on a server that has lost it. Replies {1, fences that it holds now...}; {0} no
-- such session; {-3} older generation.
local s = redis.call('HGET', KEYS[1], ARGV[1])
if not s then return {0} end
if s:match('^%d+') ~= ARGV[2] then return {-3} end
local now = judge(KEYS[5])
local open = (tonumber(redis.call('HGET', KEYS[5], 'y')) or 0) > now
local highest = 0
local reply = {1}
for i = 3, #ARGV - 9, 9 do
  local name, fence, mode = ARGV[i], ARGV[i + 1], ARGV[i + 7]
  local rec, field, h = held_under(name, fence)
  local _, by, its
  if rec then _, _, by, _, _, its = parse(rec) end
  if by == ARGV[1] and its ~= 'offered' then
    reply[#reply + 1] = fence
  elseif open and (not rec or its == 'offered') then
    -- What was lost with the grant: that the request had left the queue; then it may have been granted anew. Or that
    -- this session had taken over what is still offered.
    local raw = redis.call('HGET', KEYS[4], 'r' .. ARGV[i + 5])
    if raw then leave_queue(ARGV[i + 5], waiter(raw)) end
    if rec then drop(name, h, field) end
    h = redis.call('HGET', KEYS[2], name)
    if h then h = prune(name, h, now) end
    local records, fields = holders(name, h)
    for j, other in ipairs(records) do
      if select(6, parse(other)) == ARGV[i + 5] then h = drop(name, h, fields[j]) end
    end
    if joins(h, mode) then
      local ends = ARGV[i + 4] ~= '' and fixed_end(ARGV[1], now, ARGV[i + 4]) or ''
      local waits = h and waited_for(h)
        or redis.call('ZRANGEBYLEX', KEYS[3], '[' .. name .. '\0', '(' .. name .. '\1', 'LIMIT', 0, 1)[1]
      hold(name, h, mode, fence, record(mode == 'x' and waits and '+' or '-', fence, ARGV[i + 2], ARGV[1], ARGV[i + 3],
        ends, ARGV[i + 5], ARGV[i + 6], ARGV[i + 8]))
      if waits then
        local at = redis.call('HGET', KEYS[2], name)
        if mode ~= 'x' then at = mark(name, at, true) end
        look_after(name, next_look(at, now, tonumber(ARGV[i + 3])))
      end
      highest = math.max(highest, tonumber(fence))
      reply[#reply + 1] = fence
    end
  end
end
if highest > 0 then numbers_above(KEYS[5], highest) end
return reply
