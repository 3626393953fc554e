-- ARGV owners. Only reads. For each of them, and for whoever holds what it waits for, as far as that goes in this
-- partition: replies {requests, locks}. A request has eight cells: request, lock, rank, held, policy, owners, who, where;
-- a lock has its name, its permits or "", the number of its holders, and of each its owner, fence, since and where.
local MOST = 2000
local requests, locks, order, seen, told = {}, {}, {}, {}, {}

local function follow(owner)
  if not seen[owner] then
    seen[owner] = true
    order[#order + 1] = owner
  end
end

local function add(list, ...)
  for i = 1, select('#', ...) do list[#list + 1] = (select(i, ...)) end
end

for _, owner in ipairs(ARGV) do follow(owner) end
local at = 1
while order[at] and at <= #ARGV + MOST do
  for request in requests_of(order[at]) do
    local raw = not told['r' .. request] and redis.call('HGET', KEYS[4], 'r' .. request)
    if raw then
      local w = waiter(raw)
      told['r' .. request] = true
      add(requests, request, w.name, w.rank, w.held, w.policy, w.owners, redis.call('HGET', KEYS[1], '@' .. w.sid) or '{}',
        w.where)
      if not told['l' .. w.name] then
        told['l' .. w.name] = true
        local h = redis.call('HGET', KEYS[2], w.name)
        local records = holders(w.name, h)
        add(locks, w.name, h and h:match('^[*&]k(%d+)%z') or '', #records)
        for _, rec in ipairs(records) do
          local fence, owner, _, _, _, _, since, where = parse(rec)
          add(locks, owner, fence, since, where)
          follow(owner)
        end
      end
    end
  end
  at = at + 1
end
return {requests, locks}
