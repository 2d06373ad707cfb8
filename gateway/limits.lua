-- One request's share of a key's limits, and what earlier ones really used.  gateway/limits_book.py is its
-- twin, for when Redis is away: change both.
-- KEYS[1]  the tenant's HASH: of each key `r:<key>` and `t:<key>`, what is used of its minute and when that
--          was ("12 1700000000000"), and `c:<key>`, who carries how many of its requests until when (JSON);
--          of the tenant `m`, a month and its tokens ("2026-01 12345")
-- ARGV[1]  JSON: key; gateway, carried (requests of the key it carries, this one included), lease (ms);
--          rpm, tpm, concurrency, budget (0: no limit); take (is there a request?), tokens (its estimate);
--          settled, spent (tokens to add to the minute and the month); month, known (what the gateway was last
--          told of it: a Redis that lost its memory is told again); now (ms; tests only)
-- Returns  {verdict, ms to wait, requests left, ms until all are, tokens left, ms until all are, of the month}
--          verdict 0: taken; else nothing was taken, and what is short: 1 the month, 2 places, 3 requests,
--          4 tokens, 5 tokens for ever
local ask = cjson.decode(ARGV[1])
local now = ask.now
if not now then
  local time = redis.call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end
local names = {'r:' .. ask.key, 't:' .. ask.key, 'c:' .. ask.key, 'm'}
local held = redis.call('HMGET', KEYS[1], unpack(names))

-- What is used of a minute's worth, which drains away all the time: a full minute's worth in a minute.
local function used(text, limit)
  if not text then return 0 end
  local amount, at = string.match(text, '^(%S+) (%S+)$')
  return math.max(0, tonumber(amount) - math.max(0, now - tonumber(at)) * limit / 60000)
end

local function wait(over, limit)
  if over <= 0 or limit == 0 then return 0 end
  return math.ceil(over * 60000 / limit)
end

local requests, tokens = used(held[1], ask.rpm), math.max(0, used(held[2], ask.tpm) + ask.settled)
local carriers, others = held[3] and cjson.decode(held[3]) or {}, 0
for gateway, row in pairs(carriers) do
  if row[2] <= now then carriers[gateway] = nil
  elseif gateway ~= ask.gateway then others = others + row[1] end
end
local month, spent = ask.month, ask.spent + ask.known
if held[4] then
  local of, amount = string.match(held[4], '^(%S+) (%S+)$')
  if of > month then month, spent = of, ask.spent + tonumber(amount)
  elseif of == month then spent = ask.spent + math.max(ask.known, tonumber(amount)) end
end

local verdict, pause, carried = 0, 0, ask.carried
if ask.take then
  if ask.budget > 0 and spent + ask.tokens > ask.budget then verdict = 1
  elseif ask.concurrency > 0 and others + carried > ask.concurrency then verdict = 2
  elseif ask.rpm > 0 and requests + 1 > ask.rpm then
    verdict, pause = 3, wait(requests + 1 - ask.rpm, ask.rpm)
  elseif ask.tpm > 0 and ask.tokens > ask.tpm then verdict = 5
  elseif ask.tpm > 0 and tokens + ask.tokens > ask.tpm then
    verdict, pause = 4, wait(tokens + ask.tokens - ask.tpm, ask.tpm)
  end
  if verdict == 0 then
    requests, tokens = requests + 1, tokens + ask.tokens
  else
    carried = carried - 1
  end
end

carriers[ask.gateway] = carried > 0 and {carried, now + ask.lease} or nil
local told = {'m', string.format('%s %.0f', month, spent)}
local function tell(name, limit, amount)
  if limit > 0 and amount > 0 then
    told[#told + 1] = name
    told[#told + 1] = string.format('%.17g %.0f', amount, now)
  else
    redis.call('HDEL', KEYS[1], name)
  end
end
tell(names[1], ask.rpm, requests)
tell(names[2], ask.tpm, tokens)
if next(carriers) then
  told[#told + 1] = names[3]
  told[#told + 1] = cjson.encode(carriers)
else
  redis.call('HDEL', KEYS[1], names[3])
end
redis.call('HSET', KEYS[1], unpack(told))
redis.call('EXPIRE', KEYS[1], 40 * 86400)  -- longer than a month
return {
  verdict, pause,
  math.max(0, math.floor(ask.rpm - requests)), wait(requests, ask.rpm),
  math.max(0, math.floor(ask.tpm - tokens)), wait(tokens, ask.tpm),
  spent,
}
