"""Keys and limits in Redis or Valkey, which several servers may share.

Whatever must be one step is a script on the server. All names hold the same hash tag, so that a
cluster keeps them on one node; the clock is the server's.

Of every key there are four names: ``window``, a sorted set of the calls of the last sixty seconds
by their time; ``running``, a sorted set of those under way by the end of their lease; ``calls``, a
hash of both kinds' data, with the sum of the window's tokens; and ``usage``, a hash of amounts.
The first argument is the time, empty for the server's. Numbers are written with all their digits:
what Redis would write itself is rounded.
"""

import secrets
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import redis

from server.keys.key import Key, Limits
from server.keys.store.store import (
    LEASE_SECONDS,
    QuotaStatus,
    Refusal,
    Reservation,
    StoreError,
    Usage,
    UsageRow,
)

_TIMEOUT_SECONDS = 2.0
_ROOT = "{inferneo}:"
_AMOUNTS = ("requests", "prompt", "completion", "cached")

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

_RESERVE = (
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

_SETTLE = (
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

_RENEW = (
    _COMMON
    + """
for i = 3, #ARGV do
  redis.call('ZADD', running, 'XX', text(now + tonumber(ARGV[2])), ARGV[i])
end
"""
)

_ADD_TICKET = """
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

_QUOTA_STATUS = _COMMON + "\nreturn standing('', 0)\n"

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _telling(
    method: Callable[Concatenate["RedisStore", Arguments], Result],
) -> Callable[Concatenate["RedisStore", Arguments], Result]:
    """Redis's errors as ours; its URL, which may hold a password, is not repeated."""

    @wraps(method)
    def call(self: "RedisStore", /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            return method(self, *args, **kwargs)
        except (redis.RedisError, OSError) as error:
            kind = type(error).__name__
            raise StoreError(f"the key database (Redis) cannot be used: {kind}") from None

    return call


class RedisStore:
    """A :class:`~server.keys.store.store.Store` on a server of its own."""

    threads = 8

    def __init__(self, url: str) -> None:
        url = url.replace("valkey", "redis", 1) if url.startswith("valkey") else url
        self._redis: Any = redis.Redis.from_url(
            url,
            decode_responses=True,
            socket_timeout=_TIMEOUT_SECONDS,
            socket_connect_timeout=_TIMEOUT_SECONDS,
        )
        self._scripts = {
            text: self._redis.register_script(text)
            for text in (_RESERVE, _SETTLE, _RENEW, _QUOTA_STATUS, _ADD_TICKET)
        }

    def exists(self) -> bool:
        """See :class:`~server.keys.store.store.Store`, here and below."""
        return True

    @_telling
    def pepper(self) -> bytes:
        self._redis.set(_ROOT + "pepper", secrets.token_hex(32), nx=True)
        return bytes.fromhex(self._redis.get(_ROOT + "pepper"))

    @_telling
    def has_keys(self) -> bool:
        return bool(self._redis.exists(_ROOT + "keys"))

    @_telling
    def add_key(self, key: Key) -> None:
        with self._redis.pipeline() as pipe:
            pipe.hset(f"{_ROOT}key:{key.id}", mapping=key.to_fields())
            pipe.sadd(_ROOT + "keys", key.id)
            pipe.execute()

    @_telling
    def find_key(self, key_id: str) -> Key | None:
        fields = self._redis.hgetall(f"{_ROOT}key:{key_id}")
        return Key.from_fields(key_id, fields) if fields else None

    @_telling
    def list_keys(self) -> list[Key]:
        ids = self._redis.smembers(_ROOT + "keys")
        keys = [key for key_id in ids if (key := self.find_key(key_id)) is not None]
        return sorted(keys, key=lambda key: (key.created, key.id))

    @_telling
    def change_key(self, key_id: str, changes: Mapping[str, str]) -> None:
        self._redis.hset(f"{_ROOT}key:{key_id}", mapping=dict(changes))

    @_telling
    def reserve(
        self, key_id: str, limits: Limits, reservation: Reservation, now: float | None
    ) -> QuotaStatus:
        bounds = (limits.day_requests, limits.concurrent, limits.requests, limits.tokens)
        return _quota_status(
            self._run(
                _RESERVE,
                key_id,
                now,
                *(-1 if bound is None else bound for bound in bounds),
                *(
                    reservation.id,
                    reservation.model,
                    reservation.prompt,
                    reservation.completion,
                    reservation.tokens(limits),
                ),
                LEASE_SECONDS,
            )
        )

    @_telling
    def settle(
        self, key_id: str, reservation_id: str, usage: Usage | None, now: float | None
    ) -> None:
        amounts = ("", "", "") if usage is None else (usage.prompt, usage.completion, usage.cached)
        self._run(_SETTLE, key_id, now, reservation_id, *amounts)

    @_telling
    def renew(self, calls: Iterable[tuple[str, str]], now: float | None) -> None:
        by_key: dict[str, list[str]] = {}
        for key_id, reservation_id in calls:
            by_key.setdefault(key_id, []).append(reservation_id)
        for key_id, ids in by_key.items():
            self._run(_RENEW, key_id, now, LEASE_SECONDS, *ids)

    @_telling
    def quota_status(self, key_id: str, now: float | None) -> QuotaStatus:
        return _quota_status(self._run(_QUOTA_STATUS, key_id, now))

    @_telling
    def sweep(self, now: float | None) -> None:
        for key_id in self._redis.smembers(_ROOT + "keys"):
            self._run(_QUOTA_STATUS, key_id, now)

    @_telling
    def usage(self, key_id: str) -> list[UsageRow]:
        found: dict[tuple[int, str], dict[str, int]] = {}
        for name, amount in self._redis.hgetall(f"{_ROOT}usage:{key_id}").items():
            kind, day, model = name.split("|", 2)
            if kind in _AMOUNTS:
                found.setdefault((int(day), model), {})[kind] = int(amount)
        return [
            UsageRow(key_id, day, model, *(row.get(kind, 0) for kind in _AMOUNTS))
            for (day, model), row in sorted(found.items())
            if row.get("requests", 0) > 0
        ]

    @_telling
    def add_ticket(
        self, ticket: str, key_id: str, now: float, expires: float, most: int
    ) -> float | None:
        names = [f"{_ROOT}tickets:{key_id}", f"{_ROOT}ticket:{ticket}"]
        arguments: list[Any] = [repr(now), repr(expires), most, key_id, ticket]
        wait = self._scripts[_ADD_TICKET](keys=names, args=arguments)
        return float(wait) if wait else None

    @_telling
    def take_ticket(self, ticket: str, now: float) -> str | None:
        value = self._redis.getdel(f"{_ROOT}ticket:{ticket}")
        if value is None:
            return None
        expires, key_id = value.split("|", 1)
        self._redis.zrem(f"{_ROOT}tickets:{key_id}", ticket)
        return key_id if float(expires) > now else None

    def close(self) -> None:
        self._redis.close()

    def _run(self, script: str, key_id: str, now: float | None, *arguments: Any) -> Any:
        names = [f"{_ROOT}{part}:{key_id}" for part in ("window", "running", "calls", "usage")]
        clock = "" if now is None else repr(now)
        return self._scripts[script](keys=names, args=[clock, *arguments])


def _quota_status(answer: list[Any]) -> QuotaStatus:
    refusal, retry, now, requests, tokens, day, running, reset = answer
    return QuotaStatus(
        now=float(now),
        requests=int(requests),
        tokens=int(tokens),
        day_requests=int(day),
        running=int(running),
        reset=float(reset),
        refusal=cast(Refusal, refusal) if refusal else None,
        retry=float(retry),
    )
