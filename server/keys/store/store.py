"""Where keys, limits and usage are kept: one interface, over SQLite and over Redis or Valkey.

Everything here blocks, so the event loop calls it on threads. Rates are counted over the sixty
seconds before a reservation, each request at the time it was admitted: no minute ever holds more
than the limit. A day is a day of UTC.

A request reserves the most it can take and is settled with what it took. A reservation is a lease:
if nobody renews it, because its server died, it ends, and is charged as reserved.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from inferneo_jax import InferneoError
from server.keys.key import Key, Limits

WINDOW_SECONDS = 60.0
DAY_SECONDS = 86_400
LEASE_SECONDS = 60.0
BUSY_SECONDS = 1.0
"""Retry-After for the limit on concurrent requests, whose end cannot be known."""

Refusal = Literal["day", "concurrent", "requests", "tokens"]


class StoreError(InferneoError):
    """The store cannot be used now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reservation:
    """The tokens that a request may take at most; ``id`` is unique."""

    id: str
    model: str
    prompt: int
    completion: int

    def tokens(self, limits: Limits) -> int:
        """To be reserved: no more than there can be."""
        most = self.prompt + self.completion
        return most if limits.tokens is None else min(most, limits.tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Tokens that a request took.

    Of the prompt's, ``cached`` were found in the prefix cache; of the completion's, ``reasoning``
    were reasoning, which stores do not keep.
    """

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    reasoning: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class QuotaStatus:
    """What a key has used of its limits, at the time ``now``.

    Attributes:
        requests: of the last sixty seconds; so are ``tokens``, those reserved included.
        day_requests: of this day.
        running: requests under way.
        reset: when the last of the sixty seconds' requests will have left them.
        refusal: the limit that a reservation would have exceeded; None: it was made, or none was
            asked for.
        retry: seconds until that limit will allow it.
    """

    now: float
    requests: int
    tokens: int
    day_requests: int
    running: int
    reset: float
    refusal: Refusal | None = None
    retry: float = 0.0


@dataclass(frozen=True, slots=True)
class UsageRow:
    """What a key took of a model on a day, counted in days since 1970 (UTC)."""

    key: str
    day: int
    model: str
    requests: int
    prompt: int
    completion: int
    cached: int


class Store(Protocol):
    """Keys, reservations, usage and tickets.

    Every method may raise :class:`StoreError`. ``now`` is in epoch seconds; None asks the store's
    own clock.

    Attributes:
        threads: how many threads may call it at once.
    """

    threads: int

    def exists(self) -> bool:
        """Whether there may be keys; returns without blocking."""

    def pepper(self) -> bytes:
        """The secret that digests are made with; made when it is first asked for."""

    def has_keys(self) -> bool:
        """Whether a key was ever added."""

    def add_key(self, key: Key) -> None:
        """Keep a new key."""

    def find_key(self, key_id: str) -> Key | None:
        """The key of this id."""

    def list_keys(self) -> list[Key]:
        """All keys, oldest first."""

    def change_key(self, key_id: str, changes: Mapping[str, str]) -> None:
        """Replace some of its encoded fields."""

    def reserve(
        self, key_id: str, limits: Limits, reservation: Reservation, now: float | None
    ) -> QuotaStatus:
        """Make the reservation, or say which limit refuses it, atomically."""

    def settle(
        self, key_id: str, reservation_id: str, usage: Usage | None, now: float | None
    ) -> None:
        """Charge what it took; None: it never ran, forget it. Does nothing once it has ended."""

    def renew(self, calls: Iterable[tuple[str, str]], now: float | None) -> None:
        """Keep reservations, by the ids of key and call, for another lease."""

    def quota_status(self, key_id: str, now: float | None) -> QuotaStatus:
        """The key's quota status, without a reservation."""

    def sweep(self, now: float | None) -> None:
        """End the reservations whose lease has run out."""

    def usage(self, key_id: str) -> list[UsageRow]:
        """All that was charged to a key, by day and model."""

    def add_ticket(
        self, ticket: str, key_id: str, now: float, expires: float, most: int
    ) -> float | None:
        """Keep the digest of a ticket, in one step with counting those of its key.

        Returns:
            None; or, with nothing kept, seconds until the first of ``most`` unused ones expires.
        """

    def take_ticket(self, ticket: str, now: float) -> str | None:
        """The id of the key whose ticket this is, once; None if it is none, or has expired."""

    def close(self) -> None:
        """Let go of connections."""


def refusal_of(status: QuotaStatus, limits: Limits, tokens: int) -> Refusal | None:
    """The limit that one more request, of so many tokens, would exceed."""
    used: tuple[tuple[Refusal, int, int, int | None], ...] = (
        ("day", status.day_requests, 1, limits.day_requests),
        ("concurrent", status.running, 1, limits.concurrent),
        ("requests", status.requests, 1, limits.requests),
        ("tokens", status.tokens, tokens, limits.tokens),
    )
    for name, taken, more, limit in used:
        if limit is not None and taken + more > limit:
            return name
    return None


def token_wait(calls: Iterable[tuple[float, int]], excess: int, now: float) -> float:
    """Seconds until ``excess`` tokens have left; calls are (time, tokens), oldest first."""
    for at, tokens in calls:
        excess -= tokens
        if excess <= 0:
            return at + WINDOW_SECONDS - now
    return WINDOW_SECONDS
