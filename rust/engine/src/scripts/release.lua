local now
if not several(h) then
  -- Waited for. Whoever is next stands in its place, or nobody does.
  now = judge(KEYS[5])
  if grace_ends > now then redis.call('HDEL', KEYS[2], ARGV[1]) end
  if not serve(ARGV[1], nil, now) and grace_ends <= now then redis.call('HDEL', KEYS[2], ARGV[1]) end
  return 1
end
local rec, field, at = held_under(ARGV[1], ARGV[2])
if not rec then return 0 end
local waited = waited_for(at)
local rest = drop(ARGV[1], at, field)
if waited then serve(ARGV[1], rest, judge(KEYS[5])) end
return 1
