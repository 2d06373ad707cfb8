-- Publish what one worker holds of one prefix family.
-- KEYS[1]   name of any chunk of the family (all share its prefix and its hash tag)
-- ARGV[1]   field: <worker_id>@<epoch>
-- ARGV[2]   expiry in ms
-- ARGV[3]   the chunk keys, 16 raw bytes each
-- ARGV[4]   one byte per key: its tier bitmap, 0 = gone
-- ARGV[5]   0, or: sweep.  Fields of epochs below this that are not in ARGV[6..] are dead and removed
-- ARGV[6..] fields of every live worker
local field, ttl, packed, bitmaps, horizon = ARGV[1], ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
local prefix = string.sub(KEYS[1], 1, -33)
local HEX = string.rep('%02x', 16)

local live = {[field] = true}
for i = 6, #ARGV do live[ARGV[i]] = true end

local function sweep(name)
  for _, held in ipairs(redis.call('HKEYS', name)) do
    if not live[held] and (tonumber(string.match(held, '@(%d+)$')) or 0) < horizon then
      redis.call('HDEL', name, held)
    end
  end
end

for i = 1, #bitmaps do
  local name = prefix .. string.format(HEX, string.byte(packed, 16 * i - 15, 16 * i))
  local bits = string.byte(bitmaps, i)
  if horizon > 0 then sweep(name) end
  if bits == 0 then
    redis.call('HDEL', name, field)
  else
    redis.call('HSET', name, field, bits)
    redis.call('PEXPIRE', name, ttl)
  end
end
return #bitmaps
