-- Shared by the registry's scripts, after common.lua. KEYS, the same in all of them:
--   1 sessions   as in common.lua
--   2 meta       as in common.lua; also g, the count of all changes
--   3 instances  hash  service \0 id -> sid epoch ttl status \0 record (JSON)
--   4 revisions  hash  service -> count of its changes, never below the server's wall clock in microseconds
--   5 names      zset  service \0 id, all of score 0: the instances of a service without looking at the others
--   6 looks      zset  service \0 id -> logical time before which it can't have died
--   7 monitors   zset  who checks the health of others -> logical time until which it is believed to live
-- A registration is alive while its session's last sign of life + ttl is still to come.

local function entry_in(v)
  if not v then return nil end
  local head, at = struct.unpack('s', v)
  local sid, epoch, ttl, status = head:match('^(%S+) (%d+) (%d+) (%a+)$')
  return {sid = sid, epoch = tonumber(epoch), ttl = tonumber(ttl), status = status, json = v:sub(at), raw = v}
end

local function entry_of(member) return entry_in(redis.call('HGET', KEYS[3], member)) end

-- Until when the entry lives, as far as is known now; 0 where its session, which is `s`, has gone.
local function ends_in(entry, s)
  local seen = seen_in(s)
  return seen and seen + entry.ttl or 0
end

local function ends_at(entry) return ends_in(entry, session(entry.sid)) end

-- Adds those of these members that are alive to a list, each as it is stored.
local function add_live(list, members, now)
  local entries = {}
  for _, v in ipairs(values(KEYS[3], members)) do entries[#entries + 1] = entry_in(v) end
  local sessions = sessions_of(entries, function(entry) return entry.sid end)
  for _, entry in ipairs(entries) do
    if ends_in(entry, sessions[entry.sid]) > now then list[#list + 1] = entry.raw end
  end
  return list
end

local function write(member, entry)
  redis.call('HSET', KEYS[3], member,
    entry.sid .. ' ' .. text(entry.epoch) .. ' ' .. text(entry.ttl) .. ' ' .. entry.status .. '\0' .. entry.json)
end

local function erase(member)
  redis.call('HDEL', KEYS[3], member)
  redis.call('ZREM', KEYS[5], member)
  redis.call('ZREM', KEYS[6], member)
end

local function members(service, most)
  return redis.call('ZRANGEBYLEX', KEYS[5], '[' .. service .. '\0', '(' .. service .. '\1', 'LIMIT', 0, most)
end

-- One more change of the service, told to everyone. A service without instances keeps no counter: the next one
-- starts above every earlier one, because no counter is below the wall clock, nor can one overtake it. ARGV's last is the channel.
local function changed(service)
  local t = redis.call('TIME')
  local wall = t[1] * 1000000 + t[2]
  local revision = text(math.max((tonumber(redis.call('HGET', KEYS[4], service)) or 0) + 1, wall))
  if members(service, 1)[1] then
    redis.call('HSET', KEYS[4], service, revision)
  else
    redis.call('HDEL', KEYS[4], service)
    revision = '0'
  end
  redis.call('HINCRBY', KEYS[2], 'g', 1)
  redis.call('PUBLISH', ARGV[#ARGV], service .. '\0' .. revision)
  return revision
end
