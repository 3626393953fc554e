-- ARGV owners. Replies what is noted of them: owner \0 request.
local found = {}
for _, owner in ipairs(ARGV) do
  local notes = redis.call('ZRANGEBYLEX', KEYS[1], '[' .. owner .. '\0', '(' .. owner .. '\1', 'LIMIT', 0, 100)
  for _, note in ipairs(notes) do found[#found + 1] = note end
end
return found
