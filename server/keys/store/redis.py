"""Keys and limits in Redis or Valkey, which several servers may share.

Whatever must be one step is a script on the server. All names hold the same hash tag, so that a
cluster keeps them on one node; the clock is the server's.
"""

import secrets
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import redis

from server.keys.key import Key, Limits
from server.keys.store.redis_scripts import ADD_TICKET, QUOTA_STATUS, RENEW, RESERVE, SETTLE
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
            for text in (RESERVE, SETTLE, RENEW, QUOTA_STATUS, ADD_TICKET)
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
                RESERVE,
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
        self._run(SETTLE, key_id, now, reservation_id, *amounts)

    @_telling
    def renew(self, calls: Iterable[tuple[str, str]], now: float | None) -> None:
        by_key: dict[str, list[str]] = {}
        for key_id, reservation_id in calls:
            by_key.setdefault(key_id, []).append(reservation_id)
        for key_id, ids in by_key.items():
            self._run(RENEW, key_id, now, LEASE_SECONDS, *ids)

    @_telling
    def quota_status(self, key_id: str, now: float | None) -> QuotaStatus:
        return _quota_status(self._run(QUOTA_STATUS, key_id, now))

    @_telling
    def sweep(self, now: float | None) -> None:
        for key_id in self._redis.smembers(_ROOT + "keys"):
            self._run(QUOTA_STATUS, key_id, now)

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
        wait = self._scripts[ADD_TICKET](keys=names, args=arguments)
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
