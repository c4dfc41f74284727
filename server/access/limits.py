"""Limits of keys: reserve before a request runs, settle after it, and say how things stand."""

import asyncio
import dataclasses
import math
import secrets
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from server.access.arrivals import Arrival, Arrivals
from server.access.caller import arrival as known_arrival
from server.access.caller import caller, set_arrival, set_standing
from server.access.caller import standing as known_standing
from server.access.keys import Key
from server.access.store import (
    BUSY_SECONDS,
    DAY_SECONDS,
    LEASE_SECONDS,
    Call,
    Spent,
    Standing,
    refusal_of,
)
from server.access.store_threads import StoreThreads
from server.errors import ApiError
from server.protocol.shape import Usage

if TYPE_CHECKING:
    from server.answer import Answer

_WORDS = {
    "day": ("requests a day", "day_requests"),
    "concurrent": ("requests at once", "concurrent"),
    "requests": ("requests a minute", "requests"),
    "tokens": ("tokens a minute", "tokens"),
}


class Reservation:
    """An admitted request's part of its key's limits."""

    def __init__(self, limiter: "Limiter", key_id: str, call: Call) -> None:
        self._limiter = limiter
        self._key_id = key_id
        self._call = call

    def settle(self, usage: Usage | None) -> None:
        """Charge what it took; None: it never ran. Only the first call counts."""
        spent = None
        if usage is not None:
            spent = Spent(**dataclasses.asdict(usage))
        self._limiter.settle(self._key_id, self._call.id, spent)


class Limiter:
    """The limits of all keys, as their store counts them.

    A reservation is a lease that this renews while the request runs, so that a server that dies
    holds nothing for longer than :data:`~server.access.store.LEASE_SECONDS`.
    """

    def __init__(self, threads: StoreThreads) -> None:
        self._threads = threads
        self._store = threads.store
        self._held: dict[str, str] = {}  # key ids by the ids of calls
        self._arrivals = Arrivals()

    async def enter(self) -> Arrival | None:
        """Let the caller's request in, whose body is still to come; None if no limits would count.

        Raises:
            ApiError: the key may make no further request now, or the store cannot be used.
        """
        key = caller()
        if key is None:
            return None
        found = await self.standing(key)
        set_standing(found)
        if refusal_of(found, key.limits, 0):
            # The store itself knows best when there may be another; it may even be now.
            if (reservation := await self.admit("", 0, 0)) is not None:
                reservation.settle(None)
        elif refusal := refusal_of(self._arrivals.added_to(found, key.id), key.limits, 0):
            raise refused(key, dataclasses.replace(found, refusal=refusal, retry=BUSY_SECONDS))
        arrival = self._arrivals.add(key.id)
        set_arrival(arrival)
        return arrival

    async def admit(self, model: str, prompt: int, completion: int) -> Reservation | None:
        """Reserve a request of the caller's; None if there is no key whose limits would count.

        Args:
            model: its id.
            prompt: tokens of all its prompts.
            completion: the most tokens that it may generate.

        Raises:
            ApiError: a limit refuses it, or the store cannot be used.
        """
        key = caller()
        if key is None:
            return None
        if (arrival := known_arrival()) is not None:
            arrival.end()  # from here on the store counts it
        call = Call(id=secrets.token_hex(12), model=model, prompt=prompt, completion=completion)
        self._held[call.id] = key.id
        try:
            found = await self._threads.call(
                partial(self._store.reserve, key.id, key.limits, call, None),
                partial(self._store.settle, key.id, call.id, None, None),
            )
        except BaseException:
            del self._held[call.id]
            raise
        set_standing(found)
        if found.refusal is not None:
            del self._held[call.id]
            raise refused(key, found)
        return Reservation(self, key.id, call)

    async def admit_answer(self, answer: "Answer", model: str) -> None:
        """Reserve what an answer may take, and have it settled when its generation has ended.

        Raises:
            ApiError: as :meth:`admit` does.
        """
        plan = answer.generation.plan
        completion = sum(prompt.max_tokens for prompt in plan.prompts) * plan.num_choices
        reservation = await self.admit(model, answer.generation.usage.prompt, completion)
        if reservation is not None:
            answer.generation.on_end = reservation.settle

    def settle(self, key_id: str, call_id: str, spent: Spent | None) -> None:
        """Hand what a call took to the store, once."""
        if self._held.pop(call_id, None) is not None:
            self._threads.send(partial(self._store.settle, key_id, call_id, spent, None))

    async def standing(self, key: Key) -> Standing:
        """How a key stands.

        Raises:
            ApiError: the store cannot be used.
        """
        await self._threads.flush()
        return await self._threads.call(partial(self._store.standing, key.id, None))

    async def headers(self) -> dict[str, str]:
        """Of the response to the current request."""
        key = caller()
        if key is None:
            return {}
        found = known_standing()
        if found is None:
            try:
                found = await self.standing(key)
            except ApiError:  # logged
                return {}
        return limit_headers(key, found)

    async def run(self) -> None:
        """Renew what is held and end what others left behind, for ever."""
        while True:
            await asyncio.sleep(LEASE_SECONDS / 4)
            held = [(key_id, call_id) for call_id, key_id in self._held.items()]
            with suppress(ApiError):  # logged
                await self._threads.call(partial(self._store.renew, held, None))
                await self._threads.call(partial(self._store.sweep, None))


def refused(key: Key, found: Standing) -> ApiError:
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


def exhausted(key: Key, found: Standing) -> ApiError | None:
    """Why the key could not make another request now, whatever its size."""
    limits = key.limits
    midnight = DAY_SECONDS - found.now % DAY_SECONDS
    if limits.day_requests is not None and found.day_requests >= limits.day_requests:
        return refused(key, dataclasses.replace(found, refusal="day", retry=midnight))
    if limits.requests is not None and found.requests >= limits.requests:
        wait = found.reset - found.now
        return refused(key, dataclasses.replace(found, refusal="requests", retry=wait))
    return None


def limit_headers(key: Key, found: Standing) -> dict[str, str]:
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
