"""Whether an address, a host name or a request belongs to this machine."""

import ipaddress
import re
from collections.abc import Iterable
from contextlib import suppress

_LONGEST_NAME = 253  # of DNS, whose labels have 63 at most
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]*)(?::[0-9]*)?")
_LOCALHOST = re.compile(r"([a-z0-9_-]+\.)*localhost")
_PROXY_HEADER = re.compile(
    r"(x-)?forwarded(-.+)?"  # RFC 7239, and what it replaces
    r"|via|cdn-loop|front-end-https"
    r"|([a-z]+-)*(client|real|remote|connecting|originating|source|user)-?(ip|addr|address)"
    r"|(x-)?(original|rewrite|proxy|proxyuser|envoy|varnish|appengine|azure|arr|vercel)-.+"
    r"|(x-)?(cf|amz-cf|cloudfront|fastly|fly|tailscale|ngrok|akamai|incap|nginx)-.+"
    r"|x-(host|scheme|url-scheme|server-name|varnish)"
)
_OURS = "remote-addr"
"""Quart adds the client's address under this name."""


def is_loopback(address: str) -> bool:
    """Whether an IP address, written out, leads to this machine."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback


def is_near(address: tuple[str, int | None] | None) -> bool:
    """Whether an end of a connection, as ASGI names it, is on this machine: loopback, or a path."""
    return address is None or address[1] is None or is_loopback(address[0])


def is_local_name(host: str) -> bool:
    """Whether a ``Host`` header names this machine whoever resolves it.

    That is ``localhost``, a name below it (RFC 6761), or a loopback address. Any other name can be
    made to point here by whoever owns it or answers for it.
    """
    name = name_of(host)
    return bool(_LOCALHOST.fullmatch(name)) or is_loopback(name.removeprefix("[").removesuffix("]"))


def name_of(host: str) -> str:
    """A ``Host`` header without its port, in lower case; empty if it is malformed."""
    match = _HOST.fullmatch(host)
    return match[1].removesuffix(".").lower() if match else ""


def is_host(host: str) -> bool:
    """Whether a ``Host`` header is empty, or a name or an address, with or without a port."""
    match = _HOST.fullmatch(host)
    if match is None:
        return False
    if match[1].startswith("["):
        with suppress(ValueError):
            ipaddress.IPv6Address(match[1][1:-1])
            return True
        return False
    labels = match[1].removesuffix(".").split(".") if match[1] else []
    return len(match[1]) <= _LONGEST_NAME and all(1 <= len(each) <= 63 for each in labels)


def proxy_header(names: Iterable[str]) -> str | None:
    """The first of these headers that only proxies add; None: there is none."""
    for name in names:
        plain = name.lower().replace("_", "-")
        if plain != _OURS and _PROXY_HEADER.fullmatch(plain):
            return name
    return None
