-- Count for how long nobody has seen the workers that orders are about; forget orders that are past it.
-- KEYS[1]  cairn:orders    ARGV[1]  seconds between two counts, of whichever gateway    ARGV[2]  most counts
-- ARGV[3..] ids of the workers the caller sees now
-- Returns  ids of the workers whose orders were forgotten
-- Counts, not times: while no gateway looks nothing passes, so a fleet that was off finds its orders again.
local seen, gone, orders = {}, {}, {}
for i = 3, #ARGV do seen[ARGV[i]] = true end
local flat = redis.call('HGETALL', KEYS[1])
for i = 1, #flat, 2 do
  if string.sub(flat[i], 1, 1) ~= '@' then orders[#orders + 1] = flat[i] end
end
if #orders == 0 then return gone end
local now = tonumber(redis.call('TIME')[1])
local last = tonumber(redis.call('HGET', KEYS[1], '@swept') or '')
local due = not last or now < last or now - last >= tonumber(ARGV[1])
for _, worker in ipairs(orders) do
  local missed = '@missed:' .. worker
  if seen[worker] then
    redis.call('HDEL', KEYS[1], missed)
  elseif due then
    local count = (tonumber(redis.call('HGET', KEYS[1], missed) or '') or 0) + 1
    if count > tonumber(ARGV[2]) then
      redis.call('HDEL', KEYS[1], worker, missed)
      gone[#gone + 1] = worker
    else
      redis.call('HSET', KEYS[1], missed, count)
    end
  end
end
if due then redis.call('HSET', KEYS[1], '@swept', now) end
if #gone > 0 then redis.call('HINCRBY', KEYS[1], '@version', 1) end
return gone
