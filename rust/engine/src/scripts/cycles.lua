-- Who waits for whom. A request waits for all holders of its lock, and for any one of a semaphore's; those ahead of it
-- in the queue wait for the same, so they need no edges of their own.

-- Everybody on whom a request depends: owner -> what each of them waits for, and their holders. At most 10,000 owners.
local function dependencies(name, h)
  local waits, order, seen, held = {}, {}, {}, {}
  local function look(lock, at)
    if held[lock] then return held[lock] end
    local by = {}
    held[lock] = by
    for i, rec in ipairs((holders(lock, at))) do
      local fence, owner, _, _, _, _, _, where = parse(rec)
      by[i] = {owner = owner, fence = fence, where = where}
      if not seen[owner] then
        seen[owner] = true
        order[#order + 1] = owner
      end
    end
    return by
  end
  local first = look(name, h)
  local from = 1
  while order[from] and from <= 10000 do
    local upto, fields = math.min(#order, 10000), {}
    for i = from, upto do fields[#fields + 1] = 'o' .. order[i] end
    local asked = values(KEYS[4], fields)
    for i = from, upto do
      local owner, mine = order[i], {}
      for request in (asked[i - from + 1] or ''):gmatch('%S+') do
        local raw = redis.call('HGET', KEYS[4], 'r' .. request)
        if raw then
          local w = waiter(raw)
          w.request, w.owner = request, owner
          w.by = held[w.name] or look(w.name, redis.call('HGET', KEYS[2], w.name))
          if w.by[1] then mine[#mine + 1] = w end
        end
      end
      waits[owner] = mine
    end
    from = upto + 1
  end
  return first, waits, order
end

-- A cycle that the request would close: its edges, the request's own first; nil if it could be granted some day.
-- Whoever can go on is taken out until nobody is left who can (Holt 1972, "Some deadlock properties of computer
-- systems"): what remains can't go on without the request's own owners.
local function cycle_of(want, h)
  local first, waits, order = dependencies(want.name, h)
  local mine, stuck = {}, {}
  for owner in want.owners:gmatch('[^\1]+') do mine[owner] = true end
  for _, owner in ipairs(order) do stuck[owner] = mine[owner] or (waits[owner] and waits[owner][1] ~= nil) or false end
  local function blocked(w)
    local any = w.mode:byte(1) ~= 107
    for _, by in ipairs(w.by) do
      if stuck[by.owner] == any then return any end
    end
    return not any
  end
  local changed = true
  while changed do
    changed = false
    for i = #order, 1, -1 do
      local owner = order[i]
      if stuck[owner] and not mine[owner] then
        local on = true
        for _, w in ipairs(waits[owner]) do
          if blocked(w) then on = false break end
        end
        if on then
          stuck[owner] = false
          changed = true
        end
      end
    end
  end
  want.by = first
  want.owner = want.owners:match('^[^\1]*')
  if not first[1] or not blocked(want) then return nil end
  -- One way through those who are stuck that comes back to the request's own owners; the shortest.
  local from, edges = {}, {{w = want}}
  local at = 1
  while edges[at] do
    local edge = edges[at]
    for _, by in ipairs(edge.w.by) do
      if mine[by.owner] then
        local cycle = {}
        local back, met = edge, by
        while back do
          table.insert(cycle, 1, {w = back.w, by = met})
          back, met = back.before, back.met
        end
        return cycle
      end
      if stuck[by.owner] and not from[by.owner] then
        from[by.owner] = true
        for _, w in ipairs(waits[by.owner]) do
          if blocked(w) then edges[#edges + 1] = {w = w, before = edge, met = by} end
        end
      end
    end
    at = at + 1
  end
  -- What it waits for is stuck without it: that cycle was found, and is being resolved, when it was closed.
  return nil
end

-- An edge in words: lock, who waits, its process, where it asked, who holds, where that was acquired.
local function rows(cycle)
  local found = {}
  for _, edge in ipairs(cycle) do
    for _, cell in ipairs({edge.w.name, edge.w.owner, redis.call('HGET', KEYS[1], '@' .. edge.w.sid) or '{}',
      edge.w.where, edge.by.owner, edge.by.where}) do
      found[#found + 1] = cell
    end
  end
  return found
end

-- Who of a cycle has to give up. Each of them holds the lock that the one before waits for: whoever got that last is
-- the youngest. The first of the cycle is the request that closes it.
local function victim(cycle, policy)
  if policy == 's' then return cycle[1] end
  local worst, worst_key
  for i, edge in ipairs(cycle) do
    local fence = tonumber((cycle[i - 1] or cycle[#cycle]).by.fence)
    local key = 0
    if policy == 'p' then key = tonumber(edge.w.rank:sub(1, 4)) end
    if policy == 'l' then key = -edge.w.held end
    if not worst or key > worst_key[1] or key == worst_key[1] and fence > worst_key[2] then
      worst, worst_key = edge, {key, fence}
    end
  end
  return worst
end

local function escaped(c) return string.format('%%%02x', c:byte()) end

-- Takes the place of a request in the queue away and says why.
local function abort(w, cells)
  leave_queue(w.request, w)
  for i, cell in ipairs(cells) do cells[i] = cell:gsub('[%z\1-\32%%;,]', escaped) end
  tell(w.sid, w.request:match('(%d+)$'), 'deadlock:' .. table.concat(cells, ','))
end
