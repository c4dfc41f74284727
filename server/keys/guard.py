"""Who may do what: every endpoint needs a key unless its declaration says otherwise."""

import math
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from functools import partial
from typing import Literal

import structlog
from quart import request
from quart.wrappers.base import BaseRequestWebsocket

from server.config.settings import Settings
from server.http.connection import current_request
from server.http.errors import ApiError
from server.http.locality import is_local_name, is_near, name_of, proxy_header
from server.keys.caller import Caller
from server.keys.key import TICKET_SECONDS, Key, Scope, digest, id_of, is_ticket, new_ticket
from server.keys.lookup import KeyLookup
from server.keys.store.threads import StoreThreads

log = structlog.get_logger(__name__)

Access = Scope | Literal["any", "public"]
"""What an endpoint needs: a key of this scope, any key, or no key at all."""

MAX_TICKETS = 64
"""The maximum of unused tickets of a key."""
_HOW = "Send it as the header Authorization: Bearer <key>."


def unauthenticated(message: str) -> ApiError:
    """The error for a missing or invalid key, which is not repeated in it."""
    return ApiError(
        401,
        message,
        kind="authentication_error",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def forbidden(message: str, code: str, param: str | None = None) -> ApiError:
    """The error for a caller who may not do this."""
    return ApiError(403, message, kind="permission_error", code=code, param=param)


class Guard:
    """Authenticates every request, and rejects those without a valid key."""

    def __init__(
        self, settings: Settings, threads: StoreThreads, access: Mapping[str, Access]
    ) -> None:
        """``access`` maps the name of each of Quart's endpoints to what it needs."""
        self._settings = settings
        self._access = access
        self._threads = threads
        self._store = threads.store
        self._keys_exist = settings.require_key == "true"
        self._lookup = KeyLookup(threads)

    async def announce(self) -> None:
        """Log at the start whom the server will serve."""
        if self._settings.require_key == "false":
            log.warning("no_key_required", reason="INFERNEO_REQUIRE_KEY is false: all are served")
            return
        with suppress(ApiError):  # logged
            if not await self._has_keys():
                locally = "only this machine is served, without a key"
                whom = locally if self._settings.require_key == "auto" else "nobody is served"
                reason = f"no API key exists: {whom}. `inferneo keys create NAME` makes one"
                log.warning("no_keys", reason=reason)

    async def admit_request(self) -> None:
        """Authenticate an HTTP request before its handler runs.

        Raises:
            ApiError: it has no key that may do this.
        """
        current = current_request()
        current.caller = caller = Caller()
        access = self._access_to(request)
        if access == "public":
            return
        text = None
        if await self.serves_without_key(request):
            if access != "admin":
                return
            # Keys are managed with a key only, even where everybody is served without one.
            text = bearer(request) if self._store.exists() else None
            if text is None:
                raise forbidden(
                    "Keys are managed here with a key of the scope admin only. Create one on the "
                    "server: inferneo keys create NAME --scope admin.",
                    "admin_key_required",
                )
        caller.key = key = await self.identify(text or bearer(request))
        current.log_entry.add(key=key.id)
        self.check_access(key, request)

    def check_access(self, key: Key, connection: BaseRequestWebsocket) -> None:
        """Check that a key may use an endpoint.

        Raises:
            ApiError: it lacks the scope.
        """
        access = self._access_to(connection)
        if access not in ("any", "public") and access not in key.scopes:
            raise forbidden(
                f"This API key lacks the scope {access}, which this path needs.",
                "insufficient_scope",
            )

    def _access_to(self, connection: BaseRequestWebsocket) -> Access:
        if connection.endpoint is None:  # a 404 or 405, which says little to any key
            return "any"
        return self._access[connection.endpoint]

    async def serves_without_key(self, connection: BaseRequestWebsocket) -> bool:
        """Whether this connection needs no key.

        Raises:
            ApiError: nobody has a key, and it comes from elsewhere; or it names another host.
        """
        hosts = self._settings.allowed_hosts
        if hosts and name_of(connection.headers.get("Host", "")) not in hosts:
            raise forbidden(
                "The server is not to be asked for under this name; INFERNEO_ALLOWED_HOSTS lists "
                "those that are.",
                "host_not_allowed",
            )
        if self._settings.require_key == "false":
            return True
        if await self._closed():
            return False
        check_local(connection, hosts)
        return True

    async def identify(self, text: str | None) -> Key:
        """The key whose text is ``text``.

        Raises:
            ApiError: there is none that counts, or the store cannot be used.
        """
        if text is None:
            raise unauthenticated(f"This server needs an API key. {_HOW}")
        if (key_id := id_of(text)) is None:
            raise unauthenticated(f"What was sent is no API key of this server. {_HOW}")
        if (key := await self._lookup.matching(key_id, text)) is None:
            raise unauthenticated("There is no such API key. Check it, or ask for a new one.")
        return _counting(key)

    async def recheck(self, caller: Caller) -> None:
        """Look up the caller's key again, in the course of a long connection.

        Raises:
            ApiError: its key does not count any more, or the store cannot be used.
        """
        before = caller.key
        if before is None:
            return
        key = await self._lookup.by_id(before.id)
        if key is None or key.digest != before.digest:
            raise unauthenticated("This API key was replaced by another one.")
        caller.key = _counting(key)

    async def ticket_holder(self, ticket: str) -> Key:
        """The key that a ticket was made for, which is then used up.

        Raises:
            ApiError: it is none, or none any more.
        """
        key_id = None
        if is_ticket(ticket):
            kept = digest(await self._lookup.pepper(), ticket)
            take = partial(self._store.take_ticket, kept, time.time())
            key_id = await self._lookup.unproven(partial(self._threads.call, take))
        key = await self._lookup.by_id(key_id, anew=True) if key_id is not None else None
        if key is None:
            raise unauthenticated(
                "token must be a ticket of POST /v1/ws-tickets, used once and in time; never a key."
            )
        return _counting(key)

    async def new_ticket(self, key: Key) -> str:
        """A ticket for the key, valid once within :data:`~server.keys.key.TICKET_SECONDS`.

        Raises:
            ApiError: too many of the key's are unused, or the store cannot be used.
        """
        ticket, now = new_ticket(), time.time()
        kept = digest(await self._lookup.pepper(), ticket)
        add = partial(self._store.add_ticket, kept, key.id, now, now + TICKET_SECONDS, MAX_TICKETS)
        if (wait := await self._threads.call(add)) is not None:
            seconds = max(1, math.ceil(wait))
            raise ApiError(
                429,
                f"{MAX_TICKETS} tickets of this API key are unused, the most it may have. Use one, "
                f"or try again in {seconds} s, when the first has expired.",
                kind="rate_limit_exceeded",
                code="too_many_tickets",
                headers={"Retry-After": str(seconds)},
            )
        return ticket

    def check_model(self, caller: Caller, name: str) -> None:
        """Check that the caller may use the model of this id or alias.

        Raises:
            ApiError: its key is for others.
        """
        if not self.allows_model(caller, name):
            raise forbidden(
                f"This API key may not use the model {name[:100]!r}.", "model_not_allowed", "model"
            )

    def allows_model(self, caller: Caller, name: str) -> bool:
        """Whether the caller may use this model."""
        key, aliases = caller.key, self._settings.aliases
        if key is None or not key.models:
            return True
        return aliases.get(name, name) in {aliases.get(each, each) for each in key.models}

    def forget(self, key_id: str) -> None:
        """Look up a key again next time, since it has changed."""
        self._lookup.forget(key_id)

    async def _closed(self) -> bool:
        """Whether keys are needed; once they are, they stay so while the server runs."""
        if not self._keys_exist:
            self._keys_exist = await self._has_keys()
        return self._keys_exist

    async def _has_keys(self) -> bool:
        return self._store.exists() and await self._threads.call(self._store.has_keys)


def bearer(connection: BaseRequestWebsocket) -> str | None:
    """The bearer token of the Authorization header; None if there is none.

    Raises:
        ApiError: there are several, or it is of another kind.
    """
    values = connection.headers.getlist("Authorization")
    if not values:
        return None
    scheme, _, token = values[0].partition(" ")
    if len(values) > 1 or scheme.lower() != "bearer" or not token.strip():
        raise unauthenticated("The Authorization header must be one: Authorization: Bearer <key>.")
    return token.strip()


def check_local(connection: BaseRequestWebsocket, hosts: Collection[str] = ()) -> None:
    """Check that a connection comes from this machine.

    Neither another machine, nor a proxy on this one, nor a web page under a name that was made to
    point here (DNS rebinding) may use a server that asks for no key.

    Args:
        connection: to be checked.
        hosts: further names of this machine. Those with a dot do not count: they may be the names
            under which a proxy serves everybody.

    Raises:
        ApiError: it comes from elsewhere, or that cannot be told.
    """
    host = connection.headers.get("Host", "")
    if not (is_near(connection.scope.get("client")) and is_near(connection.scope.get("server"))):
        reason = "this request came over a network"
    elif (header := proxy_header(connection.headers.keys())) is not None:
        reason = f"this request came through a proxy, which added the header {header[:40]}"
    elif is_local_name(host) or (name_of(host) in hosts and "." not in name_of(host)):
        return
    else:
        reason = (
            f"this request is for the host {host[:100]!r}, which is neither localhost nor a "
            "loopback address nor a name without a dot in INFERNEO_ALLOWED_HOSTS"
        )
    raise forbidden(
        "This server has no API keys yet and serves its own machine only, at localhost; "
        f"{reason}. Create a key there (inferneo keys create NAME) and send it, or set "
        "INFERNEO_REQUIRE_KEY=false.",
        "local_only",
    )


def _counting(key: Key) -> Key:
    if key.revoked is not None:
        raise unauthenticated("This API key was revoked. Ask for a new one.")
    if key.expires is not None and key.expires <= time.time():
        raise unauthenticated("This API key has expired. Ask for a new one.")
    return key
