"""``/admin``: keys and their use, for holders of a key of the scope ``admin``."""

import datetime
import re
import threading
import time
from collections.abc import Callable
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import structlog
from quart import Blueprint, Response, request

from server.api.admin.keys import ChangeKeyBody, LimitsBody, NewKeyBody
from server.http.codec import json_response
from server.http.connection import current_request
from server.http.errors import ApiError, bad_request
from server.keys.guard import bearer, check_scope, forbidden
from server.keys.key import Key, Limits
from server.keys.keyring import Keyring, KeyringError, describe
from server.keys.usage import Days, key_list, key_status, key_usage, usage_of
from server.prompt.body import read_body
from server.run.prepare import validate
from server.services import Services

log = structlog.get_logger(__name__)

Result = TypeVar("Result")
_SECRET = {"Cache-Control": "no-store"}
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


class Changed(NamedTuple):
    """A key after a change: its text if it has a new one, and whether it differs at all."""

    key: Key
    text: str | None = None
    differs: bool = True


def blueprint(services: Services) -> Blueprint:
    """All its routes. What changes is logged, and counts at once in this process."""
    routes = Blueprint("admin", __name__, url_prefix="/admin")
    threads, store = services.threads, services.threads.store
    keyring = Keyring(store, keep_admin=True)
    turns = threading.Lock()

    async def do(work: Callable[[], Result]) -> Result:
        try:
            return await threads.call(work)
        except KeyringError as error:
            raise _as_api_error(error) from None

    async def change(event: str, work: Callable[[], Changed]) -> dict[str, Any]:
        """Change a key, and give what the answer shows of it.

        Changes take turns, so that each sees what the one before left, above all how many may
        still manage keys. The store's thread writes the log: the change happens, and must be
        there, though the client may have gone.
        """
        acting = current_request().caller.key
        assert acting is not None

        def run() -> dict[str, Any]:
            with turns:
                key, text, differs = work()
            if differs:
                services.guard.forget(key.id)
                log.info(event, key=acting.id, target=key.id)
            return describe(key) if text is None else {**describe(key), "key": text}

        return await do(partial(copy_context().run, run))

    @routes.before_request
    async def require_admin() -> None:
        """The guard has checked a key's scopes, but lets in those who need no key at all."""
        current = current_request()
        if current.caller.key is not None:
            return
        if store.exists() and (text := bearer(request)) is not None:
            key = await services.guard.identify(text)
            current.log_entry.add(key=key.id)
            check_scope(key, "/admin")
            current.caller.key = key
            return
        raise forbidden(
            "Keys are managed here with a key of the scope admin only. Create one on the "
            "server: inferneo keys create NAME --scope admin.",
            "admin_key_required",
        )

    @routes.get("/keys")
    async def list_keys() -> Response:
        await threads.flush()
        return json_response(await do(lambda: key_list(store, keyring.all())))

    @routes.post("/keys")
    async def create_key() -> Response:
        body, _ = await read_body(services.cpu_pool, partial(validate, NewKeyBody, strict=True))

        def create() -> Changed:
            key, text = keyring.create(
                body.name,
                scopes=body.scopes,
                models=body.models or (),
                limits=_limits(Limits(), body.limits),
                expires_in=None if body.expires_in == "never" else body.expires_in,
            )
            return Changed(key, text)

        return json_response(await change("key_created", create), 201, _SECRET)

    @routes.get("/keys/<key_id>")
    async def get_key(key_id: str) -> Response:
        await threads.flush()
        return json_response(await do(lambda: key_status(store, keyring.get(key_id))))

    @routes.patch("/keys/<key_id>")
    async def change_key(key_id: str) -> Response:
        body, _ = await read_body(services.cpu_pool, partial(validate, ChangeKeyBody, strict=True))
        work = partial(_change, keyring, key_id, body)
        return json_response(await change("key_changed", work))

    @routes.post("/keys/<key_id>/rotate")
    async def rotate_key(key_id: str) -> Response:
        def rotate() -> Changed:
            key = keyring.get(key_id)
            return Changed(key, keyring.rotate(key))

        return json_response(await change("key_rotated", rotate), 200, _SECRET)

    @routes.delete("/keys/<key_id>")
    async def revoke_key(key_id: str) -> Response:
        def revoke() -> Changed:
            key = keyring.get(key_id)
            ended = keyring.revoke(key)
            return Changed(ended, differs=ended != key)

        return json_response(await change("key_revoked", revoke))

    @routes.get("/keys/<key_id>/usage")
    async def one_usage(key_id: str) -> Response:
        days = _days()
        await threads.flush()
        return json_response(await do(lambda: key_usage(store, keyring.get(key_id), days)))

    @routes.get("/usage")
    async def all_usage() -> Response:
        days = _days()
        await threads.flush()
        return json_response(await do(lambda: usage_of(store, keyring.all(), days)))

    return routes


def _change(keyring: Keyring, key_id: str, body: ChangeKeyBody) -> Changed:
    key = keyring.get(key_id)
    changes: dict[str, Any] = {}
    if body.name is not None:
        changes["name"] = body.name
    if body.scopes is not None:
        changes["scopes"] = frozenset(body.scopes)
    if body.models is not None:
        changes["models"] = tuple(body.models)
    if body.limits is not None:
        changes["limits"] = _limits(key.limits, body.limits)
    if body.expires_in is not None:
        never = body.expires_in == "never"
        changes["expires"] = None if never else time.time() + float(body.expires_in)
    changed = keyring.change(key, **changes)
    return Changed(changed, differs=changed != key)


def _limits(before: Limits, body: LimitsBody | None) -> Limits:
    given = body.model_dump(exclude_none=True) if body else {}
    values = {name: None if value == "none" else value for name, value in given.items()}
    return replace(before, **values)


def _days() -> Days:
    """The days that the query asks for: ``since`` and ``until``."""
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


def _as_api_error(error: KeyringError) -> ApiError:
    text = str(error)
    message = f"{text[:1].upper()}{text[1:]}."
    match error.kind:
        case "unknown":
            return ApiError(404, message, code="key_not_found")
        case "conflict":
            return ApiError(409, message, code="key_conflict")
    return bad_request(message, error.param)
