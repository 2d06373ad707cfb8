-- Publish where one worker holds chunks of one prefix family now.
-- KEYS[1]  name of any chunk of the family (all share its prefix and its hash tag)
-- ARGV[1]  field: <worker_id>@<epoch>
-- ARGV[2]  expiry in ms
-- ARGV[3]  the chunk keys, 16 raw bytes each
-- ARGV[4]  one byte per key: its tier bitmap, 0 = gone
-- ARGV[5]  if given: the field of this worker's life before, which goes where this one writes
local field, ttl, packed, bitmaps, before = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local prefix = string.sub(KEYS[1], 1, -17)
for i = 1, #bitmaps do
  local name = prefix .. string.sub(packed, 16 * i - 15, 16 * i)
  local bits = string.byte(bitmaps, i)
  if bits == 0 then
    redis.call('HDEL', name, field)
  else
    redis.call('HSET', name, field, bits)
    redis.call('PEXPIRE', name, ttl)
  end
  if before then redis.call('HDEL', name, before) end
end
return #bitmaps
