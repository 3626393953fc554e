-- ARGV 1 cursor 2 count 3 sid. Replies {cursor, then lock and fence of each lease of that session}.
local page = redis.call('HSCAN', KEYS[2], ARGV[1], 'COUNT', ARGV[2])
local reply = {page[1]}
for i = 1, #page[2], 2 do
  local h = page[2][i + 1]
  if not several(h) then
    local fence, _, sid, _, _, its = parse(h)
    if sid == ARGV[3] and its ~= 'offered' then
      reply[#reply + 1] = page[2][i]:match('^[^%z]*')
      reply[#reply + 1] = fence
    end
  end
end
return reply
