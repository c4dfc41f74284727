"""Limits of keys: reserve before a request runs, settle after it, and say how things stand."""

import asyncio
import dataclasses
import math
import secrets
from contextlib import suppress
from functools import partial

from server.http.errors import ApiError
from server.keys.caller import Caller
from server.keys.key import Key
from server.keys.store.store import DAY_SECONDS, LEASE_SECONDS, QuotaStatus, Reservation, Usage
from server.keys.store.threads import StoreThreads

_WORDS = {
    "day": ("requests a day", "day_requests"),
    "concurrent": ("requests at once", "concurrent"),
    "requests": ("requests a minute", "requests"),
    "tokens": ("tokens a minute", "tokens"),
}


class Charge:
    """One request's part of its key's limits; without a key, nothing.

    It counts as a request from when it is let in, before any work is done for it. Only the first
    settlement counts.
    """

    def __init__(self, limiter: "Limiter", caller: Caller, reservation: Reservation) -> None:
        self._limiter = limiter
        self._caller = caller
        self._key = caller.key
        self._reservation = reservation

    async def reserve(self, model: str, prompt: int, completion: int) -> None:
        """Reserve the tokens of the request as well.

        Args:
            model: its id.
            prompt: tokens of all its prompts.
            completion: the most tokens that it may generate.

        Raises:
            ApiError: a limit refuses it, so that it does not count, or the store cannot be used.
        """
        if self._key is not None:
            reservation = Reservation(
                id=_new_id(), model=model, prompt=prompt, completion=completion
            )
            before, self._reservation = self._reservation, reservation
            await self._limiter.reserve(self._caller, self._key, reservation, before)

    def settle(self, usage: Usage) -> None:
        """Charge the request, and the tokens that it took."""
        if self._key is not None:
            self._limiter.settle(self._key.id, self._reservation.id, usage)

    def forget(self) -> None:
        """Charge nothing, not even the request."""
        if self._key is not None:
            self._limiter.settle(self._key.id, self._reservation.id, None)

    def settle_failed(self, error: ApiError) -> None:
        """Charge a request that failed: it counts, unless the server could not serve it."""
        if error.status in (500, 503):
            self.forget()
        else:  # 504 as well: its work may have been done, or still go on
            self.settle(Usage())


class Limiter:
    """The limits of all keys, as their store counts them.

    A reservation is a lease that this renews while the request runs, so that a server that dies
    holds nothing for longer than :data:`~server.keys.store.store.LEASE_SECONDS`.
    """

    def __init__(self, threads: StoreThreads) -> None:
        self._threads = threads
        self._store = threads.store
        self._held: dict[str, str] = {}  # reservation id: key id

    async def enter(self, caller: Caller) -> Charge:
        """Count a request of the caller's, before any work is done for it.

        Raises:
            ApiError: a limit refuses it, or the store cannot be used.
        """
        reservation = Reservation(id=_new_id(), model="", prompt=0, completion=0)
        charge = Charge(self, caller, reservation)
        if caller.key is not None:
            await self.reserve(caller, caller.key, reservation)
        return charge

    async def reserve(
        self,
        caller: Caller,
        key: Key,
        reservation: Reservation,
        before: Reservation | None = None,
    ) -> None:
        """Make a reservation for a key, in place of the one ``before``, which is forgotten.

        Raises:
            ApiError: a limit refuses it, or the store cannot be used.
        """
        if before is not None:
            self._held.pop(before.id, None)
        self._held[reservation.id] = key.id

        def reserve() -> QuotaStatus:
            if before is not None:
                self._store.settle(key.id, before.id, None, None)
            return self._store.reserve(key.id, key.limits, reservation, None)

        try:
            # Should the client leave now: without ``before`` nothing has been done for it yet.
            usage = None if before is None else Usage()
            undo = partial(self._store.settle, key.id, reservation.id, usage, None)
            found = await self._threads.call(reserve, undo)
        except BaseException:
            del self._held[reservation.id]
            raise
        caller.quota_status = found
        if found.refusal is not None:
            del self._held[reservation.id]
            raise refused(key, found)

    def settle(self, key_id: str, reservation_id: str, usage: Usage | None) -> None:
        """Hand what a request took to the store, once."""
        if self._held.pop(reservation_id, None) is not None:
            self._threads.send(partial(self._store.settle, key_id, reservation_id, usage, None))

    async def quota_status(self, key: Key) -> QuotaStatus:
        """How a key stands.

        Raises:
            ApiError: the store cannot be used.
        """
        await self._threads.flush()
        return await self._threads.call(partial(self._store.quota_status, key.id, None))

    async def headers(self, caller: Caller | None) -> dict[str, str]:
        """The headers of a response that tell a caller what is left of its limits.

        ``caller`` is None if the request ended before it could be told who sent it.
        """
        if caller is None or (key := caller.key) is None:
            return {}
        found = caller.quota_status
        if found is None:
            try:
                found = await self.quota_status(key)
            except ApiError:  # logged
                return {}
        return limit_headers(key, found)

    async def run(self) -> None:
        """Renew what is held and end what others left behind, for ever."""
        while True:
            await asyncio.sleep(LEASE_SECONDS / 4)
            held = [(key_id, reservation_id) for reservation_id, key_id in self._held.items()]
            with suppress(ApiError):  # logged
                await self._threads.call(partial(self._store.renew, held, None))
                await self._threads.call(partial(self._store.sweep, None))


def _new_id() -> str:
    return secrets.token_hex(12)


def refused(key: Key, found: QuotaStatus) -> ApiError:
    """What a request is told that a limit refuses."""
    assert found.refusal is not None
    words, name = _WORDS[found.refusal]
    limit = getattr(key.limits, name)
    seconds = max(1, math.ceil(found.retry))
    headers = {
        "Retry-After": str(seconds),
        "Retry-After-Ms": str(max(1, math.ceil(found.retry * 1000))),
    }
    if found.refusal == "day":
        return ApiError(
            429,
            f"The API key has used its {limit} {words}; they are counted anew from midnight UTC.",
            kind="insufficient_quota",
            code="insufficient_quota",
            headers={**headers, "X-Should-Retry": "false"},
        )
    return ApiError(
        429,
        f"The API key is limited to {limit} {words}; try again in {seconds} s.",
        kind="rate_limit_exceeded",
        code="rate_limit_exceeded",
        headers={**headers, "X-Should-Retry": "true"},
    )


def exhausted(key: Key, found: QuotaStatus) -> ApiError | None:
    """Why the key could not make another request now, whatever its size."""
    limits = key.limits
    midnight = DAY_SECONDS - found.now % DAY_SECONDS
    if limits.day_requests is not None and found.day_requests >= limits.day_requests:
        return refused(key, dataclasses.replace(found, refusal="day", retry=midnight))
    if limits.requests is not None and found.requests >= limits.requests:
        wait = found.reset - found.now
        return refused(key, dataclasses.replace(found, refusal="requests", retry=wait))
    return None


def limit_headers(key: Key, found: QuotaStatus) -> dict[str, str]:
    """The headers of a response to this key; nothing is said of what has no limit."""
    headers: dict[str, str] = {}
    reset = max(0, math.ceil(found.reset - found.now))
    requests, tokens = key.limits.requests, key.limits.tokens
    if requests is not None:
        left = str(max(0, requests - found.requests))
        headers |= {
            "X-RateLimit-Limit": str(requests),
            "X-RateLimit-Remaining": left,
            "X-RateLimit-Reset": str(math.ceil(found.reset)),
            "X-RateLimit-Limit-Requests": str(requests),
            "X-RateLimit-Remaining-Requests": left,
            "X-RateLimit-Reset-Requests": duration(reset),
        }
    if tokens is not None:
        headers |= {
            "X-RateLimit-Limit-Tokens": str(tokens),
            "X-RateLimit-Remaining-Tokens": str(max(0, tokens - found.tokens)),
            "X-RateLimit-Reset-Tokens": duration(reset),
        }
    return headers


def duration(seconds: int) -> str:
    """As OpenAI writes it: ``1s``, ``6m0s``, ``1h0m0s``."""
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes}m{rest}s"
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
