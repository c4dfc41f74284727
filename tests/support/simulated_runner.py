"""A runner whose steps take known times on a clock of its own, so that latencies are exact.

The engine above it is the real one. As a device does, it runs one program after the other: a step
that is dispatched while another runs starts when that one ends.
"""

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from inferneo_jax.config import EngineConfig
from inferneo_jax.engine.engine import Engine
from inferneo_jax.models.steps import Sampled
from inferneo_jax.request import (
    GenerationOutput,
    GenerationRequest,
    RequestLimits,
    SamplingParams,
)
from inferneo_jax.runner.runner import StepResults
from inferneo_jax.scheduler.prefill import PrefillShapes, PrefillTimes, Shape
from inferneo_jax.scheduler.scheduler import SchedulerOutputs, num_decode_steps, prefill_shape

PADDING = 0.125
SHAPES = PrefillShapes.of((32, 128, 256), slots=16, overhead=32, padding=PADDING)
START_COSTS = (18.0, 32.0, 128.0, 256.0)
"""The costs that a real runner measures at start for these shapes."""


@dataclass
class Speed:
    """How long programs take, in seconds.

    Attributes:
        decode: of a decode step.
        fixed: of any prefill, beside decoding as well.
        token: of each of its prompt tokens.
        noise: a factor for each step's times.
    """

    decode: float = 0.012
    fixed: float = 0.006
    token: float = 0.0005
    noise: Callable[[], float] = lambda: 1.0

    def prefill(self, cost: float) -> float:
        """Of prefill of that cost in tokens, without noise."""
        return self.fixed + self.token * cost


@dataclass(frozen=True)
class SimulatedStep:
    """A dispatched step and the times at which its programs end."""

    runner: "SimulatedRunner"
    scheduled: SchedulerOutputs
    started: float
    decoded: float
    ended: float

    def wait(self) -> StepResults:
        """Let the time pass until the step has ended."""
        self.runner.pass_time(self.ended, last=self.runner.steps[-1] is self.scheduled)
        decodes = any(rank.decode for rank in self.scheduled)
        prefills = any(rank.prefill for rank in self.scheduled)
        ids: Any = np.ones(16 * len(self.scheduled), np.int32)
        steps = num_decode_steps(self.scheduled)
        decoded = np.tile(ids[:, None], steps) if steps > 1 else ids
        return StepResults(
            Sampled(decoded, None, None) if decodes else None,
            Sampled(ids, None, None) if prefills else None,
            decode_seconds=0.0 if prefills else self.decoded - self.started,
            mixed_seconds=self.ended - self.started if decodes and prefills else 0.0,
        )


@dataclass
class SimulatedRunner:
    """What the engine needs of a runner.

    Attributes:
        speed: how fast it is now; a test may change it.
        measured: how fast it was when it was measured at start.
        budget: milliseconds, as in ``EngineConfig``.
        now: seconds on its clock.
        steps: what was run, in order.
    """

    speed: Speed = field(default_factory=Speed)
    measured: Speed = field(default_factory=Speed)
    budget: float = 50.0
    dp_size: int = 1
    shapes: PrefillShapes = SHAPES
    now: float = 0.0
    steps: list[SchedulerOutputs] = field(default_factory=list)

    slots = 16
    num_pages = 40_000
    page_len = 16
    max_len = 30_000
    step_seconds = 60.0
    speculation = None
    decode_steps: int = 1

    def __post_init__(self) -> None:
        self.config = EngineConfig(itl_budget=self.budget)
        times = [(cost, self.measured.prefill(cost)) for cost in START_COSTS]
        self.prefill_times = PrefillTimes(times)
        self.decode_seconds = self.measured.decode
        self.limits = RequestLimits(
            vocab_size=100, max_len=self.max_len, max_logprobs=0, max_logit_bias=0, max_stop_ids=0
        )
        self._device_free = 0.0
        self._due: list[tuple[float, Callable[[], None]]] = []

    def has_prefill(self, shape: Shape) -> bool:
        return shape in self.shapes.shapes

    def at(self, when: float, act: Callable[[], None]) -> None:
        """Call ``act`` on the engine's thread once that time has come and a step has ended."""
        self._due.append((when, act))
        self._due.sort(key=lambda each: each[0])

    def begin(self) -> None:
        """Do what is due first; everything else is done on the engine's thread."""
        self._due.pop(0)[1]()

    def pass_time(self, until: float, *, last: bool) -> None:
        """Set the clock, and do what was due by then.

        After the ``last`` step the engine is idle until the next thing is due, which is done now.
        """
        self.now = max(self.now, until)
        if last and self._due:
            self._device_free = max(self._device_free, self._due[0][0])
        while self._due and self._due[0][0] <= max(self.now, self._device_free if last else 0):
            self._due.pop(0)[1]()

    def run(self, scheduled: SchedulerOutputs) -> SimulatedStep:
        """Dispatch a step."""
        self.steps.append(scheduled)
        started = decoded = max(self._device_free, self.now)
        if any(rank.decode for rank in scheduled):
            steps = num_decode_steps(scheduled)
            decoded += steps * self.speed.decode * self.speed.noise()
        ended = decoded
        if shape := prefill_shape(scheduled):
            tokens = max(sum(chunk.length for chunk in rank.prefill) for rank in scheduled)
            cost = self.shapes.cost(shape, tokens)
            ended += self.speed.prefill(cost) * self.speed.noise()
        self._device_free = ended
        return SimulatedStep(self, scheduled, started, decoded, ended)


class Stream:
    """A request, and the simulated times at which its tokens came."""

    def __init__(self, runner: SimulatedRunner, name: str, length: int, max_tokens: int) -> None:
        self.request = GenerationRequest(
            id=name,
            prompt=tuple(random.Random(name).choices(range(100), k=length)),
            max_tokens=max_tokens,
            sampling=SamplingParams(temperature=0.0),
        )
        self.submitted = 0.0
        self.times: list[float] = []
        self.ended = threading.Event()
        self._runner = runner

    def __call__(self, output: GenerationOutput) -> None:
        assert output.error is None
        self.times += [self._runner.now] * len(output.token_ids)
        if output.finish_reason:
            self.ended.set()

    @property
    def gaps(self) -> list[float]:
        """Seconds between successive tokens."""
        return np.diff(self.times).tolist()

    @property
    def ttft(self) -> float:
        """Seconds from its submission to its first token."""
        return self.times[0] - self.submitted


class Simulation:
    """An engine on a simulated runner. Requests are added before it runs, or by the clock."""

    def __init__(self, **fields: Any) -> None:
        self.runner = SimulatedRunner(**fields)
        self.streams: list[Stream] = []
        self.prompts: list[Stream] = []

    def stream(self, max_tokens: int, length: int = 8, at: float = 0.0) -> Stream:
        """A request that generates many tokens after a short prompt."""
        return self._add(self.streams, length, max_tokens, at)

    def prompt(self, length: int, at: float, max_tokens: int = 4) -> Stream:
        """A request with a long prompt."""
        return self._add(self.prompts, length, max_tokens, at)

    def _add(self, to: list[Stream], length: int, max_tokens: int, at: float) -> Stream:
        number = len(self.streams) + len(self.prompts)
        made = Stream(self.runner, f"{number}", length, max_tokens)
        to.append(made)

        def submit() -> None:
            made.submitted = at
            self._engine.submit(made.request, made)

        self.runner.at(at, submit)
        return made

    def run(self) -> "Simulation":
        """Until every request has ended."""
        runner: Any = self.runner
        self._engine = Engine(runner)
        self.runner.begin()
        for each in (*self.streams, *self.prompts):
            assert each.ended.wait(30)
        self.stats = self._engine.stats()
        self._engine.stop()
        return self

    @property
    def gaps(self) -> list[float]:
        """Of all streams."""
        return [gap for stream in self.streams for gap in stream.gaps]
