"""``/admin/keys``: keys and their use, for holders of a key of the scope ``admin``.

A change is logged, and counts at once in this process.
"""

import time
from collections.abc import Callable
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import structlog
from pydantic import ConfigDict, Field

from server.api.admin.usage import DAYS, days_of
from server.api.body import Body, read_body, validate
from server.api.endpoint import Endpoint, Parameter
from server.http.errors import ApiError, bad_request
from server.keys.key import Key, Limits, Scope
from server.keys.keyring import Keyring, KeyringError, KeyState, describe
from server.keys.usage import (
    KeyList,
    KeyStatus,
    KeyUsage,
    key_list,
    key_status,
    key_usage,
)
from server.run.context import Context
from server.services import Services

log = structlog.get_logger(__name__)

Result = TypeVar("Result")

_MOST = 10**12
_NAME = "For people: 1 to 100 characters, all of them visible."
Limit = Annotated[int, Field(ge=1, le=_MOST)] | Literal["none"]
Expiry = Annotated[int, Field(ge=1, le=10**10)] | Literal["never"]


class AdminBody(Body):
    """A body whose routes validate it strictly, whatever the request's headers say."""

    model_config = ConfigDict(json_schema_extra={"additionalProperties": False})


class LimitsBody(AdminBody):
    """Limits of a key; omitted limits stay as they are."""

    requests: Limit | None = Field(None, description="Requests per minute.")
    tokens: Limit | None = Field(None, description="Tokens per minute, of prompts and answers.")
    day_requests: Limit | None = Field(None, description="Requests per day (UTC).")
    concurrent: Limit | None = Field(None, description="Concurrent requests.")


class ChangeKeyBody(AdminBody):
    """Changes to a key; omitted fields stay as they are."""

    name: str | None = Field(None, description=_NAME)
    scopes: list[Scope] | None = Field(
        None,
        min_length=1,
        max_length=10,
        fail_fast=True,
        description="What the key may be used for.",
    )
    models: list[str] | None = Field(
        None,
        max_length=1000,
        fail_fast=True,
        description="Ids or aliases that it may use; empty: all.",
    )
    limits: LimitsBody | None = Field(None, description="The key's limits.")
    expires_in: Expiry | None = Field(
        None, description="Seconds from now until it expires, or `never`."
    )

    def unknown(self) -> list[str]:
        """Names in the body, and in its limits, that are not known."""
        nested = self.limits.unknown() if self.limits else []
        return sorted([*super().unknown(), *(f"limits.{name}" for name in nested)])


class NewKeyBody(ChangeKeyBody):
    """A new key; omitted fields get their defaults."""

    name: str = Field(description=_NAME)


class NewKey(KeyState):
    """A key and its text, which is never shown again."""

    key: Annotated[str, Field(description="The text to send as the key; it is shown only once.")]


class _Changed(NamedTuple):
    """A key after a change: its text if it has a new one, and whether it differs at all."""

    key: Key
    text: str = ""
    differs: bool = True


_KEY = {"key_id": Parameter(schema={"type": "string", "minLength": 1}, description="A key's id.")}
_SECRET = {"Cache-Control": "no-store"}


@Endpoint(
    method="GET",
    path="/admin/keys",
    access="admin",
    tag="admin",
    summary="List all keys and the status of their quotas",
    answer=KeyList,
)
async def list_keys(services: Services, context: Context) -> KeyList:
    """List the keys."""
    await services.threads.flush()
    store, keyring = services.threads.store, services.keyring
    return await _call(services, lambda: key_list(store, keyring.all()))


@Endpoint(
    method="POST",
    path="/admin/keys",
    access="admin",
    tag="admin",
    summary="Create a key; its text is shown only once",
    body=(NewKeyBody,),
    example={"name": "laptop", "scopes": ["inference"], "limits": {"requests": 10}},
    answer=NewKey,
    status=201,
    headers=_SECRET,
)
async def create_key(services: Services, context: Context) -> NewKey:
    """Create a key."""
    body, _ = await read_body(
        services.cpu_pool, context, partial(validate, NewKeyBody, strict=True)
    )

    def create() -> _Changed:
        key, text = services.keyring.create(
            body.name,
            scopes=body.scopes,
            models=body.models or (),
            limits=_limits(Limits(), body.limits),
            expires_in=None if body.expires_in == "never" else body.expires_in,
        )
        return _Changed(key, text)

    return await _change_text(services, context, "key_created", create)


@Endpoint(
    method="GET",
    path="/admin/keys/<key_id>",
    access="admin",
    tag="admin",
    summary="Get a key by its id and the status of its quota",
    parameters=_KEY,
    answer=KeyStatus,
    errors=(404,),
)
async def get_key(services: Services, context: Context, key_id: str) -> KeyStatus:
    """Describe a key."""
    await services.threads.flush()
    store, keyring = services.threads.store, services.keyring
    return await _call(services, lambda: key_status(store, keyring.get(key_id)))


@Endpoint(
    method="PATCH",
    path="/admin/keys/<key_id>",
    access="admin",
    tag="admin",
    summary="Change a key's name, scopes, models, limits or expiry",
    parameters=_KEY,
    body=(ChangeKeyBody,),
    example={"limits": {"tokens": "none"}, "expires_in": 86400},
    answer=KeyState,
    errors=(404, 409),
)
async def change_key(services: Services, context: Context, key_id: str) -> KeyState:
    """Change a key."""
    body, _ = await read_body(
        services.cpu_pool, context, partial(validate, ChangeKeyBody, strict=True)
    )
    apply = partial(_apply, services.keyring, key_id, body)
    return describe((await _change(services, context, "key_changed", apply)).key)


@Endpoint(
    method="DELETE",
    path="/admin/keys/<key_id>",
    access="admin",
    tag="admin",
    summary="Revoke a key for good",
    description="The last key with the scope `admin` cannot be revoked.",
    parameters=_KEY,
    answer=KeyState,
    errors=(404, 409),
)
async def revoke_key(services: Services, context: Context, key_id: str) -> KeyState:
    """Revoke a key."""

    def revoke() -> _Changed:
        key = services.keyring.get(key_id)
        ended = services.keyring.revoke(key)
        return _Changed(ended, differs=ended != key)

    return describe((await _change(services, context, "key_revoked", revoke)).key)


@Endpoint(
    method="POST",
    path="/admin/keys/<key_id>/rotate",
    access="admin",
    tag="admin",
    summary="Replace a key's text; the old one stops working",
    parameters=_KEY,
    answer=NewKey,
    headers=_SECRET,
    errors=(404, 409),
)
async def rotate_key(services: Services, context: Context, key_id: str) -> NewKey:
    """Give a key a new text."""

    def rotate() -> _Changed:
        key = services.keyring.get(key_id)
        return _Changed(key, services.keyring.rotate(key))

    return await _change_text(services, context, "key_rotated", rotate)


@Endpoint(
    method="GET",
    path="/admin/keys/<key_id>/usage",
    access="admin",
    tag="admin",
    summary="Get the usage of a key",
    parameters=_KEY,
    query=DAYS,
    answer=KeyUsage,
    errors=(400, 404),
)
async def get_key_usage(services: Services, context: Context, key_id: str) -> KeyUsage:
    """Report the usage of a key."""
    days = days_of()
    await services.threads.flush()
    store, keyring = services.threads.store, services.keyring
    return await _call(services, lambda: key_usage(store, keyring.get(key_id), days))


async def _call(services: Services, work: Callable[[], Result]) -> Result:
    """Run work that blocks in the store's thread.

    Raises:
        ApiError: it cannot be done.
    """
    try:
        return await services.threads.call(work)
    except KeyringError as error:
        raise _as_api_error(error) from None


async def _change(
    services: Services, context: Context, event: str, work: Callable[[], _Changed]
) -> _Changed:
    """Change a key.

    Changes take turns, so that each sees what the one before left, above all how many may still
    manage keys. The store's thread writes the log: the change happens, and must be in there, though
    the client may have gone.
    """
    acting = context.caller.key
    assert acting is not None

    def run() -> _Changed:
        with services.keyring.turn:
            changed = work()
        if changed.differs:
            services.guard.forget(changed.key.id)
            log.info(event, key=acting.id, target=changed.key.id)
        return changed

    return await _call(services, partial(copy_context().run, run))


async def _change_text(
    services: Services, context: Context, event: str, work: Callable[[], _Changed]
) -> NewKey:
    """Change a key that gets a new text."""
    changed = await _change(services, context, event, work)
    return {**describe(changed.key), "key": changed.text}


def _apply(keyring: Keyring, key_id: str, body: ChangeKeyBody) -> _Changed:
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
    return _Changed(changed, differs=changed != key)


def _limits(before: Limits, body: LimitsBody | None) -> Limits:
    given = body.model_dump(exclude_none=True) if body else {}
    values = {name: None if value == "none" else value for name, value in given.items()}
    return replace(before, **values)


def _as_api_error(error: KeyringError) -> ApiError:
    text = str(error)
    message = f"{text[:1].upper()}{text[1:]}."
    match error.kind:
        case "unknown":
            return ApiError(404, message, code="key_not_found")
        case "conflict":
            return ApiError(409, message, code="key_conflict")
    return bad_request(message, error.param)
