"""Limits on open WebSockets, for identified and for unidentified clients."""

import ipaddress
from collections import Counter
from contextlib import suppress
from typing import Any

from server.http.errors import RETRY_OVERLOADED_SECONDS, ApiError, unavailable

MAX_UNIDENTIFIED = 64
MAX_UNIDENTIFIED_OF_ADDRESS = 16
_HOW = (
    "Send the key with the handshake (the Authorization header, the subprotocol inferneo.key.<key> "
    "or a ticket), or try again later."
)


class SocketPermit:
    """Leave for one socket; it is given back once, by :meth:`leave`."""

    def __init__(self, taken: Counter[Any], owner: Any) -> None:
        self._taken: Counter[Any] | None = taken
        self._owner = owner
        taken[owner] += 1

    def leave(self) -> None:
        """Give it back; further calls do nothing."""
        taken, self._taken = self._taken, None
        if taken is not None:
            taken[self._owner] -= 1
            if not taken[self._owner]:
                del taken[self._owner]


class SocketAdmission:
    """The permits of identified sockets, shared between keys, and a few for the others.

    A client that sends its key in the first frame has none while it is waited for. Such sockets
    have a small bound of their own, in all and for each address, so that they take no permit of
    those that are identified; these never count against it.

    Args:
        capacity: permits for identified sockets. A key may hold as many as it leaves free, and
            always one, as
            in :class:`~server.run.admission.Admission`.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._identified: Counter[str | None] = Counter()
        self._waiting: Counter[str] = Counter()

    @property
    def identified(self) -> int:
        """Sockets of clients that are known, or need no key."""
        return self._identified.total()

    @property
    def unidentified(self) -> int:
        """Sockets whose key is waited for."""
        return self._waiting.total()

    def enter(self, owner: str | None) -> SocketPermit:
        """A permit for a socket of the key of this id; None: it needed none.

        Raises:
            ApiError: there is none.
        """
        mine, free = self._identified[owner], self.capacity - self.identified
        fits = (1 if owner is None else mine + 1) <= free
        only = owner is not None and mine == 0 and self.identified < 2 * self.capacity
        if not (fits or only):
            whose = "" if owner is None else f", {mine} of them opened with this key"
            raise unavailable(
                f"The server has {self.identified} WebSockets of {self.capacity} it can take"
                f"{whose}. Close some, send several requests over one, or try again later.",
                "overloaded",
                RETRY_OVERLOADED_SECONDS,
            )
        return SocketPermit(self._identified, owner)

    def wait(self, address: str | None) -> SocketPermit:
        """A permit for a socket whose client, at this address, has yet to send a key.

        Raises:
            ApiError: too many others are waited for.
        """
        network = network_of(address)
        if self._waiting[network] >= MAX_UNIDENTIFIED_OF_ADDRESS:
            raise ApiError(
                429,
                f"{MAX_UNIDENTIFIED_OF_ADDRESS} WebSockets of this address have sent no API key "
                f"yet, the most it may have. {_HOW}",
                code="too_many_unidentified",
                headers={"Retry-After": str(RETRY_OVERLOADED_SECONDS)},
            )
        if self.unidentified >= MAX_UNIDENTIFIED:
            message = f"{MAX_UNIDENTIFIED} WebSockets have sent no API key yet, the most there may"
            raise unavailable(f"{message} be. {_HOW}", "overloaded", RETRY_OVERLOADED_SECONDS)
        return SocketPermit(self._waiting, network)


def network_of(address: str | None) -> str:
    """What counts as one client's address: of IPv6 the first half, which one machine has whole."""
    with suppress(ValueError):  # of a Unix socket there is none
        found = ipaddress.ip_address((address or "").partition("%")[0])
        if isinstance(found, ipaddress.IPv6Address):
            if found.ipv4_mapped is not None:
                return str(found.ipv4_mapped)
            return str(ipaddress.IPv6Network((found, 64), strict=False))
        return str(found)
    return ""
