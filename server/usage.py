"""The ledger of keys as people and programs read it."""

import dataclasses
import datetime
from collections.abc import Iterable
from functools import partial
from typing import Any

from server.keys import Key
from server.store import DAY_SECONDS, UsageRow
from server.store_threads import StoreThreads

_TOTALS = ("requests", "prompt_tokens", "completion_tokens", "cached_tokens")


async def usage_answer(threads: StoreThreads, key: Key) -> dict[str, Any]:
    """All that a key took, for its holder or for an administrator.

    Raises:
        ApiError: the store cannot be used.
    """
    await threads.flush()
    data = usage_rows(await threads.call(partial(threads.store.usage, key.id)))
    return {
        "object": "usage",
        "key": {"id": key.id, "name": key.name, "limits": dataclasses.asdict(key.limits)},
        "data": data,
        "total": {name: sum(row[name] for row in data) for name in _TOTALS},
    }


def usage_rows(rows: Iterable[UsageRow]) -> list[dict[str, Any]]:
    """One object for each day and model."""
    return [
        {
            "date": datetime.datetime.fromtimestamp(row.day * DAY_SECONDS, datetime.UTC)
            .date()
            .isoformat(),
            "model": row.model,
            "requests": row.requests,
            "prompt_tokens": row.prompt,
            "completion_tokens": row.completion,
            "cached_tokens": row.cached,
        }
        for row in rows
    ]
