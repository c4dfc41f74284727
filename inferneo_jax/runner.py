"""Owns the weights, the cache and the compiled steps: the only one that touches the device."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from inferneo_jax import compiles, models
from inferneo_jax.cache import PagedAttention
from inferneo_jax.config import DecoderConfig, EngineConfig
from inferneo_jax.errors import ConfigError
from inferneo_jax.pages import NO_PAGE
from inferneo_jax.sampling import Sampler, SamplingRows
from inferneo_jax.scheduler import DecodeRow, PrefillChunk, StepPlan
from inferneo_jax.sequence import Sequence
from inferneo_jax.steps import DecodeRows, PrefillRows, Sampled, Steps, initial_state

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
        return jax.tree.map(np.asarray, (self.decode, self.prefill))  # type: ignore[no-any-return]


class Runner:
    """Runs planned steps of one decoder.

    Every shape it may meet is compiled by ``compile``; after that it calls executables only, so a
    shape that was not foreseen raises instead of compiling.
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
        self._max_pages = -(-self.max_len // config.page_len)
        self._row_buckets = [b for b in config.row_buckets if b < config.slots]
        self._row_buckets.append(next(b for b in config.row_buckets if b >= config.slots))
        self._compiled: dict[tuple[str, int], Any] = {}
        with compiles.expected():
            self._cache = attention.init(model, self.num_pages)
            self._state = initial_state(
                config.slots,
                self.max_len,
                model.vocab_size,
                config.max_logit_bias,
                MAX_STOP_IDS,
            )

    def compile(self, progress: Progress | None = None) -> None:
        """Compile every step for every shape, several at a time."""
        donated = (1, 2)
        jobs: dict[tuple[str, int], tuple[Callable[..., Any], tuple[int, ...], tuple[Any, ...]]]
        jobs = {}
        for rows in self._row_buckets:
            args = (self._weights, self._cache, self._state, self._decode_rows((), rows))
            jobs["decode", rows] = (self._steps.decode, donated, args)
        for size in self.config.prefill_chunks:
            args = (self._weights, self._cache, self._state, self._prefill_rows(None))
            jobs["prefill", size] = (partial(self._steps.prefill, size), donated, args)
        slot = (np.int32(0), np.zeros(self.max_len, np.int32), self._no_sampling())
        jobs["admit", 0] = (self._steps.admit, (0,), (self._state, *slot))

        def build(key: tuple[str, int]) -> None:
            step, donate, args = jobs[key]
            with compiles.expected():
                self._compiled[key] = jax.jit(step, donate_argnums=donate).lower(*args).compile()

        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            for done, _ in enumerate(pool.map(build, jobs)):
                if progress:
                    progress("compile", done + 1, len(jobs))

    def run(self, plan: StepPlan) -> PendingStep:
        """Dispatch a planned step and return at once."""
        if plan.admitted:
            self._admit(plan.admitted)
        decode = self._decode(plan.decode) if plan.decode else None
        prefill = self._prefill(plan.prefill) if plan.prefill else None
        return PendingStep(plan, decode, prefill)

    def _admit(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        tokens = np.zeros(self.max_len, np.int32)
        tokens[: sequence.num_known] = sequence.tokens
        sampling = SamplingRows.from_request(
            sequence.request, self.model.vocab_size, self.config.max_logit_bias, MAX_STOP_IDS
        )
        step = self._compiled["admit", 0]
        self._state = step(self._state, np.int32(sequence.slot), tokens, sampling)

    def _decode(self, rows: tuple[DecodeRow, ...]) -> Sampled:
        bucket = next(b for b in self._row_buckets if b >= len(rows))
        step = self._compiled["decode", bucket]
        return self._dispatch(step, self._decode_rows(rows, bucket))

    def _prefill(self, chunk: PrefillChunk) -> Sampled:
        size = next(c for c in self.config.prefill_chunks if c >= chunk.length)
        return self._dispatch(self._compiled["prefill", size], self._prefill_rows(chunk))

    def _dispatch(self, step: Any, rows: DecodeRows | PrefillRows) -> Sampled:
        self._cache, self._state, sampled = step(self._weights, self._cache, self._state, rows)
        for array in jax.tree.leaves(sampled):
            array.copy_to_host_async()
        return sampled  # type: ignore[no-any-return]

    def _decode_rows(self, rows: tuple[DecodeRow, ...], bucket: int) -> DecodeRows:
        slots = np.full(bucket, self.config.slots, np.int32)
        positions = np.zeros(bucket, np.int32)
        tables = np.full((bucket, self._max_pages), NO_PAGE, np.int32)
        for i, row in enumerate(rows):
            slots[i] = row.sequence.slot
            positions[i] = row.position
            tables[i, : len(row.sequence.pages)] = row.sequence.pages
        return DecodeRows(slots, positions, tables)

    def _prefill_rows(self, chunk: PrefillChunk | None) -> PrefillRows:
        tables = np.full((1, self._max_pages), NO_PAGE, np.int32)
        if chunk is None:
            slot, start, length, sample = self.config.slots, 0, 1, False
        else:
            assert chunk.sequence.slot is not None
            slot, start, length = chunk.sequence.slot, chunk.start, chunk.length
            sample = chunk.sample
            tables[0, : len(chunk.sequence.pages)] = chunk.sequence.pages
        numbers = (np.array([value], np.int32) for value in (slot, start, length))
        return PrefillRows(*numbers, np.array([sample]), tables)

    def _no_sampling(self) -> SamplingRows:
        rows = SamplingRows.empty(
            1, self.model.vocab_size, self.config.max_logit_bias, MAX_STOP_IDS
        )
        return SamplingRows(*(field[0] for field in rows))


def cache_size(model: DecoderConfig, config: EngineConfig) -> tuple[int, int]:
    """The longest sequence, in tokens, and the number of KV pages, page 0 included.

    Raises:
        ConfigError: the longest sequence does not fit the cache.
    """
    itemsize = _cache_dtype().itemsize
    token_bytes = 2 * model.num_layers * model.num_kv_heads * model.head_dim * itemsize
    longest = min(config.max_len or model.context_length, model.context_length)
    tokens = config.kv_tokens or min(config.slots * longest, _cache_budget() // token_bytes)
    max_len = longest if config.max_len else min(longest, tokens)
    pages = tokens // config.page_len
    if max_len > pages * config.page_len:
        raise ConfigError(
            f"max_len is {max_len} tokens but the KV cache holds {pages * config.page_len} "
            f"({token_bytes} bytes each); lower max_len or raise kv_tokens"
        )
    return max_len, pages + 1


def _cache_budget() -> int:
    """Bytes for the KV cache: most of what an accelerator has left, a sixteenth of a host's."""
    device = jax.devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats:
        return int(0.9 * stats["bytes_limit"]) - int(stats["bytes_in_use"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 16


def _cache_dtype() -> jnp.dtype:
    """XLA:CPU writes to a bfloat16 array by copying it whole; elsewhere that halves the memory."""
    return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
