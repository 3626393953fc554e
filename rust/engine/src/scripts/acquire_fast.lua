-- ARGV 1 lock 2 sid 3 gen 4 owners 5 timeout ms 6 request, sid:number 7 since
--      8 what is not usual: "!" asked before, "@" a fixed deadline, "s" shared, "k"limit a semaphore, "a"fence takes
--        over what was offered under that fence, "p" somebody awaits the owner, "n" the place in the queue is asked for
--      9 "w" to wait, "t" only to try 10 where waiting matters: priority as four digits, policy of the victim, locks held
--        by the owner, rank of an earlier place; or nothing 11 where in the code it is asked for
--      12 prefix of the inbox channels
-- Replies: {1, fence, stamp} held; {5, fence, stamp} held out of the queue, to be claimed; {2, ms left, rank, place}
--          waiting, -1 and 0 for what was not looked at; {0, ms left} not free; {-1, edges...} waiting would close a cycle; {-2} no such session; {-3} older
--          generation; {-4, text} used in another way; {-5} not offered; {3, ms left} nothing is granted yet
local s = redis.call('HGET', KEYS[1], ARGV[2])
if not s then return {-2} end
local gen, stamp = s:match('^(%d+) (%d+)')
if gen ~= ARGV[3] then return {-3} end
local h = redis.call('HGET', KEYS[2], ARGV[1])
if h and ARGV[8] == '' and ARGV[9] == 'w' and ARGV[10] == '' then
  local flag = h:byte(1)
  local by = (flag == 43 or flag == 85) and select(3, struct.unpack('c1ss', h))
  -- Others wait already, and some heartbeat looks after the lock. Nobody waits for who holds nothing (ARGV 10), so no
  -- cycle is closed. An owner that processes share may wait for several things, which only `enter` notes.
  if by and by ~= ARGV[4] and ARGV[4]:byte(1) ~= 61 then
    local n = redis.call('HINCRBY', KEYS[5], 't', 1)
    if n >= 1000000000000000 then
      local rank = string.format('5000%.0f', n)
      redis.call('ZADD', KEYS[3], 0, ARGV[1] .. '\0' .. rank .. '\0' .. ARGV[6])
      redis.call('HSET', KEYS[4], 'o' .. ARGV[4], ARGV[6], 'r' .. ARGV[6], ARGV[1] .. '\0' .. rank .. '\0' .. ARGV[4]
        .. '\0' .. ARGV[2] .. '\0' .. ARGV[5] .. '\0' .. ARGV[7] .. '\0x\0000\0' .. ARGV[11])
      return {2, -1, rank, 0}
    end
  end
end
if not h and ARGV[8] == '' then
  local f = redis.call('HINCRBY', KEYS[5], 'f', 1)
  if f >= 1000000000000000 then
    redis.call('HSET', KEYS[2], ARGV[1], string.format('-%.0f', f) .. '\0' .. ARGV[4] .. '\0' .. ARGV[2] .. '\0'
      .. ARGV[5] .. '\0' .. ARGV[6] .. '\0' .. ARGV[7] .. '\0' .. ARGV[11])
    return {1, f, stamp}
  end
end
