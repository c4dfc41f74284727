"""The load, against servers that misbehave in every way."""

import time

import pytest

from server.cli.bench.api import Api, connect
from server.cli.bench.errors import BenchError
from server.cli.bench.http import Client
from server.cli.bench.load import Level, Requests, Work, measure, run_level
from tests.cli.bench.scripted import (
    END,
    GOOD,
    HEAD,
    TOKEN,
    Reply,
    chunk,
    event,
    samples_of,
    scripted,
    status,
)
from tests.support.machine_speed import Machine

pytestmark = pytest.mark.alone


async def test_every_request_is_done_once_by_so_many_clients_on_their_connections() -> None:
    async with scripted([0.01, GOOD]) as (server, url):
        samples, _ = await samples_of(url, count=30, clients=5)
    assert len(samples) == len(server.requests) == 30
    assert server.most == server.connections == 5
    assert len({body["prompt"] for body in server.requests}) == 30
    for sample in samples:
        assert sample.error is None
        assert (len(sample.arrivals), sample.output_tokens, sample.prompt_tokens) == (2, 2, 9)
        assert sample.start < sample.arrivals[0] <= sample.end


async def test_the_same_seed_asks_the_same() -> None:
    asked = []
    for seed in (1, 1, 2):
        async with scripted(GOOD) as (server, url):
            await samples_of(url, clients=1, seed=seed)
        asked.append([body["prompt"] for body in server.requests])
    assert asked[0] == asked[1]
    assert not set(asked[0]) & set(asked[2])


async def test_what_is_asked() -> None:
    async with scripted(GOOD) as (server, url):
        await samples_of(url, count=1)
    (body,) = server.requests
    prompt = body.pop("prompt")
    assert len(prompt.split()) == 20
    assert body == {
        "model": "model",
        "max_tokens": 2,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }


async def test_times_are_those_of_arrival() -> None:
    async with scripted([0.05, HEAD + TOKEN, 0.1, TOKEN[:9], TOKEN[9:] + END]) as (_, url):
        (sample,), _ = await samples_of(url, count=1)
    assert sample.ttft is not None
    assert sample.itl is not None
    assert sample.ttft >= 0.05
    assert sample.itl >= 0.09
    assert sample.e2e == pytest.approx(sample.ttft + sample.itl, abs=0.05)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ([HEAD + TOKEN, None], "connection cut"),
        ([HEAD, TOKEN[:-5], None], "connection cut"),
        ([None], "connection cut"),
        (status(429, "slow down", "Retry-After: 1"), "HTTP 429"),
        (status(503, "overloaded"), "HTTP 503"),
        ([HEAD + TOKEN, 9.0, TOKEN + END], "timeout"),
        ([9.0, GOOD], "timeout"),
        (HEAD + TOKEN + b"0\r\n\r\n", "stream cut"),
        (b"nonsense\r\n\r\n", "malformed answer"),
        (HEAD + b"9\r\nnot an ev\r\n4\r\nent\n\r\n0\r\n\r\n", "malformed event"),
    ],
)
async def test_a_failure_is_counted_by_its_kind_and_stops_nobody_else(
    reply: Reply, reason: str, machine: Machine
) -> None:
    timeout = min(5.0, machine.seconds(0.3))
    async with scripted(lambda i: reply if i == 1 else GOOD) as (server, url):
        samples, requests = await samples_of(url, count=6, timeout=timeout)
    assert sorted(sample.error or "" for sample in samples) == ["", "", "", "", "", reason]
    assert reason in requests.details[reason] or reason == "timeout"
    assert len(server.requests) == 6


async def test_a_server_that_dies_midway_fails_the_rest() -> None:
    async with scripted([0.05, GOOD]) as (_, url):
        samples, _ = await samples_of(url, count=2)
    assert not any(sample.error for sample in samples)
    samples, _ = await samples_of(url, count=3)
    assert {sample.error for sample in samples} == {"cannot connect"}


async def test_a_kept_connection_that_the_server_closed_is_no_failure() -> None:
    async with scripted([GOOD, 0.02, None]) as (server, url):
        samples, _ = await samples_of(url, count=8, clients=1)
    assert not any(sample.error for sample in samples)
    assert server.connections >= 8


async def test_no_request_is_begun_after_the_seconds_and_none_is_waited_for_too_long(
    machine: Machine,
) -> None:
    async with scripted([0.05, GOOD]) as (_, url), Client(url) as client:
        requests = Requests(Api(client, "m"), Work(timeout=0.2))
        begin = time.monotonic()
        samples = await run_level(
            requests.job, Level(clients=2, requests=10_000, seconds=0.3), 0, 0
        )
    assert 2 <= len(samples) <= 20
    assert time.monotonic() - begin < machine.seconds(3)


async def test_arrivals_do_not_wait_for_answers_and_late_ones_count_from_when_they_were_due(
    machine: Machine,
) -> None:
    async with scripted([0.4, GOOD]) as (server, url):
        samples, _ = await samples_of(url, count=40, clients=None, rate=200.0)
    assert server.most > 20
    assert all(0.4 <= sample.e2e < machine.seconds(3) for sample in samples)
    gaps = sorted(sample.start for sample in samples)
    assert 40 / 200 / 3 < gaps[-1] - gaps[0] < machine.seconds(3 * 40 / 200)


async def test_a_server_that_refuses_everything_is_not_asked_at_full_speed() -> None:
    async with scripted(status(503)) as (server, url), Client(url) as client:
        requests = Requests(Api(client, "m"), Work())
        await run_level(requests.job, Level(clients=2, requests=10_000, seconds=0.5), 0, 0)
    assert len(server.requests) <= 14


async def test_the_second_turn_holds_the_first() -> None:
    async with scripted(GOOD) as (server, url), Client(url) as client:
        requests = Requests(Api(client, "m", "chat"), Work(turns=2, prompt_tokens=50))
        samples = await requests.job(0, None)
    assert [sample.turn for sample in samples] == [1, 2]
    first, second = (body["messages"] for body in server.requests)
    assert second[0] == first[0]
    assert second[1] == {"role": "assistant", "content": "aa"}
    assert second[2]["role"] == "user"
    assert len(second[2]["content"].split()) == 20


async def test_a_chat_that_fails_ends() -> None:
    async with scripted(status(503)) as (server, url), Client(url) as client:
        requests = Requests(Api(client, "m", "chat"), Work(turns=3))
        assert len(await requests.job(0, None)) == 1
    assert len(server.requests) == 1


def counted(tokens: int) -> bytes:
    """An answer to a prompt of so many tokens."""
    usage = {"prompt_tokens": tokens, "completion_tokens": 1}
    events = event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n"
    return HEAD + chunk(events) + chunk(b"")


async def test_ignore_eos_is_left_out_where_it_is_refused() -> None:
    replies = [status(400, "unknown ignore_eos"), counted(42), counted(98)]
    async with scripted(lambda i: replies[i]) as (server, url), Client(url) as client:
        api = await connect(client, "m")
    assert not api.ignore_eos
    assert "ignore_eos" not in server.requests[-1]
    assert (api.size.overhead, api.size.tokens_per_word) == (14, 0.875)


@pytest.mark.parametrize(
    ("reply", "advice"),
    [
        (status(401, "no key"), "wants --api-key"),
        (status(404, "no such model"), "Models at .*: none; choose with --model"),
        (status(429, "too many"), "inferneo keys create bench"),
        (status(503, "loading"), "Wait until .*/ready answers 200"),
        (status(400, "too long"), "too long"),
        (HEAD + TOKEN + b"0\r\n\r\n", "stream cut"),
    ],
)
async def test_errors_say_what_to_do(reply: bytes, advice: str) -> None:
    async with scripted(reply) as (_, url), Client(url) as client:
        with pytest.raises(BenchError, match=advice):
            await connect(client, "m")


async def test_when_every_request_failed_the_reason_is_told() -> None:
    async with scripted(status(429, "too many")) as (_, url), Client(url) as client:
        level = Level(clients=2, requests=3)
        failed = r"all 3 requests failed, .*HTTP 429: too many\n.*inferneo keys create"
        with pytest.raises(BenchError, match=failed):
            await measure(Api(client, "m"), Work(), [level], {})


async def test_the_client_says_what_it_took_itself() -> None:
    async with scripted(GOOD) as (server, url), Client(url) as client:
        level = Level(clients=4, requests=200)
        (row,) = await measure(Api(client, "m"), Work(), [level], {"ttft": 60.0}, warmup=3)
    assert row["completed"] == 200
    assert len(server.requests) == 203
    assert 0 < row["client_cpu_seconds"] < 5 * row["seconds"]
    assert row["goodput"]["share"] == 1.0


def test_too_short_a_prompt_is_named() -> None:
    api = Api(Client("http://127.0.0.1:1"), "m")
    api.size = api.size.fit((62, 126))
    with pytest.raises(BenchError, match="--prompt-tokens is 20; the least is 3"):
        Requests(api, Work(prompt_tokens=20))
