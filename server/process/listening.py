"""The address that `inferneo serve` listens on, and which program may already use it."""

import errno
import http.client
import json
import socket
from dataclasses import dataclass

from inferneo_jax import ConfigError
from server.config.settings import Settings
from server.http.locality import is_loopback

BACKLOG = 100
_ANSWER_SECONDS = 2.0
_FIRST_FREE_TO_ALL = 1024
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  (where to reach who listens there)


@dataclass(frozen=True)
class Listener:
    """Who listens at a port.

    Attributes:
        status: what an Inferneo server's ``/ready`` says (``ready``, ``loading``, ``draining``,
            ``failed``); None: it is another program.
    """

    status: str | None

    def __str__(self) -> str:
        if self.status is None:
            return "another program"
        return f"an Inferneo server, which is {self.status}"


def reachable(host: str) -> str:
    """The address of this machine at which a server that listens on ``host`` is reached."""
    return _ANY.get(host, host)


def url_of(host: str, port: int) -> str:
    """As a browser on this machine writes it."""
    name = reachable(host)
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def is_local(host: str) -> bool:
    """Whether only this machine reaches a server that listens on ``host``."""
    return host == "localhost" or is_loopback(host)


def listener_at(host: str, port: int) -> Listener | None:
    """The program that listens there; None if there is none. Takes at most four seconds."""
    connection = http.client.HTTPConnection(reachable(host), port, timeout=_ANSWER_SECONDS)
    try:
        connection.connect()
    except OSError:
        return None
    try:
        connection.request("GET", "/ready")
        found = json.loads(connection.getresponse().read(1 << 20))
    except (OSError, ValueError, http.client.HTTPException):
        return Listener(None)
    finally:
        connection.close()
    ours = isinstance(found, dict) and {"status", "models"} <= found.keys()
    return Listener(str(found["status"])) if ours else Listener(None)


def listen(settings: Settings) -> socket.socket:
    """A socket that listens on the settings' host and port.

    It listens at once: of two servers that start at the same time the second is told so here.

    Raises:
        ConfigError: it cannot; the text says why, and what to do.
    """
    host, port = settings.host, settings.port
    opened = None
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        opened = socket.socket(family, socket.SOCK_STREAM)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted ones inherit it
        opened.bind(address)
        opened.listen(BACKLOG)
    except OSError as error:
        if opened is not None:
            opened.close()
        raise ConfigError(_why(error, settings)) from None
    return opened


def _why(error: OSError, settings: Settings) -> str:
    host, port = settings.host, settings.port
    if error.errno == errno.EADDRINUSE:
        who = listener_at(host, port) or "another program"
        return (
            f"port {port} of {host} is taken by {who}; end that, or choose another with "
            f"--port {port + 1 if port < 65_535 else port - 1}, or --port 0 for any that is free"
        )
    if error.errno == errno.EACCES:
        return (
            f"{settings.named('port')} is {port}, and this user may not listen on ports below "
            f"{_FIRST_FREE_TO_ALL}; choose one above, as --port 8000"
        )
    why = "no address of this machine"
    if not isinstance(error, socket.gaierror) and error.errno != errno.EADDRNOTAVAIL:
        why = f"an address that cannot be listened on ({error.strerror})"
    return (
        f"{settings.named('host')} is {host!r}, {why}; 127.0.0.1 is reached from this machine "
        "only, 0.0.0.0 (or ::) from others too"
    )
