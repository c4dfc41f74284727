"""Which replica should get a request: ``python -m tests.tools.routing``, a simulation.

Sixteen replicas serve conversations at 1,000 requests a second. Each has the scheduler, the block
pool and the planner of prefill that a server has; the device is fake, and its steps take the time
of the roofline. Requests are routed by rules that routers in use have. ``--help`` lists the sizes.
"""

import argparse
import heapq
import itertools
import math
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from statistics import mean

from inferneo_jax.request import GenerationRequest
from inferneo_jax.scheduler.prefill import PrefillPlanner, PrefillShapes, PrefillTimes
from inferneo_jax.scheduler.scheduler import (
    DataParallelScheduler,
    PrefillChunk,
    SchedulerOutput,
    prefill_shape,
)
from inferneo_jax.scheduler.sequence import Sequence

VOCABULARY = 256
"""Enough that no two texts begin alike by chance."""
CHUNKS = (256, 1024, 2048)
_OVERHEAD = 256


@dataclass(frozen=True)
class Device:
    """A device whose steps take the longer of reading its memory and computing.

    Attributes:
        weights: seconds to read all weights.
        position: seconds to read the keys and values of one position.
        token: seconds of the products of one token.
        pair: seconds of attention between one token and one position.
        pages: of its KV cache.
        page_len: tokens of a page.
        slots: sequences that run at once.
    """

    weights: float
    position: float
    token: float
    pair: float
    pages: int
    page_len: int
    slots: int

    def seconds(self, decode: Tokens[int], chunks: Tokens[tuple[int, int]] = ()) -> float:
        """Return how long a step takes.

        Args:
            decode: the length of each row that gets its next token.
            chunks: the start and the length of each chunk of a prompt.
        """
        live = sum(decode) + sum(start + length for start, length in chunks)
        tokens = len(decode) + sum(length for _, length in chunks)
        pairs = sum(decode) + sum(length * (start + length / 2) for start, length in chunks)
        return max(self.weights + self.position * live, self.token * tokens + self.pair * pairs)

    def planner(self) -> PrefillPlanner:
        """The planner of a server that has measured this device."""
        shapes = PrefillShapes.of(CHUNKS, self.slots, _OVERHEAD)
        one = self.seconds([1])
        costs = [(float(n), max(self.seconds([1], [(0, n)]) - one, 1e-9)) for n in (16, *CHUNKS)]
        return PrefillPlanner(shapes, PrefillTimes(costs), 0.05, decode_seconds=one)


class Replica:
    """A server: a scheduler, and a device on which one step follows the other."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.in_flight = 0
        self._scheduler = DataParallelScheduler(
            1,
            slots=device.slots,
            num_blocks=device.pages + 1,
            block_len=device.page_len,
            planner=device.planner(),
        )
        self._running: SchedulerOutput | None = None

    def submit(self, sequence: Sequence) -> None:
        """Queue a request."""
        self.in_flight += 1
        self._scheduler.add(sequence)

    def begin(self) -> float | None:
        """Begin a step and return the seconds that it takes; None: there is nothing to do now."""
        if self._running or not (scheduled := self._scheduler.schedule()):
            return None
        (step,) = scheduled
        self._running = step
        decode = [row.position + 1 for row in step.decode]
        seconds = self.device.seconds(decode, [(c.start, c.length) for c in step.prefill])
        alone = seconds if decode and not step.prefill else 0.0
        mixed = seconds if decode and prefill_shape(scheduled) else 0.0
        self._scheduler.measured(scheduled, alone, mixed)
        return seconds

    def end(self, sample: Callable[[], int]) -> tuple[list[Sequence], list[Sequence]]:
        """End the step; return who got the first token and who the last."""
        assert self._running
        step, self._running = self._running, None
        first, last = [], []
        for work in (*step.decode, *step.prefill):
            if isinstance(work, PrefillChunk) and not work.sample:
                continue
            sequence = work.sequence
            _, reason = self._scheduler.commit(sequence, (sample(),))
            if len(sequence.output) == 1:
                first.append(sequence)
            if reason:
                self._scheduler.remove(sequence)
                self.in_flight -= 1
                last.append(sequence)
        return first, last

    def counts(self) -> dict[str, int]:
        """What its ``/metrics`` says."""
        return self._scheduler.counts()


class RoundRobin:
    """One after the other."""

    def __init__(self, replicas: list[Replica], rng: random.Random) -> None:
        self._turns = itertools.cycle(range(len(replicas)))

    def choose(self, now: float, session: int, blocks: list[bytes]) -> int:
        """Return the number of the replica."""
        return next(self._turns)


class LeastLoaded:
    """The replica with the fewest requests in flight."""

    def __init__(self, replicas: list[Replica], rng: random.Random) -> None:
        self._replicas, self._rng = replicas, rng

    def choose(self, now: float, session: int, blocks: list[bytes]) -> int:
        """Return the number of the replica."""
        loads = [replica.in_flight for replica in self._replicas]
        return _best([-load for load in loads], self._rng)


class Session:
    """The rule of Ray Serve's ``ConsistentHashRouter``: all turns of a conversation go to one."""

    def __init__(self, replicas: list[Replica], rng: random.Random) -> None:
        self._count = len(replicas)

    def choose(self, now: float, session: int, blocks: list[bytes]) -> int:
        """Return the number of the replica."""
        return random.Random(session).randrange(self._count)


class PrefixIndex:
    """What a router believes to be in each replica's cache: the blocks of what it sent there."""

    def __init__(self, replicas: list[Replica]) -> None:
        self._capacity = [replica.device.pages for replica in replicas]
        self._known: list[OrderedDict[bytes, None]] = [OrderedDict() for _ in replicas]

    def matches(self, blocks: list[bytes]) -> list[float]:
        """The share of a prompt's blocks that each replica has."""
        return [
            sum(1 for _ in itertools.takewhile(known.__contains__, blocks)) / max(1, len(blocks))
            for known in self._known
        ]

    def sizes(self) -> list[int]:
        """Blocks of each."""
        return [len(known) for known in self._known]

    def sent(self, replica: int, blocks: list[bytes]) -> None:
        """Note where a prompt went."""
        known = self._known[replica]
        for block in reversed(blocks):  # the first one is the last to be forgotten
            known[block] = None
            known.move_to_end(block)
        while len(known) > self._capacity[replica]:
            known.popitem(last=False)


class Affinity:
    """The rule of Ray Serve's ``PrefixCacheAffinityRouter``.

    While queues differ by no more than ``threshold``: whoever has most of the prompt, if that is a
    tenth of it; else whoever has least of anything. While they differ by more: the shorter queue
    of two at random.
    """

    threshold = 8

    def __init__(self, replicas: list[Replica], rng: random.Random) -> None:
        self._replicas, self._rng = replicas, rng
        self._index = PrefixIndex(replicas)

    def choose(self, now: float, session: int, blocks: list[bytes]) -> int:
        """Return the number of the replica."""
        loads = [replica.in_flight for replica in self._replicas]
        if max(loads) - min(loads) > self.threshold:
            two = self._rng.sample(range(len(loads)), 2)
            chosen = min(two, key=lambda each: loads[each])
        else:
            matches = self._index.matches(blocks)
            most = max(matches)
            wanted = matches if most >= 0.1 else [-size for size in self._index.sizes()]
            tied = [i for i, each in enumerate(wanted) if each == max(wanted)]
            chosen = min(tied, key=lambda each: (loads[each], self._rng.random()))
        self._index.sent(chosen, blocks)
        return chosen


class Scorers:
    """The rule of an Endpoint Picker: the sum of three scores, each from 0 to 1 by its weight.

    They are the share of the prompt's blocks that were sent there before, how short the queue is
    beside the others', and the free part of the KV cache. The last two are as ``/metrics`` said up
    to ``interval`` seconds ago.
    """

    weights = (3.0, 2.0, 2.0)
    interval = 0.05

    def __init__(self, replicas: list[Replica], rng: random.Random) -> None:
        self._replicas, self._rng = replicas, rng
        self._index = PrefixIndex(replicas)
        self._read = -math.inf
        self._queues: list[int] = []
        self._free: list[float] = []

    def choose(self, now: float, session: int, blocks: list[bytes]) -> int:
        """Return the number of the replica."""
        if now - self._read >= self.interval:
            self._read = now
            counts = [replica.counts() for replica in self._replicas]
            self._queues = [each["waiting"] for each in counts]
            self._free = [1 - each["pages_used"] / each["pages"] for each in counts]
        longest, shortest = max(self._queues), min(self._queues)
        spread = longest - shortest
        queues = [(longest - each) / spread if spread else 1.0 for each in self._queues]
        scored = zip(self._index.matches(blocks), queues, self._free, strict=True)
        total = [sum(w * s for w, s in zip(self.weights, each, strict=True)) for each in scored]
        chosen = _best(total, self._rng)
        self._index.sent(chosen, blocks)
        return chosen


class SlowScorers(Scorers):
    """The same, with figures of every half second."""

    interval = 0.5


def _best(scores: Tokens[float], rng: random.Random) -> int:
    best = max(scores)
    return rng.choice([i for i, score in enumerate(scores) if score == best])


Router = RoundRobin | LeastLoaded | Session | Affinity | Scorers
ROUTERS: dict[str, type[Router]] = {
    "round robin": RoundRobin,
    "fewest in flight": LeastLoaded,
    "hash of the conversation": Session,
    "Ray Serve's prefix affinity": Affinity,
    "an Endpoint Picker, figures of 50 ms": Scorers,
    "an Endpoint Picker, figures of 500 ms": SlowScorers,
}


@dataclass(frozen=True)
class Load:
    """Conversations that begin with one of a few system prompts.

    A turn's prompt is all that was said before and new words of the user. The next one comes some
    time after the answer.

    Attributes:
        rate: requests per second, over all replicas.
        systems: number of system prompts; the n-th is used 1/n as often as the first.
        system_tokens: of each of them.
        user_tokens: that a turn adds, on average.
        answer_tokens: of each answer.
        turns: of a conversation, on average.
        think_seconds: from an answer to the next turn, on average.
    """

    rate: float = 1000.0
    systems: int = 64
    system_tokens: int = 512
    user_tokens: int = 512
    answer_tokens: int = 64
    turns: float = 8.0
    think_seconds: float = 3.0


@dataclass
class Figures:
    """What was measured of the requests that arrived in the measured time."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    ttft: list[float] = field(default_factory=list)
    requests: list[int] = field(default_factory=list)
    unanswered: int = 0

    @property
    def hit_rate(self) -> float:
        """The share of prompt tokens that were found in a cache."""
        return self.cached_tokens / max(1, self.prompt_tokens)

    @property
    def imbalance(self) -> float:
        """The requests of the replica that got most, over the mean."""
        return max(self.requests) / mean(self.requests)

    def percentile(self, part: float) -> float:
        """Of the seconds to the first token."""
        ordered = sorted(self.ttft)
        return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


@dataclass(eq=False)
class Conversation:
    """A number of its own, what has been said so far, and how many turns are left."""

    session: int
    said: tuple[int, ...]
    left: int


class Simulation:
    """Replicas, a router and a load on one clock.

    Args:
        router: decides where each request goes.
        device: of each replica.
        replicas: how many there are.
        load: what arrives.
        seed: of all that is random.
    """

    def __init__(
        self, router: type[Router], device: Device, replicas: int, load: Load, seed: int = 0
    ) -> None:
        self._replicas = [Replica(device) for _ in range(replicas)]
        self._rng = random.Random(seed)
        self._router = router(self._replicas, random.Random(seed + 1))
        self._load, self._page_len = load, device.page_len
        self._systems = [self._text(load.system_tokens) for _ in range(load.systems)]
        self._popularity = [1 / (n + 1) for n in range(load.systems)]
        self._due: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = itertools.count()
        self._talks: dict[Sequence, tuple[Conversation, float]] = {}
        self._figures = Figures(requests=[0] * replicas)
        self._from = math.inf

    def run(self, warm: float, seconds: float) -> Figures:
        """Measure the requests that arrive within ``seconds`` after ``warm`` seconds."""
        self._from = warm
        self._at(0.0, self._begin)
        while self._due and self._due[0][0] < warm + seconds:
            now, _, act = heapq.heappop(self._due)
            act(now)
        self._figures.unanswered = sum(
            not sequence.output and at >= warm for sequence, (_, at) in self._talks.items()
        )
        return self._figures

    def _at(self, when: float, act: Callable[[float], None]) -> None:
        heapq.heappush(self._due, (when, next(self._order), act))

    def _text(self, length: int) -> tuple[int, ...]:
        return tuple(self._rng.randbytes(length))

    def _begin(self, now: float) -> None:
        """A conversation begins; the next one is due."""
        load = self._load
        self._at(now + self._rng.expovariate(load.rate / load.turns), self._begin)
        (system,) = self._rng.choices(self._systems, self._popularity)
        left = 1
        while self._rng.random() > 1 / load.turns:
            left += 1
        self._turn(Conversation(next(self._order), system, left), now)

    def _turn(self, talk: Conversation, now: float) -> None:
        """The user says something."""
        length = 1 + int(self._rng.expovariate(1 / self._load.user_tokens))
        talk.said += self._text(length)
        talk.left -= 1
        number = next(self._order)
        request = GenerationRequest(
            id=str(number), prompt=talk.said, max_tokens=self._load.answer_tokens
        )
        sequence = Sequence(request, lambda _: None, number)
        blocks = sequence.block_hashes(self._page_len, len(talk.said))
        chosen = self._router.choose(now, talk.session, blocks)
        self._talks[sequence] = talk, now
        if now >= self._from:
            self._figures.requests[chosen] += 1
        self._replicas[chosen].submit(sequence)
        self._step(chosen, now)

    def _step(self, number: int, now: float) -> None:
        """The replica begins its next step, if it has none."""
        if (seconds := self._replicas[number].begin()) is not None:
            self._at(now + seconds, lambda then: self._end(number, then))

    def _end(self, number: int, now: float) -> None:
        """The replica ends its step."""
        first, last = self._replicas[number].end(lambda: self._rng.randrange(VOCABULARY))
        for sequence in first:
            _, arrived = self._talks[sequence]
            if arrived >= self._from:
                self._figures.ttft.append(now - arrived)
                self._figures.prompt_tokens += len(sequence.request.prompt)
                self._figures.cached_tokens += sequence.cached_tokens or 0
        for sequence in last:
            talk, _ = self._talks.pop(sequence)
            talk.said += tuple(sequence.output)
            if talk.left:
                pause = self._rng.expovariate(1 / self._load.think_seconds)
                self._at(now + pause, lambda then, talk=talk: self._turn(talk, then))
        self._step(number, now)


def roofline(model: str, chip: str, quantization: str, page_len: int, slots: int) -> Device:
    """One chip of the planner with a model that it knows, by the planner's lower bounds."""
    import jax

    from inferneo_jax.config import EngineConfig, MeshShape
    from inferneo_jax.planner.budget import Budget, Wish, Work, bound, work_of
    from inferneo_jax.planner.chips import CHIPS, Topology
    from inferneo_jax.planner.known import KNOWN
    from inferneo_jax.runner.capacity import cache_budget
    from inferneo_jax.sharding.mesh import make_mesh

    mesh = MeshShape(data=1, model=1)
    fields = {"dtype": "bfloat16", "kernels": "xla", "kv_dtype": "bfloat16", "slots": slots}
    engine = EngineConfig(**fields, quantization=quantization, mesh=mesh)  # type: ignore[arg-type]
    wish = Wish(model=KNOWN[model], topology=Topology(CHIPS[chip], (1,)), engine=engine, context=1)
    budget = Budget(wish, make_mesh(mesh, jax.devices("cpu")[:1]))
    (none, one) = (work_of(budget.backend, c, budget.token_bytes, (1, 1)) for c in (0, 1))

    def seconds(**work: int) -> float:
        least = {"weights": 0, "live_kv": 0, "operations": 0}
        return bound(CHIPS[chip], Work(**least | work), 0.0, quantization)[0]

    memory = CHIPS[chip].memory_bytes
    kv = cache_budget("gpu", total=memory, free=memory - budget.weights)
    return Device(
        weights=seconds(weights=none.weights),
        position=seconds(live_kv=budget.token_bytes),
        token=seconds(operations=none.operations),
        pair=seconds(operations=one.operations - none.operations),
        pages=kv // (budget.token_bytes * page_len),
        page_len=page_len,
        slots=slots,
    )


def table(found: Iterator[tuple[str, Figures]]) -> Iterator[str]:
    """Lines of Markdown, as they come."""
    yield "| routed by | hit rate | TTFT p50 | TTFT p99 | requests, most / mean |"
    yield "|---|---|---|---|---|"
    for name, each in found:
        times = " | ".join(f"{1000 * each.percentile(part):,.0f} ms" for part in (0.5, 0.99))
        yield f"| {name} | {each.hit_rate:.0%} | {times} | {each.imbalance:.2f} |"


def main() -> None:
    """Print a table with a row for each rule."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="meta-llama/Llama-3.1-8B")
    parser.add_argument("--chip", default="h100")
    parser.add_argument("--quantization", default="none", choices=("none", "int8", "fp8"))
    parser.add_argument("--replicas", type=int, default=16)
    parser.add_argument("--page-len", type=int, default=16)
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--warm", type=float, default=20.0, help="seconds that are not measured")
    parser.add_argument("--seconds", type=float, default=20.0)
    for name, value in vars(Load()).items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=type(value), default=value)
    given = parser.parse_args()
    load = Load(**{name: getattr(given, name) for name in vars(Load())})
    device = roofline(given.model, given.chip, given.quantization, given.page_len, given.slots)
    print(
        f"{given.replicas} x {given.model} on {given.chip}: {device.pages * device.page_len:,} "
        f"tokens of KV cache each; a step takes {1000 * device.seconds([1024] * 64):.1f} ms for "
        f"64 rows of 1,024 tokens, {1000 * device.seconds([], [(0, 2048)]):.1f} ms for a prompt "
        "of 2,048\n"
    )
    found = (
        (name, Simulation(rule, device, given.replicas, load).run(given.warm, given.seconds))
        for name, rule in ROUTERS.items()
    )
    for line in table(found):
        print(line, flush=True)


if __name__ == "__main__":
    main()
