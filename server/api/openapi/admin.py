"""The operations under ``/admin``."""

from server.api import states
from server.api.admin.keys import ChangeKeyBody, NewKeyBody
from server.api.openapi.operation import Operation, errors, ok

_KEY = {"key_id": ({"type": "string", "minLength": 1}, "A key's id.")}
_DAY = {"type": "string", "format": "date"}
_DAYS = {
    "since": (_DAY, "The first day of UTC that counts."),
    "until": (_DAY, "The last one; no earlier than `since`."),
}
_ERRORS = errors(401, 403, 503)
_KEY_ERRORS = _ERRORS | errors(404)
_BODY_ERRORS = _ERRORS | errors(400, 408, 413, 415)

OPERATIONS = (
    Operation(
        path="/admin/keys",
        name="listKeys",
        tag="admin",
        summary="List all keys, and what they use of their limits",
        answers=ok(states.KeyList) | _ERRORS,
    ),
    Operation(
        path="/admin/keys",
        method="post",
        name="createKey",
        tag="admin",
        summary="Make a key; its text is shown this once",
        body=(NewKeyBody,),
        options=(),
        answers=ok(states.NewKey, 201, "Cache-Control") | _BODY_ERRORS,
        example={"name": "laptop", "scopes": ["inference"], "limits": {"requests": 10}},
    ),
    Operation(
        path="/admin/keys/{key_id}",
        name="getKey",
        tag="admin",
        summary="Get a key by its id, and what it uses of its limits",
        parameters=_KEY,
        answers=ok(states.KeyStanding) | _KEY_ERRORS,
    ),
    Operation(
        path="/admin/keys/{key_id}",
        method="patch",
        name="changeKey",
        tag="admin",
        summary="Change a key's name, rights, limits or expiry",
        parameters=_KEY,
        body=(ChangeKeyBody,),
        options=(),
        answers=ok(states.KeyState) | _KEY_ERRORS | _BODY_ERRORS | errors(409),
        example={"limits": {"tokens": "none"}, "expires_in": 86400},
    ),
    Operation(
        path="/admin/keys/{key_id}",
        method="delete",
        name="revokeKey",
        tag="admin",
        summary="End a key, for ever",
        description="The last key that may manage keys cannot be ended here.",
        parameters=_KEY,
        answers=ok(states.KeyState) | _KEY_ERRORS | errors(409),
    ),
    Operation(
        path="/admin/keys/{key_id}/rotate",
        method="post",
        name="rotateKey",
        tag="admin",
        summary="Replace a key's text; the old one ends",
        parameters=_KEY,
        answers=ok(states.NewKey, 200, "Cache-Control") | _KEY_ERRORS | errors(409),
    ),
    Operation(
        path="/admin/keys/{key_id}/usage",
        name="getKeyUsage",
        tag="admin",
        summary="Get what a key has used",
        parameters=_KEY,
        query=_DAYS,
        answers=ok(states.KeyUsage) | _KEY_ERRORS | errors(400),
    ),
    Operation(
        path="/admin/usage",
        name="getAllUsage",
        tag="admin",
        summary="Get what all keys have used",
        query=_DAYS,
        answers=ok(states.AllUsage) | _ERRORS | errors(400),
    ),
)
