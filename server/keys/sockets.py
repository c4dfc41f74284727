"""Limits on open WebSockets, for identified and for unidentified clients."""

import ipaddress
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from server.http.errors import RETRY_OVERLOADED_SECONDS, ApiError, unavailable
from server.keys.fair_share import FairShare

MAX_UNIDENTIFIED = 64
MAX_UNIDENTIFIED_OF_ADDRESS = 16
_HOW = (
    "Send the key with the handshake (the Authorization header, the subprotocol inferneo.key.<key> "
    "or a ticket), or try again later."
)


class SocketPermit:
    """The permit of one socket, which :meth:`release` releases once."""

    def __init__(self, release: Callable[[], None]) -> None:
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Release the permit; further calls do nothing."""
        release, self._release = self._release, None
        if release is not None:
            release()


class SocketAdmission:
    """The permits of identified sockets, shared between keys, and a few for the others.

    A client that sends its key in the first frame has none while it is waited for. Such sockets
    have a small bound of their own, in all and for each address, so that they take no permit of
    those that are identified; these never count against it.

    Args:
        capacity: permits for identified sockets, which keys share as in
            :class:`~server.keys.fair_share.FairShare`.
    """

    def __init__(self, capacity: int) -> None:
        self._identified = FairShare(capacity)
        self._waiting: Counter[str] = Counter()

    @property
    def identified(self) -> int:
        """The number of open sockets whose client is known or needs no key."""
        return self._identified.in_use

    @property
    def unidentified(self) -> int:
        """The number of open sockets that have yet to send a key."""
        return self._waiting.total()

    def enter(self, owner: str | None) -> SocketPermit:
        """A permit for a socket of the key of this id; None: it needed none.

        Raises:
            ApiError: there is none.
        """
        if not self._identified.acquire(owner):
            mine, capacity = self._identified.held_by(owner), self._identified.capacity
            whose = "" if owner is None else f", {mine} of them opened with this key"
            raise unavailable(
                f"The server has {self.identified} WebSockets of {capacity} it can take{whose}. "
                "Close some, send several requests over one, or try again later.",
                "overloaded",
                RETRY_OVERLOADED_SECONDS,
            )
        return SocketPermit(partial(self._identified.release, owner))

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
        self._waiting[network] += 1
        return SocketPermit(partial(self._stop_waiting, network))

    def _stop_waiting(self, network: str) -> None:
        self._waiting[network] -= 1
        if not self._waiting[network]:
            del self._waiting[network]


def network_of(address: str | None) -> str:
    """The address that counts as one client: of IPv6 its /64 network, which one machine owns."""
    with suppress(ValueError):  # of a Unix socket there is none
        found = ipaddress.ip_address((address or "").partition("%")[0])
        if isinstance(found, ipaddress.IPv6Address):
            if found.ipv4_mapped is not None:
                return str(found.ipv4_mapped)
            return str(ipaddress.IPv6Network((found, 64), strict=False))
        return str(found)
    return ""
