"""A tiny random model, and a way to gather what an engine sends."""

import itertools
import json
import math
import threading
import time
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from inferneo_jax import models
from inferneo_jax.config import DecoderConfig, EngineConfig
from inferneo_jax.engine import Engine
from inferneo_jax.request import (
    GenerationOutput,
    GenerationRequest,
    SamplingParams,
    TokenLogprob,
)

GOLDEN = Path(__file__).parent / "golden"

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
TINY_ENGINE = EngineConfig(
    slots=4, page_len=4, prefill_chunks=(4, 8), kv_tokens=160, row_buckets=(4,)
)
GREEDY = SamplingParams(temperature=0.0)
_numbers = itertools.count()


@cache
def tiny_weights() -> list[jax.Array]:
    """Random weights, large enough that the next token depends on all before it."""
    rng = np.random.default_rng(0)
    weights = {
        name: jnp.asarray(_random(rng, spec.shape), spec.dtype)
        for name, spec in models.declare(TINY).items()
    }
    return models.weight_list(TINY, weights)


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

    def wait(self) -> "Collected":
        """Return itself once its last output is there."""
        with self._changed:
            assert self._changed.wait_for(self._ended, timeout=300), "no last output came"
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
