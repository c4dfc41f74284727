"""The ledger of keys as people and programs read it."""

import dataclasses
import datetime
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

from pydantic import Field
from typing_extensions import TypedDict

from server.http.schema import Count
from server.keys.key import Key
from server.keys.keyring import KeyLimits, KeyState, describe, describe_limits
from server.keys.store.store import Store

_EPOCH = datetime.date(1970, 1, 1)


@dataclasses.dataclass(frozen=True, slots=True)
class Days:
    """Days of UTC, both ends included; None is open."""

    since: datetime.date | None = None
    until: datetime.date | None = None

    def __contains__(self, day: datetime.date) -> bool:
        return (self.since is None or self.since <= day) and (
            self.until is None or day <= self.until
        )


ALWAYS = Days()


class KeyCard(TypedDict):
    """The caller's key, without its secret."""

    id: Annotated[str, Field(description="The middle part of its text.")]
    name: Annotated[str, Field(description="What people call it.")]
    limits: Annotated[KeyLimits, Field(description="What it may take.")]


class UsageTotal(TypedDict):
    """What was used."""

    requests: Annotated[Count, Field(description="Requests that were served.")]
    prompt_tokens: Annotated[Count, Field(description="Tokens of their prompts.")]
    completion_tokens: Annotated[Count, Field(description="Tokens that were sampled for them.")]
    cached_tokens: Annotated[
        Count, Field(description="Of the prompts' tokens, those found in the cache.")
    ]


class UsageRow(UsageTotal):
    """What was used of a model on a day of UTC."""

    date: Annotated[str, Field(description="As 2026-01-31.")]
    model: Annotated[str, Field(description="The model's own id.")]


class KeyUsage(TypedDict):
    """What the caller's key has used."""

    object: Literal["usage"]
    key: Annotated[KeyCard, Field(description="Whose it is.")]
    data: Annotated[list[UsageRow], Field(description="By day and model.")]
    total: Annotated[UsageTotal, Field(description="Of all of these.")]


class KeyUsageRow(UsageRow):
    """What a key has used of a model on a day of UTC."""

    key: Annotated[str, Field(description="The key's id.")]
    name: Annotated[str, Field(description="The key's name.")]


class AllUsage(TypedDict):
    """What all keys have used."""

    object: Literal["usage"]
    data: Annotated[list[KeyUsageRow], Field(description="By day, key and model.")]
    total: Annotated[UsageTotal, Field(description="Of all of these.")]


class KeyUse(TypedDict):
    """What a key uses now of each of its limits, requests under way included."""

    requests: Annotated[Count, Field(description="In the last sixty seconds.")]
    tokens: Annotated[
        Count, Field(description="In the last sixty seconds, those reserved included.")
    ]
    day_requests: Annotated[Count, Field(description="Of this day of UTC.")]
    concurrent: Annotated[Count, Field(description="At once.")]


class KeyStanding(KeyState):
    """A key, without its secret, and how it stands."""

    used: Annotated[KeyUse, Field(description="What it uses of its limits now.")]


class KeyList(TypedDict):
    """All keys, oldest first."""

    object: Literal["list"]
    data: Annotated[list[KeyStanding], Field(description="Those that have ended, too.")]


def key_status(store: Store, key: Key) -> KeyStanding:
    """A key as it may be shown, and what it uses now of each of its limits; blocks."""
    quota_status = store.quota_status(key.id, None)
    used: KeyUse = {
        "requests": quota_status.requests,
        "tokens": quota_status.tokens,
        "day_requests": quota_status.day_requests,
        "concurrent": quota_status.running,
    }
    return {**describe(key), "used": used}


def key_list(store: Store, keys: Iterable[Key]) -> KeyList:
    """Several keys, each as :func:`key_status` shows it; blocks."""
    return {"object": "list", "data": [key_status(store, key) for key in keys]}


def key_usage(store: Store, key: Key, days: Days = ALWAYS) -> KeyUsage:
    """What a key took, for its holder or for an administrator; blocks, as the store does."""
    data = usage_rows(store, key, days)
    return {
        "object": "usage",
        "key": {"id": key.id, "name": key.name, "limits": describe_limits(key.limits)},
        "data": data,
        "total": _total(data),
    }


def usage_of(store: Store, keys: Iterable[Key], days: Days = ALWAYS) -> AllUsage:
    """What several keys took; blocks, as the store does."""
    data: list[KeyUsageRow] = [
        {"key": key.id, "name": key.name, **row}
        for key in keys
        for row in usage_rows(store, key, days)
    ]
    return {"object": "usage", "data": data, "total": _total(data)}


def usage_rows(store: Store, key: Key, days: Days = ALWAYS) -> list[UsageRow]:
    """One object for each day and model."""
    return [
        {
            "date": day.isoformat(),
            "model": row.model,
            "requests": row.requests,
            "prompt_tokens": row.prompt,
            "completion_tokens": row.completion,
            "cached_tokens": row.cached,
        }
        for row in store.usage(key.id)
        if (day := _EPOCH + datetime.timedelta(row.day)) in days
    ]


def _total(rows: Sequence[UsageTotal]) -> UsageTotal:
    return {
        "requests": sum(row["requests"] for row in rows),
        "prompt_tokens": sum(row["prompt_tokens"] for row in rows),
        "completion_tokens": sum(row["completion_tokens"] for row in rows),
        "cached_tokens": sum(row["cached_tokens"] for row in rows),
    }
