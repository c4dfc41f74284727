"""The ledger of keys as people and programs read it."""

import datetime
from collections.abc import Iterable
from typing import Any

from server.store import DAY_SECONDS, UsageRow


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
