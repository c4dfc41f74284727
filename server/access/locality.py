"""Which addresses and names mean this machine."""

import ipaddress
from contextlib import suppress


def is_loopback(address: str) -> bool:
    """Whether an IP address, written out, leads to this machine."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback


def is_local_name(host: str) -> bool:
    """No name that a stranger could own: an address, ``localhost``, or a name without a dot."""
    if host.startswith("["):
        return "]" in host
    name = name_of(host)
    if "." not in name or name.endswith(".localhost"):
        return True
    with suppress(ValueError):
        ipaddress.ip_address(name)
        return True
    return False


def name_of(host: str) -> str:
    """A ``Host`` header without its port, in lower case."""
    has_port = ":" in host and not host.endswith("]")
    name = host.rpartition(":")[0] if has_port else host
    return name.rstrip(".").lower()
