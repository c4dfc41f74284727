"""Operations on keys, for the command line and for HTTP alike. They block, as stores do."""

import dataclasses
import math
import threading
import time
from collections.abc import Collection
from typing import Annotated, Any, Literal, cast

from pydantic import Field
from typing_extensions import TypedDict

from inferneo_jax import InferneoError
from server.keys.key import (
    DEFAULT_SCOPES,
    SCOPES,
    Key,
    Limits,
    Scope,
    digest,
    encode_fields,
    id_of,
    new_key,
    new_text,
)
from server.keys.store.store import Store
from server.observe.terminal import hidden_in

State = Literal["active", "expired", "revoked"]
LONGEST_NAME = 100
LONGEST_MODEL = 512


class KeyLimits(TypedDict):
    """The limits of a key; null is unlimited."""

    requests: Annotated[int | None, Field(description="Requests per minute.")]
    tokens: Annotated[int | None, Field(description="Tokens per minute, of prompts and answers.")]
    day_requests: Annotated[int | None, Field(description="Requests per day (UTC).")]
    concurrent: Annotated[int | None, Field(description="Concurrent requests.")]


class KeyState(TypedDict):
    """A key without its secret. Times are in seconds since 1970; null means never."""

    object: Literal["key"]
    id: Annotated[str, Field(description="The key's id, the middle part of its text.")]
    name: Annotated[str, Field(description="The key's name, for people.")]
    state: Annotated[State, Field(description="Only active keys are accepted.")]
    scopes: Annotated[list[Scope], Field(description="What the key may be used for.")]
    models: Annotated[
        list[str], Field(description="Ids or aliases of the models that it may use; empty: all.")
    ]
    limits: Annotated[KeyLimits, Field(description="The key's limits.")]
    created: Annotated[int, Field(description="When it was created.")]
    expires: Annotated[int | None, Field(description="When it expires.")]
    revoked: Annotated[int | None, Field(description="When it was revoked.")]


class KeyringError(InferneoError):
    """The operation cannot be done.

    Attributes:
        kind: whether the key is not there, the request is wrong, or the key's state forbids it.
        param: the field at fault.
    """

    def __init__(
        self, message: str, kind: Literal["unknown", "wrong", "conflict"], param: str | None = None
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.param = param


class Keyring:
    """The keys of a store.

    Args:
        store: where they are.
        keep_admin: whether to refuse what would leave nobody to manage keys.

    Attributes:
        turn: to be held by one change after another where several threads make changes.
    """

    def __init__(self, store: Store, *, keep_admin: bool = False) -> None:
        self.turn = threading.Lock()
        self._store = store
        self._keep_admin = keep_admin

    def create(
        self,
        name: str,
        *,
        scopes: Collection[str] | None = None,
        models: Collection[str] = (),
        limits: Limits | None = None,
        expires_in: float | None = None,
    ) -> tuple[Key, str]:
        """A new key and its text, which cannot be recovered; ``expires_in`` is in seconds.

        Raises:
            KeyringError: the name, a scope or a model is wrong.
        """
        now = time.time()
        key, text = new_key(
            self._store.pepper(),
            name=_name(name),
            created=now,
            scopes=_scopes(DEFAULT_SCOPES if scopes is None else scopes),
            models=_models(models),
            limits=limits or Limits(),
            expires=None if expires_in is None else now + expires_in,
        )
        self._store.add_key(key)
        return key, text

    def all(self) -> list[Key]:
        """Every key, oldest first."""
        return self._store.list_keys()

    def get(self, key_id: str) -> Key:
        """The key of this id.

        Raises:
            KeyringError: there is none; the id is not repeated, as it may be a key's text.
        """
        key = self._store.find_key(key_id)
        if key is None:
            raise KeyringError("there is no key of this id", "unknown")
        return key

    def find(self, which: str) -> Key:
        """The key of this id, or the only one of this name that is not revoked.

        Raises:
            KeyringError: there is none, or several.
        """
        if (key_id := id_of(which)) is not None:
            raise KeyringError(f"a key's text names no key; use its id, {key_id}", "wrong")
        keys = self.all()
        found = [key for key in keys if key.id == which] or [k for k in keys if k.name == which]
        living = [key for key in found if key.revoked is None] or found[-1:]
        if not living:
            raise KeyringError(f"there is no key {which!r}; see inferneo keys list", "unknown")
        if len(living) > 1:
            ids = ", ".join(key.id for key in living)
            raise KeyringError(
                f"several keys are called {which!r}; name one by its id: {ids}", "conflict"
            )
        return living[0]

    def change(self, key: Key, **changes: Any) -> Key:
        """The key with attributes replaced, such as ``name``, ``scopes`` or ``limits``.

        Raises:
            KeyringError: it is revoked, a value is wrong, or nobody would be left to manage keys.
        """
        if key.revoked is not None:
            raise KeyringError(f"the key {key.id} is revoked; create another one", "conflict")
        if "name" in changes:
            changes["name"] = _name(changes["name"])
        if "scopes" in changes:
            changes["scopes"] = _scopes(changes["scopes"])
        if "models" in changes:
            changes["models"] = _models(changes["models"])
        return self._write(key, changes)

    def revoke(self, key: Key) -> Key:
        """Revoke a key for ever.

        Raises:
            KeyringError: nobody would be left to manage keys.
        """
        return key if key.revoked is not None else self._write(key, {"revoked": time.time()})

    def rotate(self, key: Key) -> str:
        """A new text for a key, which replaces the old one.

        Raises:
            KeyringError: it is revoked.
        """
        text = new_text(key.id)
        self.change(key, digest=digest(self._store.pepper(), text))
        return text

    def _write(self, key: Key, changes: dict[str, Any]) -> Key:
        changed = dataclasses.replace(key, **changes)
        differs = {n: v for n, v in changes.items() if v != getattr(key, n)}
        loses = self._keep_admin and _manages_until(changed) < _manages_until(key)
        if loses:
            self._find_successor(key)
        if differs:
            self._store.change_key(key.id, encode_fields(differs))
        if loses:  # another server may have ended the successor between the look and the change
            try:
                self._find_successor(key)
            except KeyringError:
                before = {name: getattr(key, name) for name in differs}
                self._store.change_key(key.id, encode_fields(before))
                raise
        return changed

    def _find_successor(self, key: Key) -> None:
        lasting = _manages_until(key) == math.inf
        for other in self.all():
            until = _manages_until(other)
            if other.id != key.id and until > 0 and (until == math.inf or not lasting):
                return
        raise KeyringError(
            f"the key {key.id} is the last one that may manage keys"
            f"{' and never expires' if lasting else ''}; create another such key of the scope "
            "admin first, or use the command line",
            "conflict",
        )


def _manages_until(key: Key) -> float:
    """When the key's right to manage keys ends, in epoch seconds; 0 if it has none."""
    if "admin" not in key.scopes or state_of(key) != "active":
        return 0.0
    return math.inf if key.expires is None else key.expires


def state_of(key: Key) -> State:
    """Whether a key is valid now."""
    if key.revoked is not None:
        return "revoked"
    return "expired" if key.expires is not None and key.expires <= time.time() else "active"


def describe(key: Key) -> KeyState:
    """A key as it may be shown: without what is kept of its secret; times are epoch seconds."""
    return {
        "object": "key",
        "id": key.id,
        "name": key.name,
        "state": state_of(key),
        "scopes": sorted(key.scopes),
        "models": list(key.models),
        "limits": describe_limits(key.limits),
        "created": int(key.created),
        "expires": None if key.expires is None else int(key.expires),
        "revoked": None if key.revoked is None else int(key.revoked),
    }


def describe_limits(limits: Limits) -> KeyLimits:
    """The limits as they may be shown."""
    return {
        "requests": limits.requests,
        "tokens": limits.tokens,
        "day_requests": limits.day_requests,
        "concurrent": limits.concurrent,
    }


def _name(name: str) -> str:
    if len(name) > LONGEST_NAME or not name.strip():
        raise KeyringError(
            f"name has {len(name)} characters; it must hold 1 to {LONGEST_NAME}, not only spaces",
            "wrong",
            "name",
        )
    _check_visible(name, "name")
    return name


def _check_visible(text: str, param: str) -> None:
    if (hidden := hidden_in(text)) is not None:
        raise KeyringError(
            f"{param} holds {hidden}, which would not show as what it is; leave it out",
            "wrong",
            param,
        )


def _models(models: Collection[str]) -> tuple[str, ...]:
    """Models need not be served: they may be later, or by another server of the same store."""
    for model in models:
        if not 1 <= len(model) <= LONGEST_MODEL:
            raise KeyringError(
                f"models must be ids or aliases of 1 to {LONGEST_MODEL} characters; one has "
                f"{len(model)}",
                "wrong",
                "models",
            )
        _check_visible(model, "models")
    return tuple(models)


def _scopes(scopes: Collection[str]) -> frozenset[Scope]:
    for scope in scopes:
        if scope not in SCOPES:
            raise KeyringError(
                f"scope is {scope[:40]!r}; there are {', '.join(SCOPES)}", "wrong", "scopes"
            )
    if not scopes:
        raise KeyringError("scopes is empty; a key needs at least one", "wrong", "scopes")
    return frozenset(cast("Collection[Scope]", scopes))
