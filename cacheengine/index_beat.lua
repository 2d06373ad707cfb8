-- Renew a worker's lease.
-- KEYS[1]   the lease    ARGV[1]  lease in ms    ARGV[2]  our epoch    ARGV[3..]  field, value, ...
-- Returns   {epoch found in the lease before ('' = there was none), server time in ms}
-- A lease with a higher epoch belongs to a younger process of the same name and is left alone.
local now = redis.call('TIME')
local ms = string.format('%.0f', now[1] * 1000 + math.floor(now[2] / 1000))
local found = redis.call('HGET', KEYS[1], 'epoch') or ''
if found ~= '' and tonumber(found) > tonumber(ARGV[2]) then return {found, ms} end
local held = {'HSET', KEYS[1], 'beat_ms', ms}
for i = 3, #ARGV do held[#held + 1] = ARGV[i] end
redis.call(unpack(held))
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return {found, ms}
