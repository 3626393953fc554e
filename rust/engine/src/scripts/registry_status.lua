-- ARGV 1 service 2 id 3 epoch 4 "up" or "down"; last: channel. What a health check found.
-- Replies 1 changed, 0 it says so already, -1 that registration is not there any more.
local member = ARGV[1] .. '\0' .. ARGV[2]
local had = entry_of(member)
if not had or had.epoch ~= tonumber(ARGV[3]) then return -1 end
if had.status == ARGV[4] then return 0 end
had.status = ARGV[4]
write(member, had)
changed(ARGV[1])
return 1
