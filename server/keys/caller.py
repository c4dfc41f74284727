"""Whose request this is, for everything that happens on its behalf."""

from typing import Any

from quart import g, has_app_context

from server.keys.key import Key
from server.keys.store.store import QuotaStatus


def caller() -> Key | None:
    """The key of the current request; None if it needed none."""
    return _fact("caller")


def set_caller(key: Key) -> None:
    """Note it."""
    g.caller = key


def quota_status() -> QuotaStatus | None:
    """How the caller stood when the current request was counted; None if it was not."""
    return _fact("quota_status")


def set_quota_status(found: QuotaStatus) -> None:
    """Note it."""
    g.quota_status = found


def owner() -> str | None:
    """The id of the caller's key."""
    key = caller()
    return None if key is None else key.id


def cache_salt(wanted: str) -> bytes:
    """What a request's cached prompts are salted with: two keys never share them."""
    # No id holds a colon, so nothing that is wanted makes two callers' salts equal.
    return f"{owner() or ''}:{wanted}".encode()


def _fact(name: str) -> Any:
    return g.get(name) if has_app_context() else None
