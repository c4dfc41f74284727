"""A tiny random model, and a collector of an engine's outputs."""

import dataclasses
import itertools
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from inferneo_jax import models
from inferneo_jax.config import DecoderConfig, EngineConfig, MeshShape
from inferneo_jax.distributed.process_group import ProcessGroup
from inferneo_jax.engine.engine import Engine
from inferneo_jax.layers.quantization import QuantizationConfig
from inferneo_jax.request import (
    GenerationOutput,
    GenerationRequest,
    SamplingParams,
    TokenLogprob,
)
from inferneo_jax.runner.backends import DecoderBackend, resolve_decoder
from inferneo_jax.runner.runner import Runner
from inferneo_jax.sharding.mesh import make_mesh, parts
from inferneo_jax.sharding.padding import pad_for_mesh
from inferneo_jax.weights.placement import place_weights
from tests.support.paths import COMPILED, GOLDEN
from tests.support.weights import ArrayWeight

TINY = DecoderConfig(
    vocab_size=97,
    hidden_size=24,
    mlp_size=32,
    num_layers=2,
    num_heads=6,
    num_kv_heads=3,
    head_dim=8,
    context_length=64,
    tie_embeddings=True,
)
ONE_DEVICE = MeshShape(data=1, model=1)
TINY_ENGINE = EngineConfig(
    slots=4,
    page_len=4,
    prefill_chunks=(4, 8),
    kv_tokens=160,
    row_buckets=(4,),
    speculation="off",
    mesh=ONE_DEVICE,
    compilation_cache=str(COMPILED),
)
EIGHT_SLOTS = dataclasses.replace(
    TINY_ENGINE, slots=8, kv_tokens=640, prefill_chunks=(8,), row_buckets=(8,)
)
"""Room for a request of each kind at once, on any mesh of eight devices."""
NATIVE = DecoderConfig.from_dict(TINY.to_dict() | {"head_dim": 16})
NATIVE_ENGINE = dataclasses.replace(TINY_ENGINE, page_len=16, kernels="native", dtype="float32")
"""What the CPU's own kernels can run: heads and pages of 16."""
GREEDY = SamplingParams(temperature=0.0)
MIXED: list[dict[str, Any]] = [
    {"sampling": GREEDY},
    {"sampling": SamplingParams(temperature=1.0, seed=1)},
    {"sampling": SamplingParams(temperature=0.8, top_p=0.7, top_k=9, min_p=0.02, seed=2)},
    {
        "sampling": SamplingParams(
            temperature=0.0,
            frequency_penalty=0.7,
            presence_penalty=0.3,
            repetition_penalty=1.3,
            logit_bias={3: 2.0, 90: -100.0},
        )
    },
    {"sampling": SamplingParams(temperature=1.3, seed=2**63 + 5), "logprobs": 3},
    {"sampling": GREEDY, "logprobs": 0, "prompt_logprobs": 2},
]
"""Fields of requests that use every feature of sampling."""
MakeEngine = Callable[..., Engine]
"""What the fixture ``tiny_engine`` gives: an engine with changes of its configuration."""
_numbers = itertools.count()


@cache
def tiny_weights(
    config: DecoderConfig = TINY,
    shape: MeshShape = ONE_DEVICE,
    quantization: QuantizationConfig = models.REFERENCE,
    noise: float = 0.0,
) -> list[jax.Array]:
    """Random weights, large enough that the next token depends on all before it.

    With ``noise`` they are those of a model that often agrees with the one without.
    """
    rng, other = np.random.default_rng(0), np.random.default_rng(1)
    weights = {}
    for name, spec in models.weight_specs(config).items():
        values = _random(rng, spec.shape)
        values += noise * _random(other, spec.shape)
        weights[name] = ArrayWeight(values.astype(np.float32))
    mesh = make_mesh(shape)
    padded = pad_for_mesh(config, parts(mesh, "heads"))
    return place_weights(weights, config, padded, mesh, quantization)


def tiny_backend(
    config: EngineConfig = TINY_ENGINE,
    model: DecoderConfig = TINY,
    quantization: QuantizationConfig = models.REFERENCE,
) -> DecoderBackend:
    """How a tiny model runs, on as many devices as its configuration's mesh has."""
    backend = resolve_decoder(model, config, make_mesh(config.mesh), {})
    return dataclasses.replace(backend, quantization=quantization)


def make_runner(
    config: EngineConfig = TINY_ENGINE,
    model: DecoderConfig = TINY,
    quantization: QuantizationConfig = models.REFERENCE,
    processes: ProcessGroup | None = None,
    draft: "TinyDraft | None" = None,
) -> Runner:
    """A runner of a tiny model, not compiled."""
    runner = Runner(
        tiny_backend(config, model, quantization), config, processes, draft and draft.backend
    )
    runner.place(tiny_weights(model, config.mesh, quantization), draft.weights if draft else [])
    return runner


def compiled(runner: Runner) -> Runner:
    """The same runner with all its programs compiled, so that what it does depends on no time."""
    runner.compile()
    runner.warm_up()
    runner.compile_rest()
    return runner


class TinyDraft(NamedTuple):
    """A draft model: how it runs, and its weights."""

    backend: DecoderBackend
    weights: list[jax.Array]


def tiny_draft(config: EngineConfig, model: DecoderConfig = TINY, noise: float = 0.0) -> TinyDraft:
    """A draft model: the tiny model itself without ``noise``."""
    backend = tiny_backend(config, model)
    return TinyDraft(backend, tiny_weights(model, config.mesh, backend.quantization, noise))


@contextmanager
def running_engine(
    config: EngineConfig,
    model: DecoderConfig = TINY,
    quantization: QuantizationConfig = models.REFERENCE,
) -> Iterator[Engine]:
    """An engine with programs of its own; it must end with every slot and page free."""
    engine = Engine(compiled(make_runner(config, model, quantization)))
    try:
        yield engine
        stats = engine.stats()
        assert (stats.slots, stats.slots_used, stats.pages_used) == (config.slots, 0, 0)
        assert stats.compiles_after_ready == 0
    finally:
        engine.stop()


def _random(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.normal(size=shape) * (0.5 if len(shape) > 1 else 1.0)


def golden(name: str) -> list[dict[str, Any]]:
    """The cases of a golden file."""
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))["cases"]


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """Random token ids of the tiny model."""
    return tuple(np.random.default_rng(seed).integers(0, TINY.vocab_size, length).tolist())


class Collected:
    """A sink that keeps a request's outputs, and lets a test wait for them."""

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self.outputs: list[GenerationOutput] = []
        self.ended_at = math.inf
        self._changed = threading.Condition()

    def __call__(self, output: GenerationOutput) -> None:
        with self._changed:
            self.outputs.append(output)
            self.ended_at = time.monotonic() if output.finish_reason else self.ended_at
            self._changed.notify_all()

    def wait_for_tokens(self, count: int) -> None:
        """Return once that many tokens are there, or it has ended."""
        with self._changed:
            enough = lambda: len(self._tokens()) >= count or self._ended()  # noqa: E731
            assert self._changed.wait_for(enough, timeout=120)

    def wait(self, seconds: float = 300) -> "Collected":
        """Return itself once its last output is there."""
        with self._changed:
            assert self._changed.wait_for(self._ended, seconds), "no last output came"
        return self

    def count(self) -> int:
        """Tokens so far."""
        with self._changed:
            return len(self._tokens())

    @property
    def tokens(self) -> list[int]:
        return self.wait()._tokens()

    @property
    def logprobs(self) -> list[TokenLogprob]:
        return [entry for output in self.wait().outputs for entry in output.logprobs or ()]

    @property
    def finish_reason(self) -> str | None:
        return self.wait().outputs[-1].finish_reason

    def _tokens(self) -> list[int]:
        return [token for output in self.outputs for token in output.token_ids]

    def _ended(self) -> bool:
        return bool(self.outputs) and self.outputs[-1].finish_reason is not None


def submit(engine: Engine, ids: tuple[int, ...], max_tokens: int = 12, **fields: Any) -> Collected:
    """Submit a request, greedy unless it says otherwise."""
    fields.setdefault("sampling", GREEDY)
    fields.setdefault("id", f"request-{next(_numbers)}")
    collected = Collected(GenerationRequest(prompt=ids, max_tokens=max_tokens, **fields))
    engine.submit(collected.request, collected)
    return collected


def mixed(engine: Engine, *, together: bool = True) -> list[Collected]:
    """Outputs of a request of each kind, all at once or one after the other."""
    found: list[Collected] = []
    for i, fields in enumerate(MIXED):
        found.append(submit(engine, prompt(9 + i, seed=i), **fields))
        if not together:
            found[-1].wait()
    return [each.wait() for each in found]


def close_when_preempted(roomy: Engine, cramped: Engine) -> None:
    """Requests that give way to each other are answered as those that have room."""
    prompts = [prompt(8 + i, seed=i) for i in range(4)]
    fields = [{"sampling": SamplingParams(seed=i), "logprobs": 1} for i in range(4)]
    expected = [submit(roomy, p, 30, **f).wait() for p, f in zip(prompts, fields, strict=True)]
    close_all(expected, [submit(cramped, p, 30, **f) for p, f in zip(prompts, fields, strict=True)])
    assert cramped.stats().preemptions > 0


def close_all(some: list[Collected], others: list[Collected]) -> None:
    """Each of them equals its counterpart."""
    for a, b in zip(some, others, strict=True):
        close(a, b)


def close(a: Collected, b: Collected) -> None:
    """Equal tokens, and log probabilities as equal as float32 sums in another order allow."""
    assert a.tokens == b.tokens
    assert a.finish_reason == b.finish_reason
    for x, y in zip(a.logprobs, b.logprobs, strict=True):
        assert x.logprob == pytest.approx(y.logprob, abs=1e-4)
        assert [i for i, _ in x.top] == [i for i, _ in y.top]
