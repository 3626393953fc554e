-- ARGV 1 how many at most; last: channel. Replies how many were removed.
-- Each registration is looked at when it could have died, and put off while its session lives: one look per ttl,
-- whoever looks, so that a heartbeat need not touch the registrations that it keeps.
local now = judge(KEYS[2])
local due = redis.call('ZRANGEBYSCORE', KEYS[6], '-inf', now, 'LIMIT', 0, ARGV[1])
local gone, services = 0, {}
for _, member in ipairs(due) do
  local entry = entry_of(member)
  local ends = entry and ends_at(entry) or 0
  if ends > now then
    redis.call('ZADD', KEYS[6], ends, member)
  else
    erase(member)
    services[member:match('^([^%z]*)')] = true
    gone = gone + 1
  end
end
for service in pairs(services) do changed(service) end
return gone
