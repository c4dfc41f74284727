"""The client's reading of bytes: the same however they are cut, and never wrong in silence."""

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.cli.bench.api import Answer
from server.cli.bench.errors import BenchError, RequestFailedError
from server.cli.bench.http import Client, ResponseReader
from server.cli.bench.sse import EventReader
from server.cli.bench.stats import Sample
from tests.cli.bench.scripted import chunk, event

TEXT = "Caf\u00e9 \U0001f600"
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}


def chunked(*pieces: bytes, head: bytes = b"") -> bytes:
    start = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n" + head + b"\r\n"
    return start + b"".join(map(chunk, pieces)) + b"0\r\n\r\n"


EVENTS = [
    event({"choices": [{"text": TEXT}]}),
    b": keep-alive\n\n",
    event({"choices": [{"delta": {"role": "assistant", "content": ""}}]}),
    event({"choices": [{"delta": {"content": TEXT}}]}),
    event({"choices": [], "usage": USAGE}),
    b"data: [DONE]\n\n",
]


def read(data: bytes, cuts: list[int]) -> tuple[bytes, ResponseReader]:
    reader, body = ResponseReader(), b""
    for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
        body += b"".join(reader.feed(data[begin:end]))
    return body, reader


@given(st.data())
def test_any_cut_of_the_bytes_gives_the_same_stream(data: st.DataObject) -> None:
    whole = chunked(*EVENTS, head=b"X: y\r\n")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=40)))
    sample, reader = Sample(start=0.0), ResponseReader()
    answer = Answer(sample, keep_text=True)
    for i, (begin, end) in enumerate(zip([0, *cuts], [*cuts, len(whole)], strict=True)):
        for piece in reader.feed(whole[begin:end]):
            answer.stream(piece, float(i))
    assert reader.done
    assert reader.keeps
    answer.finish(reader.status)
    assert answer.text == [TEXT, TEXT]
    assert len(sample.arrivals) == 2
    assert (sample.prompt_tokens, sample.output_tokens, sample.cached_tokens) == (7, 3, 4)


def test_byte_by_byte_is_a_cut_too() -> None:
    whole = chunked(b"".join(EVENTS))
    body, reader = read(whole, list(range(1, len(whole))))
    assert body == b"".join(EVENTS)
    assert reader.done


def test_a_part_of_a_chunk_is_there_when_it_arrives() -> None:
    reader = ResponseReader()
    assert reader.feed(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab") == [b"ab"]
    assert reader.feed(b"cde\r\n0\r\n\r\n") == [b"cde"]
    assert reader.done


@pytest.mark.parametrize(
    ("head", "keeps"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", True),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length:3\r\n\r\nabc", True),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 3\r\n\r\nabc", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nabc", False),
        (chunked(b"abc").replace(b"3\r\n", b"03;name=value\r\n"), True),
        (chunked(b"abc")[:-2] + b"Trailer: x\r\n\r\n", True),
    ],
)
def test_every_framing_is_read(head: bytes, keeps: bool) -> None:
    for cuts in ([], list(range(1, len(head)))):
        body, reader = read(head, cuts)
        assert (body, reader.status, reader.done, reader.keeps) == (b"abc", 200, True, keeps)


def test_a_body_may_last_until_the_connection_ends() -> None:
    body, reader = read(b"HTTP/1.1 200 OK\r\n\r\nabc", [])
    assert (body, reader.done, reader.keeps) == (b"abc", False, False)
    reader.feed_end()
    assert reader.done


@pytest.mark.parametrize("length", [0, 10, 40, 60, 66])
def test_an_end_in_the_middle_is_a_cut(length: int) -> None:
    _, reader = read(chunked(b"abcdefghij")[:length], [])
    with pytest.raises(RequestFailedError, match="connection cut"):
        reader.feed_end()


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -4\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\r\n",
        b"a" * 100_000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * 100_000,
    ],
)
def test_what_is_no_answer_is_refused(data: bytes) -> None:
    with pytest.raises(RequestFailedError, match="malformed answer"):
        ResponseReader().feed(data)


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_lines_of_one_event_are_joined(end: bytes) -> None:
    lines = [b": note", b"event: x", b"id: 3", b"data:a", b"data: b", b"", b"retry: 1", b"", b""]
    assert EventReader().feed(end.join(lines)) == [b"a\nb"]


def finished(*events: bytes) -> Sample:
    sample = Sample(start=0.0)
    answer = Answer(sample)
    for each in events:
        answer.stream(each, 1.0)
    answer.finish(200)
    return sample


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        ([b"data: {\n\n"], "malformed event"),
        ([b"data: [1]\n\n"], "malformed event"),
        ([b"Traceback (most recent call last)\n\n"], "malformed event"),
        ([b"data: \xff\n\n"], "malformed event"),
        ([event({"error": {"message": "the engine failed"}})], "error in the stream"),
        (EVENTS[:-1], "stream cut"),
        ([*EVENTS, b"data: "], "stream cut"),
        ([EVENTS[0], EVENTS[-1]], "no usage"),
        ([orjson.dumps({"choices": []})], "no usage"),
        ([b"{nonsense"], "malformed event"),
    ],
)
def test_a_stream_that_is_not_whole_is_a_failure(events: list[bytes], reason: str) -> None:
    with pytest.raises(RequestFailedError) as caught:
        finished(*events)
    assert caught.value.reason == reason


def test_only_chunks_with_text_are_tokens() -> None:
    silent = event({"choices": [{"text": ""}]}), event({"choices": [{"delta": {}}]})
    thought = event({"choices": [{"delta": {"reasoning_content": "hm"}}]})
    usage, done = EVENTS[-2:]
    assert len(finished(*silent, thought, *silent, EVENTS[0], usage, done).arrivals) == 2


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "http://", "http://x:port"])
def test_wrong_urls_are_named(url: str) -> None:
    with pytest.raises(BenchError, match="write it as http://"):
        Client(url)
