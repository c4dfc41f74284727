"""The ledger of keys as people and programs read it."""

import dataclasses
import datetime
from collections.abc import Iterable
from typing import Any

from server.keys.key import Key
from server.keys.keyring import describe
from server.keys.store.store import Store

_TOTALS = ("requests", "prompt_tokens", "completion_tokens", "cached_tokens")
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


def key_status(store: Store, key: Key) -> dict[str, Any]:
    """A key as it may be shown, and what it uses now of each of its limits; blocks."""
    quota_status = store.quota_status(key.id, None)
    used = {
        "requests": quota_status.requests,
        "tokens": quota_status.tokens,
        "day_requests": quota_status.day_requests,
        "concurrent": quota_status.running,
    }
    return {**describe(key), "used": used}


def key_list(store: Store, keys: Iterable[Key]) -> dict[str, Any]:
    """Several keys, each as :func:`key_status` shows it; blocks."""
    return {"object": "list", "data": [key_status(store, key) for key in keys]}


def key_usage(store: Store, key: Key, days: Days = ALWAYS) -> dict[str, Any]:
    """What a key took, for its holder or for an administrator; blocks, as the store does."""
    data = usage_rows(store, key, days)
    return {
        "object": "usage",
        "key": {"id": key.id, "name": key.name, "limits": dataclasses.asdict(key.limits)},
        "data": data,
        "total": _total(data),
    }


def usage_of(store: Store, keys: Iterable[Key], days: Days = ALWAYS) -> dict[str, Any]:
    """What several keys took; blocks, as the store does."""
    data = [
        {"key": key.id, "name": key.name, **row}
        for key in keys
        for row in usage_rows(store, key, days)
    ]
    return {"object": "usage", "data": data, "total": _total(data)}


def usage_rows(store: Store, key: Key, days: Days = ALWAYS) -> list[dict[str, Any]]:
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


def _total(rows: list[dict[str, Any]]) -> dict[str, int]:
    return {name: sum(row[name] for row in rows) for name in _TOTALS}
