"""How many WebSockets there may be, whose, and from where."""

from contextlib import suppress

import pytest

from server.http.errors import ApiError
from server.keys.sockets import (
    MAX_UNIDENTIFIED,
    MAX_UNIDENTIFIED_OF_ADDRESS,
    SocketAdmission,
    SocketPermit,
    network_of,
)


def fill(sockets: SocketAdmission, owner: str | None) -> list[SocketPermit]:
    """All the permits that one owner can have."""
    taken = []
    with suppress(ApiError):
        while True:
            taken.append(sockets.enter(owner))
    return taken


def test_one_key_leaves_places_for_every_other() -> None:
    sockets = SocketAdmission(60)
    mine = fill(sockets, "flood")
    assert (len(mine), len(fill(sockets, "second")), len(fill(sockets, "third"))) == (30, 15, 8)
    assert [len(fill(sockets, f"late {i}")) for i in range(20)] == [4, 2, 1] + [1] * 17
    with pytest.raises(ApiError, match="of 60 it can take, 30 of them opened with this key") as no:
        sockets.enter("flood")
    assert (no.value.status, no.value.headers["Retry-After"]) == (503, "1")
    for permit in mine:
        permit.release()
        permit.release()  # counts once
    assert sockets.identified == 15 + 8 + 7 + 17
    assert len(fill(sockets, "flood")) == 7


def test_without_keys_all_places_can_be_had() -> None:
    sockets = SocketAdmission(5)
    assert len(fill(sockets, None)) == 5


def test_unidentified_sockets_take_no_place_of_the_others() -> None:
    sockets = SocketAdmission(5)
    waiting = [sockets.wait(f"10.0.0.{i % 8}") for i in range(MAX_UNIDENTIFIED)]
    with pytest.raises(ApiError) as no:
        sockets.wait("10.0.0.9")
    assert no.value.status == 503
    assert len(fill(sockets, None)) == 5
    assert (sockets.identified, sockets.unidentified) == (5, MAX_UNIDENTIFIED)
    for permit in waiting:
        permit.release()
    assert sockets.unidentified == 0
    for _ in range(MAX_UNIDENTIFIED_OF_ADDRESS):
        sockets.wait("2001:db8:0:1::7")
    for address in ("2001:db8:0:1:ffff::", "2001:db8:0:1::7%eth0"):
        with pytest.raises(ApiError, match=f"^{MAX_UNIDENTIFIED_OF_ADDRESS} WebSockets") as no:
            sockets.wait(address)
        assert (no.value.status, no.value.code) == (429, "too_many_unidentified")
    sockets.wait("2001:db8:0:2::7")


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8::1", "2001:db8::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
        (None, ""),
        ("/run/inferneo.sock", ""),
    ],
)
def test_what_counts_as_one_address(address: str | None, network: str) -> None:
    assert network_of(address) == network
