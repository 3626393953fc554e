-- ARGV 1 where the last page ended, empty for the first 2 how many
-- Replies {where this page ends, empty after the last, then each live instance as it is stored}, by service.
local now = judge(KEYS[2])
local from = ARGV[1] == '' and '-' or '(' .. ARGV[1]
local page = redis.call('ZRANGEBYLEX', KEYS[5], from, '+', 'LIMIT', 0, ARGV[2])
local reply = {#page == tonumber(ARGV[2]) and page[#page] or ''}
return add_live(reply, page, now)
