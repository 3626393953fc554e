local name, sid, owners, request, options = ARGV[1], ARGV[2], ARGV[4], ARGV[6], ARGV[8]
local owner = owners:match('^[^\1]*')
local fixed = options:find('@', 1, true) ~= nil
local mode = options:match('[sk]%d*') or 'x'
local now = judge(KEYS[5])

local offered = options:match('a(%d+)')
if offered then
  local rec, field, at = held_under(name, offered)
  if not rec then return {-5} end
  local _, _, by, _, deadline, its = parse(rec)
  if its == request and by == sid then return {1, tonumber(offered), stamp} end
  if its ~= 'offered' or deadline <= now then return {-5} end
  redis.call('HSET', KEYS[2], field, record(rec:sub(1, 1), offered, owner, sid, ARGV[5],
    fixed and fixed_end(sid, now, ARGV[5]) or '', request, ARGV[7], ARGV[11]))
  if waited_for(at) then look_after(name, now + ARGV[5]) end
  return {1, tonumber(offered), stamp}
end

local fits, rest = joins(h, mode), 0
if h and (not fits or waited_for(h)) then
  local taken
  h, taken, rest = prune(name, h, now)
  if taken then
    if not h and grace_ends <= now then h = call_waiters(name, now) end
    serve(name, h, now)
    h = redis.call('HGET', KEYS[2], name)
    rest = CLAIM
  end
  fits = joins(h, mode)
end
-- The same request again: its first answer was lost. The stamp may be younger than a grant out of the queue: so a
-- fixed length counts anew from here, where its holder learns of it.
if h and (not several(h) or options:find('!', 1, true)) then
  local records, fields = holders(name, h)
  for i, rec in ipairs(records) do
    local fence, _, _, _, _, its = parse(rec)
    if its == request then
      if fixed and unclaimed(rec) then
        local head, tail = rec:match('^(.%d+%z[^%z]*%z[^%z]*%z%d+)@%d*(%z.*)$')
        redis.call('HSET', KEYS[2], fields[i], head .. fixed_end(sid, now, ARGV[5]) .. tail)
      end
      return {unclaimed(rec) and 5 or 1, tonumber(fence), stamp}
    end
  end
end
if fits == nil then
  return {-4, several(h) and h:match('^.([^%z]*)%z') or 'x'}
end
local grace = grace_ends - now
local priority, policy, held, rank = ARGV[10]:match('^(%d+) (%a) (%d+) (%d*)$')
if not priority then priority, policy, held, rank = '5000', 'y', '0', '' end
local free = fits and grace <= 0
if free and h and waited_for(h) then
  -- Nobody is passed over but those of a lower priority.
  local ahead = redis.call('ZRANGEBYLEX', KEYS[3], '[' .. name .. '\0', '(' .. name .. '\0' .. priority .. ':', 'LIMIT', 0, 1)
  free = not nobody(h) and not ahead[1]
end
if free then
  local f = next_fence(KEYS[5])
  local ends = fixed and fixed_end(sid, now, ARGV[5]) or ''
  hold(name, h, mode, text(f), record('-', text(f), owner, sid, ARGV[5], ends, request, ARGV[7], ARGV[11]))
  return {1, f, stamp}
end
if grace > 0 then rest = grace end
if ARGV[9] ~= 'w' then
  if grace > 0 then return {3, grace} end
  return {0, rest}
end

local queued = options:find('!', 1, true) and redis.call('HGET', KEYS[4], 'r' .. request)
local known = queued and waiter(queued)
local function place()
  local at, n = known and known.rank or rank, 0
  if options:find('n', 1, true) then
    n = redis.call('ZLEXCOUNT', KEYS[3], '[' .. name .. '\0', '[' .. name .. '\0' .. at .. '\0' .. request)
  end
  return {2, rest, at, n}
end
if known and known.owners == owners then return place() end
local want = {name = name, rank = known and known.rank or priority, owners = owners, sid = sid, mode = mode,
  held = tonumber(held) or 0, where = ARGV[11], request = request}
while true do
  local cycle = cycle_of(want, h)
  if not cycle then break end
  local loser = victim(cycle, policy)
  if loser.w == want then
    if known then
      known.request = request
      leave_queue(request, known)
      serve(name, h, now)
    end
    return {-1, unpack(rows(cycle))}
  end
  abort(loser.w, rows(cycle))
  serve(loser.w.name, redis.call('HGET', KEYS[2], loser.w.name), now)
  h = redis.call('HGET', KEYS[2], name)
  fits = joins(h, mode)
end
if known then
  leave(request, known.owners)
  rank = known.rank
else
  if rank == '' then
    rank = next_rank(KEYS[5], priority)
  else
    numbers_above(KEYS[5], tonumber(rank:sub(5)) or 0)
  end
  redis.call('ZADD', KEYS[3], 0, name .. '\0' .. rank .. '\0' .. request)
end
enter(request, owners, name .. '\0' .. rank .. '\0' .. owners .. '\0' .. sid .. '\0' .. ARGV[5]
  .. (fixed and '@' or '') .. '\0' .. ARGV[7] .. '\0' .. mode .. '\0' .. text(want.held)
  .. (policy == 'y' and '' or policy) .. '\0' .. ARGV[11])
if grace > 0 then
  look_after(name, grace_ends)
elseif h and not waited_for(h) then
  look_after(name, next_look(h, now, rest))
end
if h then mark(name, h, true) else redis.call('HSET', KEYS[2], name, NOBODY) end
-- Those who waited through a grace, and nobody has looked at since.
if grace <= 0 and fits then
  serve(name, redis.call('HGET', KEYS[2], name), now)
  local records = holders(name, redis.call('HGET', KEYS[2], name))
  for _, rec in ipairs(records) do
    local fence, _, _, _, _, its = parse(rec)
    if its == request then return {5, tonumber(fence), stamp} end
  end
end
return place()
