"""Who is let in, who is refused before any work, and until when."""

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from queue import Queue
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
from websockets import InvalidStatus
from websockets.sync.client import connect

from inferneo_jax import Tokenizer
from server.http.deadline import TIMEOUT_HEADER, Deadline
from server.http.errors import ApiError
from server.run.permits import Permit, Permits
from tests.support.fake_engine import writes
from tests.support.fake_server import CHAT, EMBED, Rig, running
from tests.support.raw_http import parse_stream

BODY = {"model": CHAT, "prompt": "Hi", "max_tokens": 400}
COMPLETIONS = "/v1/completions"
SOON = {TIMEOUT_HEADER: "0.2"}


def enter(permits: Permits, owner: str | None) -> Permit | None:
    with suppress(ApiError):
        return permits.acquire(owner)
    return None


def fill(permits: Permits, owner: str | None) -> list[Permit]:
    """All the permits that one owner can have."""
    return list(iter(lambda: enter(permits, owner), None))


async def test_there_are_as_many_permits_as_there_are() -> None:
    permits = Permits(10)
    held = fill(permits, None)
    assert len(held) == 10
    with pytest.raises(ApiError) as refused:
        permits.acquire(None)
    assert (refused.value.status, refused.value.code) == (503, "overloaded")
    for permit in held[:3]:
        permit.__exit__()
    assert len(fill(permits, None)) == 3
    assert not await permits.emptied(0.0)


async def test_a_flood_of_one_key_leaves_permits_for_every_other() -> None:
    permits = Permits(60)
    assert len(fill(permits, "flood")) == 30
    assert len(fill(permits, "second")) == 15
    assert len(fill(permits, "third")) == 8
    assert [len(fill(permits, f"late {i}")) for i in range(20)] == [4, 2, 1] + [1] * 17


async def test_permits_of_a_request_are_counted_by_its_sequences() -> None:
    permits = Permits(20)
    with permits.acquire("a") as permit:
        permit.acquire(9)
        assert len(fill(permits, "b")) == 6
        with pytest.raises(ApiError, match="as many requests"):
            permits.acquire("a").acquire(8)
        permit.acquire(9)


async def test_a_large_request_is_served_to_whoever_has_no_other() -> None:
    permits = Permits(10)
    with permits.acquire("a") as permit:
        permit.acquire(300)
        assert enter(permits, "b") is None
    assert await permits.emptied(0.0)
    with permits.acquire(None) as permit:
        permit.acquire(300)
        assert enter(permits, None) is None
    assert len(fill(permits, None)) == 10


async def test_everything_comes_back() -> None:
    rng = np.random.default_rng(3)
    permits, held = Permits(16), list[Permit]()
    for _ in range(5000):
        if held and rng.random() < 0.5:
            held.pop(int(rng.integers(len(held)))).__exit__()
        elif permit := enter(permits, rng.choice([None, "a", "b", "c"])):
            held.append(permit)
            try:
                permit.acquire(int(rng.integers(1, 6)))
            except ApiError:
                held.pop().__exit__()
    for permit in held:
        permit.__exit__()
    assert await permits.emptied(0.0)
    assert len(fill(permits, None)) == 16


async def test_who_is_refused_is_told_when_permits_get_free() -> None:
    permits = Permits(40)
    for _ in range(5):
        with permits.acquire(None) as permit:
            await asyncio.sleep(0.15)
            permit.served = True
    fill(permits, None)
    assert 2 <= retry_after(permits) <= 4  # a quarter of 40, at 0.15 s each


def retry_after(permits: Permits) -> int:
    with pytest.raises(ApiError) as caught:
        permits.acquire(None)
    return int(caught.value.headers["Retry-After"])


async def test_only_served_requests_and_busy_times_set_the_pace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.run.permits.time.monotonic", lambda: now)
    permits, now = Permits(40), 100.0
    for _ in range(5):
        with permits.acquire(None) as permit:
            now += 1.0
            permit.served = True
    now += 1000.0  # nobody is there
    held = fill(permits, None)
    for _ in range(64):  # these leave, and come, at once: they were refused
        held.pop().__exit__()
        held.append(permits.acquire(None))
    now += 1.0
    assert retry_after(permits) == 10  # a quarter of 40, each after a second


@pytest.mark.parametrize(
    ("path", "body", "served"),
    [
        (COMPLETIONS, BODY, True),
        (COMPLETIONS, {**BODY, "temperature": -1}, False),
        (COMPLETIONS, {**BODY, "n": 0}, False),
        (COMPLETIONS, {**BODY, "prompt": "x" * 600}, False),
        ("/v1/embeddings", {"model": EMBED, "input": "x"}, True),
        ("/v1/embeddings", {"model": EMBED, "input": "x", "dimensions": 99}, False),
    ],
)
def test_a_request_that_is_refused_was_not_served(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], served: bool
) -> None:
    left: Queue[bool] = Queue()
    leave = Permit.__exit__

    def note(permit: Permit, *args: object) -> None:
        left.put(permit.served)
        leave(permit, *args)

    monkeypatch.setattr(Permit, "__exit__", note)
    assert (rig.post(path, body).status_code == 200) is served
    assert left.get(timeout=30) is served


@pytest.mark.parametrize(
    "text", ["", "0", "0.0", "-1", "soon", "1e3", "nan", "inf", " 5", "9" * 99]
)
async def test_a_timeout_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ApiError, match=TIMEOUT_HEADER) as caught:
        Deadline.parse(text, 60.0)
    assert (caught.value.status, caught.value.param) == (400, TIMEOUT_HEADER)


async def test_a_timeout_is_bounded_by_the_servers_own() -> None:
    now = asyncio.get_running_loop().time()
    for text, seconds in ((None, 60.0), ("2.5", 2.5), ("1000", 60.0)):
        assert Deadline.parse(text, 60.0).at == pytest.approx(now + seconds, abs=1.0)


@pytest.fixture(scope="module")
def small(tokenizer: Tokenizer) -> Iterator[Rig]:
    """A server of four permits, whose engine stops after five tokens until it is released."""
    with running(tokenizer, slots=2, max_waiting=2) as rig:
        rig.engine.script = writes(tokenizer, "go on ", end=False)
        yield rig


@pytest.fixture
def full(small: Rig) -> Iterator[Rig]:
    """The same, its permits held by streams."""
    small.engine.limit = 5
    small.engine.submitted.clear()
    with httpx.Client(base_url=small.url) as client, connect(small.ws + COMPLETIONS) as ws:
        asked = {**BODY, "stream": True, "n": 3}
        with client.stream("POST", COMPLETIONS, json=asked):
            ws.send(orjson.dumps({**BODY, "stream": True}).decode())
            small.engine.wait_until(lambda e: e.num_running == 4)
            yield small
    small.engine.wait_until(lambda e: e.num_running == 0)


def test_a_full_server_refuses_before_it_reads(full: Rig) -> None:
    for path, body in (
        (COMPLETIONS, BODY),
        (COMPLETIONS, {**BODY, "stream": True}),
        ("/v1/embeddings", {"model": EMBED, "input": "x"}),
        (COMPLETIONS, {"no": "model"}),
    ):
        response = full.post(path, body)
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "overloaded"
        assert int(response.headers["Retry-After"]) >= 1
        assert int(response.headers["Retry-After-Ms"]) >= 1000
    with connect(full.ws + COMPLETIONS) as ws:
        ws.send(orjson.dumps(BODY).decode())
        assert orjson.loads(ws.recv())["error"]["code"] == "overloaded"
    assert len(full.engine.submitted) == 4
    assert full.client.get("/v1/models").status_code == 200
    assert full.client.get("/ready").status_code == 200


def test_there_are_no_more_sockets_than_places(small: Rig) -> None:
    with ExitStack() as held:
        for _ in range(4):
            held.enter_context(connect(small.ws + COMPLETIONS))
        with pytest.raises(InvalidStatus) as refused:
            connect(small.ws + COMPLETIONS)
        assert refused.value.response.status_code == 503
        assert "Retry-After" in refused.value.response.headers
    deadline = time.monotonic() + 10
    while True:
        with suppress(InvalidStatus), connect(small.ws + COMPLETIONS):
            return
        assert time.monotonic() < deadline


@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_finished_in_time_is_refused_at_once(rig: Rig, stream: bool) -> None:
    rig.engine.forecast_seconds = 20.0
    body, before = {**BODY, "stream": stream}, len(rig.engine.submitted)
    response = rig.post(COMPLETIONS, body, headers={TIMEOUT_HEADER: "21"})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "overloaded")
    message = response.json()["error"]["message"]
    assert "within 21 s" in message
    assert "about 25.0 s" in message
    assert TIMEOUT_HEADER in message
    assert response.headers["Retry-After"] == "4"
    assert len(rig.engine.submitted) == before
    for headers in ({TIMEOUT_HEADER: "40"}, {}):
        assert rig.post(COMPLETIONS, body, headers=headers).status_code == 200
    rig.engine.forecast_seconds = None
    assert rig.post(COMPLETIONS, body, headers={TIMEOUT_HEADER: "21"}).status_code == 200


def test_who_leaves_makes_room(full: Rig) -> None:
    full.engine.release()
    full.engine.wait_until(lambda e: e.num_running == 0)
    assert full.post(COMPLETIONS, BODY).status_code == 200


@pytest.fixture
def endless(rig: Rig, tokenizer: Tokenizer) -> Rig:
    rig.engine.script = writes(tokenizer, "go on ", end=False)
    rig.engine.limit = 5
    return rig


def test_a_plain_request_ends_at_its_deadline(endless: Rig) -> None:
    response = endless.post(COMPLETIONS, BODY, headers=SOON)
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "deadline_exceeded"
    assert TIMEOUT_HEADER in response.json()["error"]["message"]
    assert response.headers["X-Should-Retry"] == "false"
    endless.engine.wait_until(lambda e: len(e.aborted) == 1 and e.num_running == 0)


def test_a_stream_ends_at_its_deadline_with_an_error_event(endless: Rig) -> None:
    started = time.monotonic()
    response = endless.post(COMPLETIONS, {**BODY, "stream": True, "n": 2}, headers=SOON)
    events = parse_stream(response.text)
    assert events[-1]["error"]["code"] == "deadline_exceeded"
    assert len(events) > 2
    assert time.monotonic() - started < 5
    endless.engine.wait_until(lambda e: len(e.aborted) == 2 and e.num_running == 0)


def test_a_socket_has_a_deadline_for_each_request(endless: Rig) -> None:
    with connect(endless.ws + COMPLETIONS, additional_headers=SOON) as ws:
        for _ in range(2):
            ws.send(orjson.dumps({**BODY, "stream": True}).decode())
            while "error" not in (frame := orjson.loads(ws.recv(timeout=5))):
                pass
            assert frame["error"]["code"] == "deadline_exceeded"
            assert orjson.loads(ws.recv(timeout=5))["object"] == "done"


def test_a_stuck_reader_keeps_its_slot_until_its_deadline_only(endless: Rig) -> None:
    endless.engine.release()
    body = {**BODY, "stream": True, "n": 100, "logprobs": 5}
    with (
        httpx.Client(base_url=endless.url) as client,
        client.stream("POST", COMPLETIONS, json=body, headers={TIMEOUT_HEADER: "1"}),
    ):
        endless.engine.wait_until(lambda e: len(e.finished) == 100)
        assert endless.engine.aborted


def test_an_embedding_ends_at_its_deadline(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Future[Any]] = []

    def embed(*_: Any) -> Future[Any]:
        made.append(Future())
        return made[-1]

    monkeypatch.setattr(rig.embedder, "embed", embed)
    response = rig.post("/v1/embeddings", {"model": EMBED, "input": "x"}, headers=SOON)
    assert (response.status_code, made[0].cancelled()) == (504, True)
    assert response.json()["error"]["code"] == "deadline_exceeded"


def test_a_wrong_timeout_is_explained(rig: Rig) -> None:
    response = rig.post(COMPLETIONS, BODY, headers={TIMEOUT_HEADER: "soon"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == TIMEOUT_HEADER
