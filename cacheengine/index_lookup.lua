-- Who holds how much of this prompt?  Reads only.
-- KEYS[1]  name of the first chunk (all others share its prefix and its hash tag)
-- ARGV[1]  the chunk keys, 16 raw bytes each, in prompt order
-- Returns  {field, device, host, disk, shared, field, ...}: deepest chunk, counted from 1, in each tier.
--
-- Divide and conquer.  Holdings are prefix-closed, so the number of holders and the sum of their bitmaps
-- fall (never rise) along the prompt; where both ends of a stretch agree nothing changes inside it.  The
-- search reads bitmaps only; names are read where something ends.
local packed = ARGV[1]
local prefix = string.sub(KEYS[1], 1, -33)
local HEX = string.rep('%02x', 16)
local weight = {}   -- bitmap as stored -> its share of a signature
local deepest = {}  -- bitmap as stored -> field -> deepest chunk held so

local function name(i)
  return prefix .. string.format(HEX, string.byte(packed, 16 * i - 15, 16 * i))
end

local function signature(i)
  local sum = 0
  for _, bits in ipairs(redis.call('HVALS', name(i))) do
    local w = weight[bits]
    if not w then
      w = 65536 + (tonumber(bits) or 0)
      weight[bits] = w
      deepest[bits] = {}
    end
    sum = sum + w
  end
  return sum
end

local function holders_end(i)
  local flat = redis.call('HGETALL', name(i))
  for j = 1, #flat, 2 do
    local depth = deepest[flat[j + 1]]
    if (depth[flat[j]] or 0) < i then depth[flat[j]] = i end
  end
end

local function between(lo, hi, at_lo, at_hi)
  if at_lo == at_hi then return end
  if hi - lo == 1 then return holders_end(lo) end
  local mid = math.floor((lo + hi) / 2)
  local at_mid = signature(mid)
  between(lo, mid, at_lo, at_mid)
  between(mid, hi, at_mid, at_hi)
end

local n = #packed / 16
local first = signature(1)
if first == 0 then return {} end
local last = n > 1 and signature(n) or first
if last > 0 then holders_end(n) end
between(1, n, first, last)

local depths = {}
for bits, held in pairs(deepest) do
  local b = tonumber(bits) or 0
  for field, i in pairs(held) do
    local d = depths[field]
    if not d then
      d = {0, 0, 0, 0}
      depths[field] = d
    end
    for t = 1, 4 do
      if math.floor(b / 2 ^ (t - 1)) % 2 == 1 and d[t] < i then d[t] = i end
    end
  end
end

local reply = {}
for field, d in pairs(depths) do
  reply[#reply + 1] = field
  for t = 1, 4 do reply[#reply + 1] = d[t] end
end
return reply
