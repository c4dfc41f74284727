"""WebSockets without a key take neither the server's memory nor the sockets of others."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from server.http.socket_connection import CLOSE_SECONDS
from server.keys.key import new_text
from server.keys.socket_auth import FIRST_FRAME_SECONDS, PROTOCOL
from server.keys.sockets import MAX_UNIDENTIFIED, MAX_UNIDENTIFIED_OF_ADDRESS
from tests.hostile.served import PATH, Served, Socket, frame, serving, socket_to
from tests.support.waiting import until

pytestmark = pytest.mark.alone

FRAME = 16 * 1024 * 1024
CHUNK = "\U0001f600".encode() + b"x" * 65_532  # one emoji, and Python takes four bytes for each
ROUNDS = 4


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("sockets")) as made:
        yield made


async def send_unfinished(socket: Socket) -> bool:
    """Begin a frame of 16 MB and send all but its end; whether all of that was taken."""
    taken = await socket.send(frame(b"", length=FRAME))
    for _ in range(FRAME // len(CHUNK) - 1):
        taken = taken and await socket.send(CHUNK)
    return taken


async def memory_attack(served: Served, num_sockets: int, more: str = "") -> float:
    """Hold that many unfinished frames at once; the server's memory meanwhile, in MB."""

    async def one(stack: contextlib.AsyncExitStack) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            socket = await stack.enter_async_context(socket_to(served, more))
            if socket.status == 101:
                await send_unfinished(socket)

    async with contextlib.AsyncExitStack() as stack:
        async with asyncio.timeout(60):
            await asyncio.gather(*(one(stack) for _ in range(num_sockets)))
        return served.memory()


def settled(served: Served, bound: float) -> float:
    """The server's memory once it is within ``bound``, or what it is after a while."""
    deadline = time.monotonic() + 10
    while (memory := served.memory()) > bound and time.monotonic() < deadline:
        time.sleep(0.05)
    return memory


def until_no_socket(served: Served) -> None:
    until(lambda: not served.num_sockets(), 30, served.num_sockets)


def test_unfinished_frames_without_a_key_take_no_memory(served: Served) -> None:
    asyncio.run(memory_attack(served, 2))  # what a first connection imports and caches
    before = served.memory()
    served.forget_peak()
    during = [asyncio.run(memory_attack(served, 80)) for _ in range(ROUNDS)]
    after = settled(served, before * 1.05)
    print(f"before {before:.0f} MB, during {during}, peak {served.peak():.0f}, after {after:.0f}")
    assert served.peak() < before + 60
    assert after < before * 1.05


def test_frames_of_identified_clients_share_a_bounded_memory(served: Served) -> None:
    """40 sockets of one key, each with an unfinished frame of nearly the largest size."""
    before = served.memory()
    served.forget_peak()
    whole = 4 * 1024 * 1024 - 1
    refused = 0

    async def attack() -> None:
        nonlocal refused
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(40):
                socket = await stack.enter_async_context(socket_to(served, served.bearer))
                assert socket.status == 101
                await socket.send(frame(b"x" * (whole - 1), length=whole))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.05):
                        refused += b"overloaded" in await socket.message()
            async with socket_to(served, served.bearer) as other:  # still has room for a request
                await other.send(frame(b'{"model": "org/tiny-chat", "messages": 5}'))
                assert b'"param":"messages"' in await other.message()

    asyncio.run(attack())
    after = settled(served, before * 1.05 + 8)
    print(f"before {before:.0f} MB, peak {served.peak():.0f}, after {after:.0f}, {refused} refused")
    assert refused > 10
    assert served.peak() < before + 110  # 64 MB of frames, and what is being read
    assert after < before * 1.05 + 8


def test_handshakes_without_a_key_leave_room_for_those_with_one(served: Served) -> None:
    async def attack() -> list[int]:
        async with contextlib.AsyncExitStack() as stack:

            async def one() -> int:
                return (await stack.enter_async_context(socket_to(served))).status

            statuses = await asyncio.gather(*(one() for _ in range(300)))
            async with asyncio.timeout(FIRST_FRAME_SECONDS / 2):
                for more in (served.bearer, f"Sec-WebSocket-Protocol: {PROTOCOL}{served.key}\r\n"):
                    async with socket_to(served, more) as right:
                        assert right.status == 101
                        await right.send(frame(b"{}"))
                        assert b'"param":"model"' in await right.message()
            # Another address is not held to what this one has taken.
            elsewhere = await stack.enter_async_context(socket_to(served, source="127.0.0.2"))
            assert elsewhere.status == 101
            return statuses

    counts = Counter(asyncio.run(attack()))
    assert counts == {101: MAX_UNIDENTIFIED_OF_ADDRESS, 429: 300 - MAX_UNIDENTIFIED_OF_ADDRESS}


def test_addresses_together_have_a_bound_too(served: Served) -> None:
    async def attack() -> list[int]:
        async with contextlib.AsyncExitStack() as stack:

            async def one(i: int) -> int:
                source = f"127.0.0.{1 + i % 20}"
                return (await stack.enter_async_context(socket_to(served, source=source))).status

            return await asyncio.gather(*(one(i) for i in range(100)))

    until_no_socket(served)
    assert Counter(asyncio.run(attack())) == {101: MAX_UNIDENTIFIED, 503: 100 - MAX_UNIDENTIFIED}


def test_what_comes_before_the_handshake_is_answered_ends_the_connection(served: Served) -> None:
    """Hypercorn answers 400, and would leave the application waiting for ever."""

    async def attack() -> None:
        for _ in range(20):
            async with socket_to(served, served.bearer, ahead=frame(b"{}")) as socket:
                assert socket.status == 400
                assert await socket.reader.read() == b""

    until_no_socket(served)
    asyncio.run(attack())
    until_no_socket(served)


def test_a_client_that_does_not_answer_a_close_frame_is_cut(served: Served) -> None:
    async def silent() -> None:
        async with socket_to(served) as socket:
            await socket.send(frame(b"{}"))
            assert (await socket.closing())[0] == 4401
            async with asyncio.timeout(CLOSE_SECONDS + 10):
                with contextlib.suppress(ConnectionError):
                    assert await socket.reader.read() == b""

    asyncio.run(silent())
    until_no_socket(served)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (frame(b"\xff"), 1007),  # text that is no UTF-8
        (frame(b"\xed\xa0\x80"), 1007),
        (frame(b"{}", kind=0x80), 1002),  # a continuation of nothing
        (frame(b"{}", kind=0x83), 1002),
        (frame(b"{}", kind=0xC1), 1002),
        (frame(b"x" * 126, kind=0x89), 1002),
        (b"\x81\x02{}", 1002),  # not masked
        (b"\x81\xff" + bytes([255] * 8) + bytes(4), 1002),
    ],
)
@pytest.mark.parametrize("identified", [False, True])
def test_what_is_no_frame_closes_the_socket_as_the_protocol_says(
    served: Served, data: bytes, code: int, identified: bool
) -> None:
    async def send() -> None:
        async with socket_to(served, served.bearer if identified else "") as socket:
            await socket.send(data + b"\x00" * 100_000)  # which is dropped
            found, (error,) = await socket.closing()
            assert found == code
            assert b'"code":"invalid_frame"' in error

    asyncio.run(send())
    until_no_socket(served)


def test_every_socket_that_is_refused_or_closed_is_logged_and_counted(served: Served) -> None:
    wrong = f"Authorization: Bearer {new_text('0000000000')}\r\n"
    unknown = "Authorization: Bearer x\r\nX-Request-Id: unknown\r\n"
    foreign = f"{served.bearer}Origin: https://evil.example\r\nX-Request-Id: foreign\r\n"
    before, log = served.figures("inferneo_websockets_total"), len(served.events("websocket"))

    async def run() -> None:
        for more, status in ((wrong, 401), (unknown, 401), (foreign, 403)):
            async with socket_to(served, more) as socket:
                assert socket.status == status
        for data, code in ((frame(b"{}"), 4401), (frame(b"x" * 5000), 1009)):
            async with socket_to(served) as socket:
                await socket.send(data)
                assert (await socket.closing())[0] == code
        async with socket_to(served, f"{served.bearer}X-Request-Id: good\r\n") as socket:
            await socket.send(frame(b"", kind=0x88))
            await socket.closing()

    asyncio.run(run())
    until_no_socket(served)
    lines = served.events("websocket")[log:]
    for line in lines:
        assert line["route"] == PATH
        assert line["ms"] >= 0
    assert {(line.get("status"), line.get("close_code"), line.get("error")) for line in lines} == {
        (401, None, "invalid_api_key"),
        (403, None, "origin_not_allowed"),
        (None, 4401, "invalid_api_key"),
        (None, 1009, "frame_too_long"),
        (None, None, None),
    }
    assert {"unknown", "foreign", "good"} < {line["id"] for line in lines}
    after = served.figures("inferneo_websockets_total")
    counted = {labels: after[labels] - before.get(labels, 0) for labels in after}
    codes = {"401": 2, "403": 1, "4401": 1, "1009": 1, "client": 1}
    assert {labels: n for labels, n in counted.items() if n} == {
        f'code="{code}",handler="{PATH}"': n for code, n in codes.items()
    }
