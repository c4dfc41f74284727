"""A client that goes away frees what it had; a stream that is silent says that it lives."""

import socket

import httpx
import orjson
import pytest
from websockets.sync.client import connect

from inferneo_jax import Tokenizer
from tests.support.fake_engine import writes
from tests.support.fake_server import CHAT, Rig
from tests.support.raw_http import post

PATH = "/v1/completions"
BODY = {"model": CHAT, "prompt": "Hi", "max_tokens": 400}


@pytest.fixture
def endless(rig: Rig, tokenizer: Tokenizer) -> Rig:
    """An engine that stops after 5 tokens until it is released."""
    rig.engine.script = writes(tokenizer, "go on ", end=False)
    rig.engine.limit = 5
    return rig


def all_aborted(rig: Rig, number: int) -> None:
    rig.engine.wait_until(lambda e: len(e.aborted) == number and e.num_running == 0)


def test_closing_a_stream_aborts_every_choice(endless: Rig) -> None:
    body = {**BODY, "stream": True, "n": 3}
    with (
        httpx.Client(base_url=endless.url) as client,
        client.stream("POST", PATH, json=body) as response,
    ):
        next(response.iter_bytes())
    all_aborted(endless, 3)


@pytest.mark.parametrize("best_of", [1, 3])
def test_closing_a_plain_request_aborts_it(endless: Rig, best_of: int) -> None:
    with socket.create_connection(("127.0.0.1", endless.server.port)) as raw:
        raw.sendall(post(PATH, BODY | {"best_of": best_of}))
        endless.engine.wait_until(lambda e: e.num_running == best_of)
    all_aborted(endless, best_of)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "behind", [b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /hea"]
)
def test_bytes_sent_ahead_do_not_hide_that_a_client_left(
    endless: Rig, stream: bool, behind: bytes
) -> None:
    with socket.create_connection(("127.0.0.1", endless.server.port)) as raw:
        raw.sendall(post(PATH, BODY | {"stream": stream}))
        endless.engine.wait_until(lambda e: e.num_running == 1)
        if stream:
            raw.recv(1)
        raw.sendall(behind)
    all_aborted(endless, 1)


def test_pipelined_requests_are_answered_in_turn(rig: Rig) -> None:
    with socket.create_connection(("127.0.0.1", rig.server.port), timeout=10) as raw:
        raw.sendall(post(PATH, BODY) * 3 + b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        received = b""
        while b'{"status":"ok"}' not in received:
            received += raw.recv(65536)
    assert received.count(b"HTTP/1.1 200") == 4
    assert not rig.engine.aborted


def test_closing_a_socket_aborts_all_its_requests(endless: Rig) -> None:
    with connect(endless.ws + PATH) as ws:
        for name in "abc":
            envelope = {"type": "request", "id": name, "body": {**BODY, "stream": True}}
            ws.send(orjson.dumps(envelope).decode())
        endless.engine.wait_until(lambda e: e.num_running == 3)
    all_aborted(endless, 3)


def test_a_connection_that_breaks_aborts_its_requests(endless: Rig) -> None:
    with connect(endless.ws + PATH, close_timeout=0) as ws:
        ws.send(orjson.dumps({**BODY, "stream": True}).decode())
        endless.engine.wait_until(lambda e: e.num_running == 1)
        ws.socket.shutdown(socket.SHUT_RDWR)
        all_aborted(endless, 1)


def test_a_reader_that_does_not_read_holds_up_nobody(endless: Rig, tokenizer: Tokenizer) -> None:
    endless.engine.release()
    with httpx.Client(base_url=endless.url) as client:
        body = {**BODY, "stream": True, "n": 20}
        with client.stream("POST", PATH, json=body):
            # That one is not read; others are served, and its own sequences come to their end.
            assert endless.post(PATH, BODY).status_code == 200
            endless.engine.wait_until(lambda e: len(e.finished) == 21)
