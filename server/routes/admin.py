"""``/admin``: keys and their use, for holders of a key of the scope ``admin``."""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import structlog
from quart import Blueprint, Response, request

from server.auth import bearer, check_scope, forbidden
from server.caller import caller, set_caller
from server.errors import ApiError, bad_request
from server.http import json_response, read_object
from server.keyring import Keyring, KeyringError, state_of
from server.keys import Key, Limits
from server.prepare import validate
from server.protocol.keys import ChangeKeyBody, LimitsBody, NewKeyBody
from server.services import Services
from server.usage import usage_answer

log = structlog.get_logger(__name__)

Result = TypeVar("Result")
_SECRET = {"Cache-Control": "no-store"}


def blueprint(services: Services) -> Blueprint:
    """All its routes. What changes is logged, and counts at once in this process."""
    routes = Blueprint("admin", __name__, url_prefix="/admin")
    keyring = Keyring(services.threads.store)

    async def do(work: Callable[[], Result]) -> Result:
        try:
            return await services.threads.call(work)
        except KeyringError as error:
            raise _as_api_error(error) from None

    def changed(event: str, key: Key) -> None:
        services.guard.forget(key.id)
        acting = caller()
        assert acting is not None
        log.info(event, key=acting.id, target=key.id)

    @routes.before_request
    async def require_admin() -> None:
        """The guard has checked a key's scopes, but lets in those who need no key at all."""
        if caller() is None and (text := bearer(request)) is not None:
            key = await services.guard.identify(text)
            check_scope(key, "/admin")
            set_caller(key)
        if caller() is None:
            raise forbidden(
                "Keys are managed here with a key of the scope admin only. Create one on the "
                "server: inferneo keys create NAME --scope admin.",
                "admin_key_required",
            )

    @routes.get("/keys")
    async def list_keys() -> Response:
        keys = await do(keyring.all)
        return json_response({"object": "list", "data": [_card(key) for key in keys]})

    @routes.post("/keys")
    async def create_key() -> Response:
        body, _ = validate(NewKeyBody, await read_object(services.text), strict=True)
        key, text = await do(
            partial(
                keyring.create,
                body.name,
                scopes=body.scopes,
                models=body.models or (),
                limits=_limits(Limits(), body.limits),
                expires_in=None if body.expires_in == "never" else body.expires_in,
            )
        )
        changed("key_created", key)
        return json_response({**_card(key), "key": text}, 201, _SECRET)

    @routes.get("/keys/<key_id>")
    async def get_key(key_id: str) -> Response:
        return json_response(_card(await do(partial(keyring.get, key_id))))

    @routes.patch("/keys/<key_id>")
    async def change_key(key_id: str) -> Response:
        body, _ = validate(ChangeKeyBody, await read_object(services.text), strict=True)
        key = await do(partial(_change, keyring, key_id, body))
        changed("key_changed", key)
        return json_response(_card(key))

    @routes.post("/keys/<key_id>/rotate")
    async def rotate_key(key_id: str) -> Response:
        key = await do(partial(keyring.get, key_id))
        text = await do(partial(keyring.rotate, key))
        changed("key_rotated", key)
        return json_response({**_card(key), "key": text}, 200, _SECRET)

    @routes.delete("/keys/<key_id>")
    async def revoke_key(key_id: str) -> Response:
        def revoke() -> Key:
            key = keyring.get(key_id)
            keyring.keep_an_admin(key)
            return keyring.revoke(key)

        key = await do(revoke)
        changed("key_revoked", key)
        return json_response(_card(key))

    @routes.get("/keys/<key_id>/usage")
    async def key_usage(key_id: str) -> Response:
        key = await do(partial(keyring.get, key_id))
        return json_response(await usage_answer(services.threads, key))

    return routes


def _change(keyring: Keyring, key_id: str, body: ChangeKeyBody) -> Key:
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
    if "admin" not in changes.get("scopes", {"admin"}) or changes.get("expires") is not None:
        keyring.keep_an_admin(key)
    return keyring.change(key, **changes)


def _limits(before: Limits, body: LimitsBody | None) -> Limits:
    given = body.model_dump(exclude_none=True) if body else {}
    values = {name: None if value == "none" else value for name, value in given.items()}
    return dataclasses.replace(before, **values)


def _card(key: Key) -> dict[str, Any]:
    """A key as it may be shown: without what is kept of its secret."""
    return {
        "object": "key",
        "id": key.id,
        "name": key.name,
        "state": state_of(key),
        "scopes": sorted(key.scopes),
        "models": list(key.models),
        "limits": dataclasses.asdict(key.limits),
        "created": int(key.created),
        "expires": None if key.expires is None else int(key.expires),
        "revoked": None if key.revoked is None else int(key.revoked),
    }


def _as_api_error(error: KeyringError) -> ApiError:
    text = str(error)
    message = f"{text[:1].upper()}{text[1:]}."
    match error.kind:
        case "unknown":
            return ApiError(404, message, code="key_not_found")
        case "conflict":
            return ApiError(409, message, code="key_conflict")
    return bad_request(message, error.param)
