-- ARGV 1 lock 2 sid 3 gen 4 owner 5 timeout ms 6 request, sid:number 7 since 8 "@" where the lease has a fixed deadline
--      9 "w" to wait, "t" only to try 10 prefix of the inbox channels
-- Replies: {1, fence, stamp} held; {5, fence, stamp} held out of the queue, to be claimed; {2, ms left} waiting;
--          {0, ms left} not free; {-1, locks...} waiting would close a cycle; {-2} no such session; {-3} older generation
local s = redis.call('HGET', KEYS[1], ARGV[2])
if not s then return {-2} end
local gen, stamp = s:match('^(%d+) (%d+)')
if gen ~= ARGV[3] then return {-3} end
local h = redis.call('HGET', KEYS[2], ARGV[1])
if not h and ARGV[8] == '' then
  local f = redis.call('HINCRBY', KEYS[5], 'f', 1)
  if f >= 1000000000000000 then
    redis.call('HSET', KEYS[2], ARGV[1], string.format('-%.0f', f) .. '\0' .. ARGV[4] .. '\0' .. ARGV[2] .. '\0'
      .. ARGV[5] .. '\0' .. ARGV[6] .. '\0' .. ARGV[7])
    return {1, f, stamp}
  end
end
