-- ARGV 1 lock 2 fence of the one holder that is meant, or nothing for all 3 prefix of the inbox channels.
-- Replies the fences that were taken away; their holders are told.
local name = ARGV[1]
local h = redis.call('HGET', KEYS[2], name)
local records, fields = holders(name, h)
local taken = {}
for i, rec in ipairs(records) do
  local fence = parse(rec)
  if ARGV[2] == '' or ARGV[2] == fence then
    revoke(rec, 'forced')
    h = drop(name, h, fields[i])
    taken[#taken + 1] = fence
  end
end
if taken[1] then serve(name, h, judge(KEYS[5])) end
return taken
