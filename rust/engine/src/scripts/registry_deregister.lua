-- ARGV 1 service 2 id 3 sid 4 epoch; last: channel
-- Replies {1, revision}; {0} it was not there any more; {-1, sid} it belongs to another session now;
-- {-3, epoch} a newer registration is there.
local member = ARGV[1] .. '\0' .. ARGV[2]
local had = entry_of(member)
if not had then return {0} end
if had.sid ~= ARGV[3] then return {-1, had.sid} end
if had.epoch > tonumber(ARGV[4]) then return {-3, text(had.epoch)} end
erase(member)
return {1, changed(ARGV[1])}
