"""Load on a server: a number of clients, or a rate of arrivals; bounded in count and time."""

import asyncio
import contextlib
import dataclasses
import itertools
import os
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from server.cli.bench.api import Api, explained
from server.cli.bench.errors import BenchError, RequestFailedError
from server.cli.bench.prompts import words
from server.cli.bench.stats import Sample, summarize

MOST_AT_ONCE = 512
"""Maximum concurrent requests, below the limit of open files; waiting counts as latency."""
_AFTER_FAILURE_SECONDS = 0.1

Job = Callable[[int, float | None], Awaitable[list[Sample]]]
"""Runs the request or conversation with a number, which was due at a time (None: now)."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """The requests of each client.

    Attributes:
        turns: number of turns in a conversation; each but the first adds ``turn_tokens`` tokens.
        timeout: time limit of one request, in seconds.
    """

    prompt_tokens: int = 105
    output_tokens: int = 64
    turns: int = 1
    turn_tokens: int = 20
    timeout: float = 120.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Level:
    """One level of load: ``clients`` that send without pause, or ``rate`` arrivals per second.

    Attributes:
        requests: maximum number of requests.
        seconds: time after which no further request starts.
    """

    clients: int | None = None
    rate: float | None = None
    requests: int
    seconds: float = 300.0

    @property
    def name(self) -> str:
        """The name of the level in tables."""
        return str(self.clients) if self.rate is None else f"{self.rate:g}/s"


@dataclass(frozen=True, kw_only=True)
class LongPrompts:
    """Long prompts that arrive beside every level of load, while it lasts.

    Attributes:
        rate: arrivals per second, at random times after the first, which arrives at once.
        tokens: prompt tokens of each; hardly anything is generated.
    """

    rate: float
    tokens: int = 2000


@dataclass(frozen=True)
class Measured:
    """What was measured of one level of load.

    Attributes:
        level: the level.
        samples: its requests.
        long: the long prompts that arrived beside them.
    """

    level: Level
    samples: list[Sample]
    long: list[Sample]


class Requests:
    """Jobs of one kind of work; no two have the same prompt.

    Args:
        api: the server.
        work: the requests.
        option: the option that sets the length of prompts, for errors.
    """

    def __init__(self, api: Api, work: Work, option: str = "--prompt-tokens") -> None:
        self._api, self._work = api, work
        self._count = api.size.words_for(work.prompt_tokens, option)
        self._later = 0
        if work.turns > 1:
            self._later = max(1, round(work.turn_tokens / api.size.tokens_per_word))
        self.details: dict[str, str] = {}

    async def job(self, number: int, due: float | None) -> list[Sample]:
        """Run the request, or all turns of the conversation, with this number."""
        rng = random.Random(f"{self._work.seed} {number}")
        if self._api.endpoint == "embeddings":
            texts = [words(self._count, rng) for _ in range(self._api.batch)]
            return [await self._measured(1, due, lambda sample: self._api.embed(sample, texts))]
        samples: list[Sample] = []
        text = words(self._count, rng)
        if self._work.turns == 1:
            prompt = self._api.as_prompt(text)
            ask = lambda sample: self._api.generate(sample, prompt, self._work.output_tokens)  # noqa: E731
            return [await self._measured(1, due, ask)]
        messages: list[dict[str, str]] = []
        for turn in range(1, self._work.turns + 1):
            messages.append({"role": "user", "content": text})
            samples.append(await self._measured(turn, due, lambda s: self._answer(s, messages)))
            if samples[-1].error:
                break
            text, due = words(self._later, rng), None
        return samples

    async def _answer(self, sample: Sample, messages: list[dict[str, str]]) -> None:
        text = await self._api.generate(sample, messages, self._work.output_tokens, keep_text=True)
        messages.append({"role": "assistant", "content": text})

    async def _measured(
        self, turn: int, due: float | None, ask: Callable[[Sample], Awaitable[Any]]
    ) -> Sample:
        sample = Sample(start=time.perf_counter() if due is None else due, turn=turn)
        try:
            async with asyncio.timeout(self._work.timeout):
                await ask(sample)
        except RequestFailedError as error:
            sample.error = error.reason
            self.details.setdefault(error.reason, str(error))
        except TimeoutError:
            sample.error = "timeout"
            self.details["timeout"] = f"no whole answer within {self._work.timeout:g} s (--timeout)"
        sample.end = time.perf_counter()
        return sample


async def run_level(job: Job, level: Level, first: int, seed: int) -> list[Sample]:
    """Run one level of load; ``first`` is the number of its first job."""
    if level.rate is None:
        return await _clients(job, level, first)
    return await _arrivals(job, level, first, random.Random(f"arrivals {seed}"))


async def _clients(job: Job, level: Level, first: int) -> list[Sample]:
    samples: list[Sample] = []
    numbers = iter(range(first, first + level.requests))
    deadline = time.perf_counter() + level.seconds

    async def client() -> None:
        for number in numbers:
            if time.perf_counter() >= deadline:
                return
            done = await job(number, None)
            samples.extend(done)
            if done[
                -1
            ].error:  # otherwise a server that rejects at once would dominate the measurement
                await asyncio.sleep(_AFTER_FAILURE_SECONDS)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(level.clients or 1, level.requests)):
            group.create_task(client())
    return samples


async def _arrivals(job: Job, level: Level, first: int, rng: random.Random) -> list[Sample]:
    """Poisson arrivals: the times between them are exponential."""
    assert level.rate is not None
    samples: list[Sample] = []
    places = asyncio.Semaphore(MOST_AT_ONCE)
    begin = due = time.perf_counter()

    async def arrive(number: int, due: float) -> None:
        async with places:
            # Latency counts from the due time, so that neither the server nor this client
            # looks better for making requests wait before they are sent.
            samples.extend(await job(number, due))

    async with asyncio.TaskGroup() as group:
        for number in range(first, first + level.requests):
            due += rng.expovariate(level.rate)
            if due - begin > level.seconds:
                break
            await asyncio.sleep(due - time.perf_counter())
            group.create_task(arrive(number, due))
    return samples


async def _run_beside(
    job: Job, level: Level, first: int, work: Work, beside: Job, rate: float
) -> Measured:
    """Run a level while other jobs arrive; those that are under way at its end are finished."""
    over, rng = asyncio.Event(), random.Random(f"long {first} {work.seed}")
    places = asyncio.Semaphore(MOST_AT_ONCE)
    long: list[Sample] = []

    async def arrive(number: int, due: float) -> None:
        async with places:
            long.extend(await beside(number, due))

    async def arrivals(group: asyncio.TaskGroup) -> None:
        due = time.perf_counter()
        for number in itertools.count(first):
            group.create_task(arrive(number, due))
            due += rng.expovariate(rate)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), due - time.perf_counter())
            if over.is_set():
                return

    async with asyncio.TaskGroup() as group:
        group.create_task(arrivals(group))
        samples = await run_level(job, level, first, work.seed)
        over.set()
    return Measured(level, samples, long)


async def measure(
    api: Api,
    work: Work,
    levels: list[Level],
    limits: dict[str, float],
    warmup: int = 2,
    report: Callable[[str], None] = lambda _: None,
    long_prompts: LongPrompts | None = None,
    keep: Callable[[Measured], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Return the figures of each level (``stats.summarize``), and this client's own load.

    Args:
        api: the server.
        work: the requests of each level.
        levels: run one after the other.
        limits: of ``stats.parse_goodput``.
        warmup: requests before each level that do not count.
        report: told of progress.
        long_prompts: what arrives beside each level.
        keep: given the samples of each level.

    Raises:
        BenchError: every request of a level failed.
    """
    requests = Requests(api, work)
    if long_prompts:
        sizes = {"prompt_tokens": long_prompts.tokens, "output_tokens": 1, "turns": 1}
        # Another seed, or the prompts would begin like those of the level.
        longer = dataclasses.replace(work, seed=~work.seed, **sizes)
        beside = Requests(api, longer, "--long-tokens")
    rows, number = [], 0
    for level in levels:
        if warmup:
            report(f"{level.name}: warm-up")
            small = Level(clients=level.clients or warmup, requests=warmup, seconds=level.seconds)
            await run_level(requests.job, small, number, work.seed)
            number += warmup
        report(f"{level.name}: {level.requests} requests")
        spent = time.process_time()
        if long_prompts:
            done = await _run_beside(
                requests.job, level, number, work, beside.job, long_prompts.rate
            )
        else:
            done = Measured(level, await run_level(requests.job, level, number, work.seed), [])
        spent = time.process_time() - spent
        number += level.requests
        keep(done)
        figures = summarize(done.samples, limits)
        if long_prompts:
            figures["long_prompts"] = summarize(done.long)
        if not figures["completed"]:
            raise _all_failed(figures["errors"], requests.details, api)
        seconds = figures["seconds"]
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
        rows.append(
            {
                "level": level.name,
                "clients": level.clients,
                "rate": level.rate,
                **figures,
                "error_details": {name: requests.details[name] for name in figures["errors"]},
                "client_cpu_seconds": spent,
                "client_cpu_share": spent / seconds / (cores or os.cpu_count() or 1),
            }
        )
    return rows


def _all_failed(errors: dict[str, int], details: dict[str, str], api: Api) -> BenchError:
    worst = max(errors, key=lambda name: errors[name])
    status = int(worst.removeprefix("HTTP ")) if worst.startswith("HTTP ") else None
    why = explained(
        RequestFailedError(worst, details[worst].removeprefix(f"{worst}: "), status),
        api.client.url,
        api.api_key,
    )
    return BenchError(f"all {sum(errors.values())} requests failed, most of them so: {why}")
