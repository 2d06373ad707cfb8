-- The next epoch of a worker's name: above every earlier one, also after the counter or the whole server was
-- lost (then the server's clock carries it).
-- KEYS[1]  counter    ARGV[1]  highest epoch the caller remembers    ARGV[2]  expiry of the counter in ms
-- Returns  {the epoch, the last one before it as far as anybody remembers (0: none)}
local now = redis.call('TIME')
local ms = now[1] * 1000 + math.floor(now[2] / 1000)
local last = math.max(tonumber(redis.call('GET', KEYS[1]) or '0'), tonumber(ARGV[1]))
local epoch = string.format('%.0f', math.max(last + 1, ms))
redis.call('SET', KEYS[1], epoch, 'PX', ARGV[2])
return {epoch, string.format('%.0f', last)}
