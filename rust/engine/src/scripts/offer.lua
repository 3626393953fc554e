-- ARGV 1 lock 2 fence 3 for how long ms 4 sid 5 gen 6 prefix of the inbox channels.
-- The holder has given it up; whoever knows the fence may take it over within that time. Replies 1 offered, 0 not held
-- under that fence by that session: then it had ended, or was taken over already. Until then nobody holds it: whoever
-- waits for it does not wait for its giver.
-- One of an older connection, which was sent again on a newer one, may find what was taken over since.
if (redis.call('HGET', KEYS[1], ARGV[4]) or ''):match('^%d+') ~= ARGV[5] then return 0 end
local rec, field, at = held_under(ARGV[1], ARGV[2])
if not rec then return 0 end
local fence, owner, sid, timeout, _, its, since, where = parse(rec)
-- A lease of a fixed length may outlive its session, which is known by another number since.
local outlived = its ~= 'offered' and not seen_of(sid) and sid:match('^(.*)%.') == ARGV[4]:match('^(.*)%.')
if sid ~= ARGV[4] and not outlived then return 0 end
if its == 'offered' then return 1 end
local now = judge(KEYS[5])
if outlived or left(rec, now) <= 0 then
  -- Its giver holds it no longer, and does not give it back either. The next heartbeat would bring it to life again.
  local waited = waited_for(at)
  local h = drop(ARGV[1], at, field)
  if waited then serve(ARGV[1], h, now) end
  return 0
end
local flag = unclaimed(rec) and (rec:byte(1) == 85 and '+' or '-') or rec:sub(1, 1)
redis.call('HSET', KEYS[2], field,
  record(flag, fence, owner .. ' offered', sid, text(timeout), fixed_end(sid, now, ARGV[3]), 'offered', since, where))
-- Its session may end, or no longer count it: whatever looks at what has come due ends it.
look_after(ARGV[1], now + ARGV[3])
return 1
