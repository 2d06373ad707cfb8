-- Tell orders again to a Redis that knows only earlier ones: none, those of an older backup, or those of a
-- replica that had not heard the last.
-- KEYS[1]  cairn:orders    ARGV[1]  their @version    ARGV[2..]  field, value, ... of all, @version among them
-- Checks again what the caller saw, so that of several who tell at once the one who heard the last order wins.
local found = tonumber(redis.call('HGET', KEYS[1], '@version') or '') or -1
if found >= tonumber(ARGV[1]) then return 0 end
local flat = redis.call('HGETALL', KEYS[1])
for i = 1, #flat, 2 do redis.call('HDEL', KEYS[1], flat[i]) end
for i = 2, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
return 1
