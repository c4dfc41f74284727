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

    id: Annotated[str, Field(description="The key's id, the middle part of its text.")]
    name: Annotated[str, Field(description="The key's name, for people.")]
    limits: Annotated[KeyLimits, Field(description="The key's limits.")]


class UsageTotal(TypedDict):
    """Totals."""

    requests: Annotated[Count, Field(description="Requests served.")]
    prompt_tokens: Annotated[Count, Field(description="Prompt tokens.")]
    completion_tokens: Annotated[Count, Field(description="Tokens sampled.")]
    cached_tokens: Annotated[Count, Field(description="Prompt tokens found in the prefix cache.")]


class UsageRow(UsageTotal):
    """The usage of a model on one day (UTC)."""

    date: Annotated[str, Field(description="The day, such as 2026-01-31.")]
    model: Annotated[str, Field(description="The model's own id.")]


class KeyUsage(TypedDict):
    """The usage of a key."""

    object: Literal["usage"]
    key: Annotated[KeyCard, Field(description="The key.")]
    data: Annotated[list[UsageRow], Field(description="One row for each day and model.")]
    total: Annotated[UsageTotal, Field(description="The sum of all rows.")]


class KeyUsageRow(UsageRow):
    """The usage of a model by a key on one day (UTC)."""

    key: Annotated[str, Field(description="The key's id.")]
    name: Annotated[str, Field(description="The key's name.")]


class AllUsage(TypedDict):
    """The usage of all keys."""

    object: Literal["usage"]
    data: Annotated[list[KeyUsageRow], Field(description="One row for each day, key and model.")]
    total: Annotated[UsageTotal, Field(description="The sum of all rows.")]


class KeyUse(TypedDict):
    """How much of each limit is used now, by running requests too."""

    requests: Annotated[Count, Field(description="Requests in the last 60 s.")]
    tokens: Annotated[
        Count, Field(description="Tokens in the last 60 s, reserved tokens included.")
    ]
    day_requests: Annotated[Count, Field(description="Requests today (UTC).")]
    concurrent: Annotated[Count, Field(description="Running requests.")]


class KeyStatus(KeyState):
    """A key without its secret, and the status of its quota."""

    used: Annotated[KeyUse, Field(description="How much of each limit is used now.")]


class KeyList(TypedDict):
    """All keys, oldest first."""

    object: Literal["list"]
    data: Annotated[list[KeyStatus], Field(description="Expired and revoked keys are included.")]


def key_status(store: Store, key: Key) -> KeyStatus:
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
