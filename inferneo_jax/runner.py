"""Owns the weights, the cache and the compiled steps: the only one that touches the device."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from inferneo_jax import compiles, models
from inferneo_jax.cache import KVCache, PagedAttention
from inferneo_jax.config import DecoderConfig, EngineConfig
from inferneo_jax.errors import ConfigError
from inferneo_jax.heartbeat import PATIENCE
from inferneo_jax.memory import explained, free_memory, require, total_memory
from inferneo_jax.rows import RowBuilder
from inferneo_jax.sampling import Sampler
from inferneo_jax.scheduler import DecodeRow, PrefillChunk, StepPlan
from inferneo_jax.sequence import Sequence
from inferneo_jax.steps import DecodeRows, PrefillRows, Sampled, SlotState, Steps

Progress = Callable[[str, int, int], None]
"""Told the stage, how much of it is done, and how much there is."""

MAX_STOP_IDS = 32
"""Most stop token ids of one request."""


@dataclass(frozen=True, slots=True)
class PendingStep:
    """A dispatched step, whose results are on their way to the host."""

    plan: StepPlan
    decode: Sampled | None
    prefill: Sampled | None

    def wait(self) -> tuple[Sampled | None, Sampled | None]:
        """The results of decode and prefill as numpy arrays, once they are there."""
        return jax.tree.map(np.asarray, (self.decode, self.prefill))


class Runner:
    """Runs planned steps of one decoder.

    Every shape it may meet is compiled by ``compile``; after that it calls executables only, so a
    shape that was not foreseen raises instead of compiling.

    Attributes:
        step_seconds: a step that takes longer hangs; known after ``compile``.
    """

    def __init__(
        self,
        model: DecoderConfig,
        weights: list[Array],
        config: EngineConfig,
        dtype: jnp.dtype,
    ) -> None:
        self.model = model
        self.config = config
        self.max_len, self.num_pages = cache_size(model, config)
        graphdef, treedef = models.skeleton(model, dtype)
        attention = PagedAttention(
            kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            page_len=config.page_len,
            dtype=_cache_dtype(),
        )
        sampler = Sampler(num_top=min(config.max_logprobs, model.vocab_size))
        self._steps = Steps(graphdef, treedef, attention, sampler)
        self._weights = weights
        self._rows = RowBuilder(
            slots=config.slots,
            max_len=self.max_len,
            max_pages=-(-self.max_len // config.page_len),
            vocab_size=model.vocab_size,
            max_bias=config.max_logit_bias,
            max_stops=MAX_STOP_IDS,
        )
        self._row_buckets = [b for b in config.row_buckets if b < config.slots]
        self._row_buckets.append(next(b for b in config.row_buckets if b >= config.slots))
        self._compiled: dict[tuple[str, int], Any] = {}
        self.step_seconds = config.step_seconds
        self._cache: KVCache
        self._state: SlotState
        self.reset()

    def reset(self) -> None:
        """Allocate cache and slots anew, after a step failed with the old ones in its hands."""
        vars(self).pop("_cache", None)  # freed first: there may be no room for two
        tokens = self.num_pages * self.config.page_len
        what = f"the KV cache of {tokens} tokens"
        require(tokens * token_bytes(self.model), what)
        with compiles.expected(), explained(f"{what} was allocated"):
            self._cache = self._steps.attention.init(self.model, self.num_pages)
            self._state = jax.tree.map(jnp.asarray, self._rows.empty_state())

    def compile(self, progress: Progress | None = None) -> None:
        """Compile every step for every shape, several at a time."""
        held = (self._weights, self._cache, self._state)
        jobs: dict[tuple[str, int], tuple[Callable[..., Any], tuple[int, ...], tuple[Any, ...]]]
        jobs = {}
        for bucket in self._row_buckets:
            args = (*held, self._rows.decode((), bucket))
            jobs["decode", bucket] = (self._steps.decode, (1, 2), args)
        for size in self.config.prefill_chunks:
            step = partial(self._steps.prefill, size)
            jobs["prefill", size] = (step, (1, 2), (*held, self._rows.prefill(None)))
        row = jax.tree.map(lambda rows: rows[0], self._rows.empty_state())
        jobs["admit", 0] = (self._steps.admit, (0,), (self._state, np.int32(0), row))

        def build(key: tuple[str, int]) -> None:
            step, donate, args = jobs[key]
            with compiles.expected():
                self._compiled[key] = jax.jit(step, donate_argnums=donate).lower(*args).compile()

        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            for done, _ in enumerate(pool.map(build, jobs)):
                if progress:
                    progress("compile", done + 1, len(jobs))
        self._warm_up()

    def _warm_up(self) -> None:
        """Run every step once, on padding, and see how long the slowest takes."""
        slowest = 0.0
        for kind, size in self._compiled:
            started = time.perf_counter()
            if kind == "decode":
                self._dispatch(self._compiled[kind, size], self._rows.decode((), size))
            elif kind == "prefill":
                self._dispatch(self._compiled[kind, size], self._rows.prefill(None))
            jax.block_until_ready(self._cache)
            slowest = max(slowest, time.perf_counter() - started)
        self.step_seconds = max(self.config.step_seconds, PATIENCE * slowest)

    def run(self, plan: StepPlan) -> PendingStep:
        """Dispatch a planned step and return at once."""
        if plan.admitted:
            self._admit(plan.admitted)
        decode = self._decode(plan.decode) if plan.decode else None
        prefill = self._prefill(plan.prefill) if plan.prefill else None
        return PendingStep(plan, decode, prefill)

    def _admit(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        step = self._compiled["admit", 0]
        row = self._rows.slot_row(sequence)
        self._state = step(self._state, np.int32(sequence.slot), row)

    def _decode(self, rows: tuple[DecodeRow, ...]) -> Sampled:
        bucket = next(b for b in self._row_buckets if b >= len(rows))
        return self._dispatch(self._compiled["decode", bucket], self._rows.decode(rows, bucket))

    def _prefill(self, chunk: PrefillChunk) -> Sampled:
        size = next(c for c in self.config.prefill_chunks if c >= chunk.length)
        return self._dispatch(self._compiled["prefill", size], self._rows.prefill(chunk))

    def _dispatch(self, step: Any, rows: DecodeRows | PrefillRows) -> Sampled:
        self._cache, self._state, sampled = step(self._weights, self._cache, self._state, rows)
        for array in jax.tree.leaves(sampled):
            array.copy_to_host_async()
        return cast(Sampled, sampled)


def token_bytes(model: DecoderConfig) -> int:
    """What the KV cache of one token takes."""
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * _cache_dtype().itemsize


def cache_size(model: DecoderConfig, config: EngineConfig) -> tuple[int, int]:
    """The longest sequence, in tokens, and the number of KV pages, page 0 included.

    Raises:
        ConfigError: the longest sequence does not fit the cache.
    """
    each = token_bytes(model)
    longest = min(config.max_len or model.context_length, model.context_length)
    tokens = config.kv_tokens or min(config.slots * longest, _cache_budget() // each)
    max_len = longest if config.max_len else min(longest, tokens)
    pages = tokens // config.page_len
    if max_len > pages * config.page_len or max_len < 2:
        raise ConfigError(
            f"max_len is {max_len} tokens but the KV cache holds {pages * config.page_len} "
            f"({each} bytes each); lower max_len or raise kv_tokens"
        )
    return max_len, pages + 1


def _cache_budget() -> int:
    """Bytes for the KV cache: most of what an accelerator has left, a sixteenth of a host's."""
    if jax.default_backend() != "cpu":
        return int(0.9 * free_memory())
    return total_memory() // 16


def _cache_dtype() -> jnp.dtype:
    """XLA:CPU writes to a bfloat16 array by copying it whole; elsewhere that halves the memory."""
    return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
