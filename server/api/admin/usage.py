"""Usage: of the caller's own key at ``/v1/usage``, of all keys at ``/admin/usage``."""

import datetime
import re
from functools import partial

from quart import request

from server.api.endpoint import Endpoint, Parameter
from server.http.errors import bad_request
from server.keys.key import Key
from server.keys.usage import AllUsage, Days, KeyUsage, key_usage, usage_of
from server.run.context import Context
from server.services import Services

_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_DAY = {"type": "string", "format": "date"}
DAYS = {
    "since": Parameter(schema=_DAY, description="The first day (UTC), inclusive."),
    "until": Parameter(schema=_DAY, description="The last day, inclusive; not before `since`."),
}
"""The parameters of a query that :func:`days_of` reads."""


@Endpoint(
    method="GET",
    path="/v1/usage",
    access="any",
    tag="keys",
    summary="Get the limits and the usage of the caller's own key",
    answer=KeyUsage,
    errors=(400,),
)
async def get_usage(services: Services, context: Context) -> KeyUsage:
    """Report the usage of the caller's key."""
    key = needed_key(context)
    await services.threads.flush()
    return await services.threads.call(partial(key_usage, services.threads.store, key))


@Endpoint(
    method="GET",
    path="/admin/usage",
    access="admin",
    tag="admin",
    summary="Get the usage of all keys",
    query=DAYS,
    answer=AllUsage,
    errors=(400,),
)
async def get_all_usage(services: Services, context: Context) -> AllUsage:
    """Report the usage of all keys."""
    days = days_of()
    await services.threads.flush()
    store, keyring = services.threads.store, services.keyring
    return await services.threads.call(lambda: usage_of(store, keyring.all(), days))


def needed_key(context: Context) -> Key:
    """The caller's key.

    Raises:
        ApiError: the server needs none, and so the caller has none.
    """
    key: Key | None = context.caller.key
    if key is None:
        raise bad_request("This server needs no API keys now, and keeps nothing about callers.")
    return key


def days_of() -> Days:
    """The days that the query asks for: ``since`` and ``until``.

    Raises:
        ApiError: one of them is no date, or they are in the wrong order.
    """
    days = Days(_date("since"), _date("until"))
    if days.since is not None and days.until is not None and days.since > days.until:
        raise bad_request(
            f"since is {days.since}; it must not be after until, {days.until}.", "since"
        )
    return days


def _date(name: str) -> datetime.date | None:
    values = request.args.getlist(name)
    if not values:
        return None
    try:
        if len(values) > 1 or not _DATE.fullmatch(values[0]):
            raise ValueError
        return datetime.date.fromisoformat(values[0])
    except ValueError:
        raise bad_request(
            f"{name} is {', '.join(values)[:40]!r}; it must be one day of UTC, as in 2026-01-31.",
            name,
        ) from None
