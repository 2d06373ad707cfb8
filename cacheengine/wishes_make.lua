-- Say a wish: pin, unpin or clear.
-- KEYS[1]  the wishes    KEYS[2]  the pins (both share a hash tag)
-- ARGV[1]  'pin' | 'unpin' | 'clear'    ARGV[2]  who    ARGV[3]  most pins    ARGV[4..]  chunk keys in hex
-- Returns  {the number workers must announce, pins added or removed}; {0, pins} when there would be too many.
-- A number is above every earlier one, also after the server lost everything: then its clock carries it.
local now = redis.call('TIME')
local us = now[1] * 1000000 + now[2]  -- exact in a double for centuries
local field = ARGV[1] == 'clear' and 'clear_epoch' or 'pins_version'

local changed = 0
if ARGV[1] == 'pin' then
  local fresh = 0
  for i = 4, #ARGV do fresh = fresh + 1 - redis.call('SISMEMBER', KEYS[2], ARGV[i]) end
  local held = redis.call('SCARD', KEYS[2])
  if held + fresh > tonumber(ARGV[3]) then return {0, held} end
  for i = 4, #ARGV do changed = changed + redis.call('SADD', KEYS[2], ARGV[i]) end
elseif ARGV[1] == 'unpin' then
  for i = 4, #ARGV do changed = changed + redis.call('SREM', KEYS[2], ARGV[i]) end
end

local number = math.max(tonumber(redis.call('HGET', KEYS[1], field) or '0') + 1, us)
redis.call('HSET', KEYS[1], field, string.format('%.0f', number),
  ARGV[1] .. '_by', ARGV[2], ARGV[1] .. '_at', now[1])
return {string.format('%.0f', number), changed}
