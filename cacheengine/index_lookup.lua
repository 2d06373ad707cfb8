-- Who holds how much of this prompt?  Reads only.
-- KEYS[1]  name of the first chunk (all others share its prefix and its hash tag)
-- ARGV[1]  the chunk keys, 16 raw bytes each, in prompt order
-- Returns  {chunk, bitmap, {field, ...}, chunk, ...}: at which chunk, counted from 1, and with which bitmap
--          a stretch ends for whom.
--
-- Divide and conquer.  Holdings are prefix-closed, so a holder with the same bitmap at both ends of a stretch
-- changes nowhere inside it; only the others are asked for in its middle.  All of them are bisected together:
-- one read of a chunk tells for everybody whom it concerns.
--
-- A front that more than MOST hold (a system prompt, in a large fleet) is skipped by counting; of its holders a
-- random sample is named, and everybody who goes deeper.  Lives that are over are held until somebody sweeps
-- them.  So where a worker is met with two, all that hold the front are read if they are at most READ, and the
-- last life of each worker counts.
local packed = ARGV[1]
local prefix = string.sub(KEYS[1], 1, -17)
local MANY = 64  -- from here a whole hash is read faster than its fields one by one
local MOST = 256
local READ = 1024  -- about a millisecond, half of the deadline
local ends = {}  -- chunk -> bitmap as stored -> fields

local function name(i)
  return prefix .. string.sub(packed, 16 * i - 15, 16 * i)
end

-- The bitmaps of these fields at chunk i; false where it is not held.
local function bitmaps(i, fields)
  if #fields <= MANY then return redis.call('HMGET', name(i), unpack(fields)) end
  local at, found, flat = {}, {}, redis.call('HGETALL', name(i))
  for j = 1, #flat, 2 do found[flat[j]] = flat[j + 1] end
  for k = 1, #fields do at[k] = found[fields[k]] or false end
  return at
end

local function ended(i, fields, at)
  local here = ends[i] or {}
  ends[i] = here
  for k = 1, #fields do
    local bits = at[k]
    if bits then
      local list = here[bits] or {}
      here[bits] = list
      list[#list + 1] = fields[k]
    end
  end
end

-- The fields whose bitmaps differ, and these.
local function differing(fields, a, b)
  local f, x, y, n = {}, {}, {}, 0
  for k = 1, #fields do
    if a[k] ~= b[k] then
      n = n + 1
      f[n], x[n], y[n] = fields[k], a[k], b[k]
    end
  end
  return f, x, y
end

local function same(a, b)
  for k = 1, #a do
    if a[k] ~= b[k] then return false end
  end
  return true
end

-- The same for one field, without tables: where most searches end.
local function alone(lo, hi, field, at_lo, at_hi)
  while hi - lo > 1 do
    local mid = math.floor((lo + hi) / 2)
    local at = redis.call('HGET', name(mid), field)
    if at == at_hi then
      hi = mid
    else
      if at ~= at_lo then alone(lo, mid, field, at_lo, at) end
      lo, at_lo = mid, at
    end
  end
  ended(lo, {field}, {at_lo})
end

-- Each of these fields has one bitmap at lo and another at hi.
local function between(lo, hi, fields, at_lo, at_hi)
  while hi - lo > 1 do
    if #fields == 1 then return alone(lo, hi, fields[1], at_lo[1], at_hi[1]) end
    local mid = math.floor((lo + hi) / 2)
    local at = bitmaps(mid, fields)
    if same(at, at_hi) then
      hi = mid
    elseif same(at, at_lo) then
      lo = mid
    else
      between(lo, mid, differing(fields, at_lo, at))
      lo, fields, at_lo, at_hi = mid, differing(fields, at, at_hi)
    end
  end
  ended(lo, fields, at_lo)
end

-- The places in `flat` (field, value, ...) of each worker's last life; and whether some worker has two.
local function lives(flat, start)
  local last, highest, workers, n = {}, {}, {}, 0
  for j = 1, #flat, 2 do
    local k = (start + j - 1) % #flat + 1
    local field = flat[k]
    local at = string.find(field, '@', 1, true) or 0
    local worker, epoch = string.sub(field, 1, at - 1), tonumber(string.sub(field, at + 1)) or 0
    local before = highest[worker]
    if not before then
      n = n + 1
      workers[n] = worker
    end
    if not before or epoch > before then last[worker], highest[worker] = k, epoch end
  end
  for m = 1, n do workers[m] = last[workers[m]] end
  return workers, 2 * n < #flat
end

-- Name some of those who hold chunk i.
local function sample(i)
  local flat = redis.call('HRANDFIELD', name(i), MOST, 'WITHVALUES')
  local at, crowded = lives(flat, 0)
  if crowded and redis.call('HLEN', name(i)) <= READ then
    -- a whole hash comes in the same order each time, so begin anywhere
    local dice = tonumber(string.sub(redis.sha1hex(redis.call('HRANDFIELD', name(i))), 1, 8), 16)
    flat = redis.call('HGETALL', name(i))
    at = lives(flat, 2 * (dice % (#flat / 2)))
  end
  for m = 1, math.min(#at, MOST) do ended(i, {flat[at[m]]}, {flat[at[m] + 1]}) end
end

local n, front = #packed / 16, 1
if redis.call('HLEN', name(1)) > MOST then
  local many = 1
  front = n + 1
  while front - many > 1 do
    local mid = math.floor((many + front) / 2)
    if redis.call('HLEN', name(mid)) > MOST then many = mid else front = mid end
  end
  sample(many)
end
local flat = front <= n and redis.call('HGETALL', name(front)) or {}
if #flat > 0 then
  local fields, first = {}, {}
  for j = 1, #flat, 2 do
    fields[#fields + 1], first[#first + 1] = flat[j], flat[j + 1]
  end
  local last = n > front and bitmaps(n, fields) or first
  ended(n, fields, last)
  local f, a, b = differing(fields, first, last)
  if #f > 0 then between(front, n, f, a, b) end
end

local reply = {}
for i, here in pairs(ends) do
  for bits, list in pairs(here) do
    reply[#reply + 1] = i
    reply[#reply + 1] = tonumber(bits) or 0
    reply[#reply + 1] = list
  end
end
return reply
