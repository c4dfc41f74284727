"""Scripts that run on Redis or Valkey, each as one step.

Of every key there are four names: ``window``, a sorted set of the calls of the last sixty seconds
by their time; ``running``, a sorted set of those under way by the end of their lease; ``calls``, a
hash of both kinds' data, with the sum of the window's tokens; and ``usage``, a hash of amounts.
The first argument is the time, empty for the server's. Numbers are written with all their digits:
what Redis would write itself is rounded.
"""

_COMMON = """
local window, running, calls, usage = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local now = tonumber(ARGV[1])
if not now then
  local time = redis.call('TIME')
  now = tonumber(time[1]) + tonumber(time[2]) / 1e6
end

local function text(number) return string.format('%.17g', number) end
local function load(id) return cjson.decode(redis.call('HGET', calls, id)) end
local function save(id, call) redis.call('HSET', calls, id, cjson.encode(call)) end
local function day_of(at) return string.format('%d', math.floor(at / 86400)) end

local function charge(call, kind, amount)
  redis.call('HINCRBY', usage, kind .. '|' .. call.day .. '|' .. call.model, amount)
end

local function charge_tokens(call, prompt, completion, cached)
  charge(call, 'prompt', prompt)
  charge(call, 'completion', completion)
  charge(call, 'cached', cached)
end

local function charge_request(call, amount)
  charge(call, 'requests', amount)
  redis.call('HINCRBY', usage, 'day|' .. call.day .. '|', amount)
end

-- End leases that nobody renewed, and let go of calls that have left the minute.
for _, id in ipairs(redis.call('ZRANGEBYSCORE', running, '-inf', text(now))) do
  local call = load(id)
  charge_tokens(call, call.prompt, call.completion, 0)
  redis.call('ZREM', running, id)
  if not redis.call('ZSCORE', window, id) then redis.call('HDEL', calls, id) end
end
for _, id in ipairs(redis.call('ZRANGEBYSCORE', window, '-inf', text(now - 60))) do
  redis.call('HINCRBY', calls, 'sum', 0 - load(id).tokens)
  redis.call('ZREM', window, id)
  if not redis.call('ZSCORE', running, id) then redis.call('HDEL', calls, id) end
end

local function standing(refusal, retry)
  local newest = redis.call('ZRANGE', window, -1, -1, 'WITHSCORES')[2]
  return {
    refusal, text(retry), text(now),
    redis.call('ZCARD', window), redis.call('HGET', calls, 'sum') or '0',
    redis.call('HGET', usage, 'day|' .. day_of(now) .. '|') or '0',
    redis.call('ZCARD', running),
    newest and text(tonumber(newest) + 60) or text(now)
  }
end
"""

RESERVE = (
    _COMMON
    + """
local max_day, max_running = tonumber(ARGV[2]), tonumber(ARGV[3])
local max_requests, max_tokens = tonumber(ARGV[4]), tonumber(ARGV[5])
local id, tokens, lease = ARGV[6], tonumber(ARGV[10]), tonumber(ARGV[11])
local function breaks(limit, taken, more) return limit >= 0 and taken + more > limit end

local day = tonumber(redis.call('HGET', usage, 'day|' .. day_of(now) .. '|') or '0')
if breaks(max_day, day, 1) then return standing('day', 86400 - now % 86400) end
if breaks(max_running, redis.call('ZCARD', running), 1) then return standing('concurrent', 1) end
local requests = redis.call('ZCARD', window)
if breaks(max_requests, requests, 1) then
  local leaving = requests - max_requests
  local at = redis.call('ZRANGE', window, leaving, leaving, 'WITHSCORES')[2]
  return standing('requests', at and tonumber(at) + 60 - now or 60)
end
local sum = tonumber(redis.call('HGET', calls, 'sum') or '0')
if breaks(max_tokens, sum, tokens) then
  local excess = sum + tokens - max_tokens
  local found = redis.call('ZRANGE', window, 0, -1, 'WITHSCORES')
  for i = 1, #found, 2 do
    excess = excess - load(found[i]).tokens
    if excess <= 0 then return standing('tokens', tonumber(found[i + 1]) + 60 - now) end
  end
  return standing('tokens', 60)
end

local call = {
  model = ARGV[7], prompt = tonumber(ARGV[8]), completion = tonumber(ARGV[9]), tokens = tokens,
  day = day_of(now)
}
save(id, call)
redis.call('HINCRBY', calls, 'sum', tokens)
redis.call('ZADD', window, text(now), id)
redis.call('ZADD', running, text(now + lease), id)
charge_request(call, 1)
return standing('', 0)
"""
)

SETTLE = (
    _COMMON
    + """
local id = ARGV[2]
if redis.call('ZREM', running, id) == 0 then return end
local call = load(id)
local counts = redis.call('ZSCORE', window, id)
if ARGV[3] == '' then
  if counts then redis.call('HINCRBY', calls, 'sum', 0 - call.tokens) end
  redis.call('ZREM', window, id)
  redis.call('HDEL', calls, id)
  charge_request(call, -1)
  return
end
local prompt, completion = tonumber(ARGV[3]), tonumber(ARGV[4])
charge_tokens(call, prompt, completion, tonumber(ARGV[5]))
if not counts then
  redis.call('HDEL', calls, id)
  return
end
redis.call('HINCRBY', calls, 'sum', prompt + completion - call.tokens)
call.tokens = prompt + completion
save(id, call)
"""
)

RENEW = (
    _COMMON
    + """
for i = 3, #ARGV do
  redis.call('ZADD', running, 'XX', text(now + tonumber(ARGV[2])), ARGV[i])
end
"""
)

ADD_TICKET = """
local tickets, ticket = KEYS[1], KEYS[2]
local now, expires, most = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
redis.call('ZREMRANGEBYSCORE', tickets, '-inf', ARGV[1])
if redis.call('ZCARD', tickets) >= most then
  local first = redis.call('ZRANGE', tickets, 0, 0, 'WITHSCORES')[2]
  return string.format('%.17g', tonumber(first) - now)
end
-- Both are forgotten a while after the ticket ends, which is by the caller's clock.
local seconds = math.ceil(expires - now) + 60
redis.call('SET', ticket, ARGV[2] .. '|' .. ARGV[4], 'EX', seconds)
redis.call('ZADD', tickets, ARGV[2], ARGV[5])
redis.call('EXPIRE', tickets, seconds)
return ''
"""
"""Of a key's unused tickets there is a sorted set, by when they expire; of each ticket a string."""

QUOTA_STATUS = _COMMON + "\nreturn standing('', 0)\n"
