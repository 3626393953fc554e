-- ARGV 1 service 2 id 3 sid 4 gen 5 epoch 6 ttl ms 7 "1" takes the id over from a live session 8 record; last: channel
-- Replies {1, revision}; {2, revision} it is there already; {0} no such session; {-1, sid, who} the id belongs to that live session;
-- {-3, epoch} a newer registration is there, or the session goes on over a newer connection.
local service, id, sid, epoch = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[5])
local now = judge(KEYS[2])
local seen = seen_of(sid)
if not seen then return {0} end
if tonumber(redis.call('HGET', KEYS[1], sid):match('^%d+')) > tonumber(ARGV[4]) then return {-3, '0'} end
local member = service .. '\0' .. id
local had = entry_of(member)
if had and had.sid == sid then
  if had.epoch > epoch then return {-3, text(had.epoch)} end
  if had.epoch == epoch then return {2, redis.call('HGET', KEYS[4], service)} end
elseif had and ends_at(had) > now and ARGV[7] ~= '1' then
  return {-1, had.sid, redis.call('HGET', KEYS[1], '@' .. had.sid) or '{}'}
end
write(member, {sid = sid, epoch = epoch, ttl = tonumber(ARGV[6]), status = 'up', json = ARGV[8]})
redis.call('ZADD', KEYS[5], 0, member)
redis.call('ZADD', KEYS[6], seen + ARGV[6], member)
return {1, changed(service)}
