-- Give wishes back to a server that lost them.  Numbers only rise; pins travel with theirs.
-- KEYS[1]  the wishes    KEYS[2]  the pins (both share a hash tag)
-- ARGV[1]  pins_version    ARGV[2]  clear_epoch    ARGV[3..]  chunk keys in hex: all pins of that version
-- equal: the pins alone were lost
if tonumber(ARGV[1]) >= tonumber(redis.call('HGET', KEYS[1], 'pins_version') or '0') then
  redis.call('DEL', KEYS[2])
  for i = 3, #ARGV do redis.call('SADD', KEYS[2], ARGV[i]) end
  redis.call('HSET', KEYS[1], 'pins_version', ARGV[1])
end
if tonumber(ARGV[2]) > tonumber(redis.call('HGET', KEYS[1], 'clear_epoch') or '0') then
  redis.call('HSET', KEYS[1], 'clear_epoch', ARGV[2])
end
return redis.call('SCARD', KEYS[2])
