-- Compare what one worker holds of one prefix family with what is written here; mend it, renew its expiry.
-- KEYS[1]  name of any chunk of the family (all share its prefix and its hash tag)
-- ARGV[1]  field: <worker_id>@<epoch>
-- ARGV[2]  expiry in ms
-- ARGV[3]  the chunk keys, 16 raw bytes each
-- ARGV[4]  one byte per key: its tier bitmap, never 0
-- ARGV[5..] fields of lives that are over: removed
-- Returns  {how many were wrong or missing, the fields of everybody else who is named at these chunks ...}
local field, ttl, packed, bitmaps = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local prefix = string.sub(KEYS[1], 1, -17)
local reply, seen = {0}, {[field] = true}
for i = 1, #bitmaps do
  local name = prefix .. string.sub(packed, 16 * i - 15, 16 * i)
  local bits = tostring(string.byte(bitmaps, i))
  if redis.call('HGET', name, field) ~= bits then
    reply[1] = reply[1] + 1
    redis.call('HSET', name, field, bits)
  end
  if #ARGV > 4 then redis.call('HDEL', name, unpack(ARGV, 5)) end
  redis.call('PEXPIRE', name, ttl)
  for _, other in ipairs(redis.call('HKEYS', name)) do
    if not seen[other] then
      seen[other] = true
      reply[#reply + 1] = other
    end
  end
end
return reply
