-- ARGV 1 lock 2 fence 3 prefix of the inbox channels. Replies 1 given back, 0 not held under that fence.
local h = redis.call('HGET', KEYS[2], ARGV[1])
if not h or h:sub(2, #ARGV[2] + 2) ~= ARGV[2] .. '\0' then return 0 end
local flag = h:byte(1)
if flag == 45 or flag == 117 then
  redis.call('HDEL', KEYS[2], ARGV[1])
  return 1
end
