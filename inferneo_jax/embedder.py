"""Embeddings in batches: token ids in, one vector per text out."""

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float32, Int

from inferneo_jax import mesh as meshes
from inferneo_jax import models
from inferneo_jax.config import EncoderConfig, EngineConfig
from inferneo_jax.errors import (
    ContextLengthError,
    EngineError,
    EngineFailedError,
    EngineStoppedError,
    OverloadedError,
    RequestError,
)
from inferneo_jax.executables import ExecutableStore
from inferneo_jax.fitting import fit
from inferneo_jax.heartbeat import PATIENCE, Heartbeat
from inferneo_jax.layers.matrix import Formats
from inferneo_jax.weights.convert import Progress
from inferneo_jax.weights.placement import flat, weight_shapes

log = logging.getLogger(__name__)

Vectors = Float32[np.ndarray, "texts embed"]

_LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_BATCH_TOKENS = 1024
"""Tokens of a full batch: enough for a matrix product to run at full speed."""

_ROUND_BATCHES = 4
"""Full batches' worth of texts that one request gets before it is the next one's turn."""


_STOP_SECONDS = 0.1


@dataclass(eq=False, slots=True)
class _Job:
    """One request: its texts, longest last, and the vectors found so far; and whose it is."""

    texts: Sequence[Sequence[int]]
    order: list[int]
    vectors: Vectors
    owner: str
    future: Future[Vectors] = field(default_factory=Future)


class Embedder:
    """Runs one encoder on a thread of its own, over a closed list of batch shapes.

    Texts are sorted by length, so that a batch pads little; owners take turns, and the requests of
    each, so that neither many nor a large one hold up the others.
    """

    def __init__(
        self,
        model: EncoderConfig,
        weights: list[Array],
        formats: Formats,
        mesh: Mesh,
        max_len: int | None = None,
        step_seconds: float = EngineConfig.step_seconds,
        compilation_cache: str | None = None,
    ) -> None:
        self._step_seconds = step_seconds
        self.vocab_size = model.vocab_size
        self.hidden_size = model.hidden_size
        self.max_tokens = min(max_len or model.max_tokens, model.max_tokens)
        self._weights = weights
        fitted = fit(model, meshes.parts(mesh, "heads"))
        self._graphdef, self._treedef = models.skeleton(fitted, formats)
        self._mesh = mesh
        self._store = ExecutableStore(compilation_cache, mesh, fitted, formats)
        self._weight_specs = [
            each.sharding.spec for each in flat(weight_shapes(model, mesh, formats))
        ]
        self._compiled: dict[tuple[int, int], Any] = {}
        self._changed = threading.Condition()
        self._jobs: dict[str, deque[_Job]] = {}  # by owner, whose turn it is first
        self._current: _Job | None = None
        self._stopped = self._hung = False
        self._thread = threading.Thread(target=self._run, name="embedder", daemon=True)

    def start(self, progress: Progress | None = None) -> None:
        """Compile every batch shape, then begin to serve."""
        shapes = [
            (rows, length) for length in self._lengths() for rows in self._row_choices(length)
        ]

        def lower(rows: int, length: int) -> jax.stages.Lowered:
            batch = np.zeros((rows, length), np.int32), np.zeros(rows, np.int32)
            return self._step(rows).lower(self._weights, *batch)

        self._compiled = self._store.compile_all(
            {shape: partial(lower, *shape) for shape in shapes}, progress
        )
        self._heartbeat = Heartbeat("embedder", self._warm_up(), self._give_up_round)
        self._thread.start()

    def _warm_up(self) -> float:
        """Run every batch shape once; the seconds after which a round of batches hangs."""
        slowest = 0.0
        for (rows, length), step in self._compiled.items():
            started = time.perf_counter()
            padding = np.zeros((rows, length), np.int32), np.ones(rows, np.int32)
            jax.block_until_ready(step(self._weights, *padding))
            slowest = max(slowest, time.perf_counter() - started)
        return max(self._step_seconds, PATIENCE * _ROUND_BATCHES * slowest)

    def embed(self, texts: Sequence[Sequence[int]], owner: str = "") -> Future[Vectors]:
        """Queue texts, as token ids; the future gives float32 ``[texts, embed]``. Thread-safe.

        Cancelling the future drops what is not computed yet.

        Raises:
            RequestError: a text is empty or holds an unknown id; ContextLengthError: too long.
            EngineStoppedError: ``stop`` was called; OverloadedError: a batch hangs.
        """
        for i, text in enumerate(texts):
            if not text:
                raise RequestError(f"input {i} is empty; it needs at least one token", "input")
            if len(text) > self.max_tokens:
                raise ContextLengthError(
                    f"input {i} has {len(text)} tokens; this model reads at most "
                    f"{self.max_tokens}. Shorten it or set truncate_prompt_tokens",
                    "input",
                )
            for token in (min(text), max(text)):
                if not 0 <= token < self.vocab_size:
                    raise RequestError(
                        f"input {i} holds token id {token}; ids go from 0 to {self.vocab_size - 1}",
                        "input",
                    )
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        vectors = np.empty((len(texts), self.hidden_size), np.float32)
        job = _Job(texts, order, vectors, owner)
        with self._changed:
            if self._stopped:
                raise EngineStoppedError("the embedding model was stopped")
            if self._hung:
                raise OverloadedError("the embedding model does not answer; try again later")
            self._queue(job)
            self._changed.notify()
        return job.future

    def stuck(self) -> float:
        """Seconds by which the current round has exceeded its limit. Thread-safe."""
        return self._heartbeat.late()

    def stop(self) -> None:
        """End the thread, unless it hangs; what is queued fails with EngineStoppedError.

        Thread-safe.
        """
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread.ident is None:
            return
        self._thread.join(self._heartbeat.limit)
        while self._thread.is_alive() and not self._heartbeat.condemn():
            self._thread.join(_STOP_SECONDS)
        self._heartbeat.stop()

    def _step(self, rows: int) -> Any:
        """The jitted step: rows are split over the mesh where they divide, else each has all."""
        divides = rows % meshes.parts(self._mesh, "rows") == 0
        split = meshes.spec("rows") if divides else PartitionSpec()
        return jax.jit(
            jax.shard_map(
                self._forward,
                mesh=self._mesh,
                in_specs=(self._weight_specs, split, split),
                out_specs=split,
                check_vma=False,
            )
        )

    def _forward(
        self, weights: list[Array], tokens: Int[Array, "rows tokens"], lengths: Int[Array, " rows"]
    ) -> Float32[Array, "rows embed"]:
        model: Any = nnx.merge(self._graphdef, jax.tree.unflatten(self._treedef, weights))
        return model(tokens, lengths)

    def _lengths(self) -> list[int]:
        shorter = [length for length in _LENGTHS if length < self.max_tokens]
        return [*shorter, self.max_tokens]

    def _row_choices(self, length: int) -> list[int]:
        return sorted({1, max(1, _BATCH_TOKENS // length)})

    def _run(self) -> None:
        """The embedder's thread: a round of each owner in turn."""
        while job := self._next_job():
            try:
                with self._heartbeat:
                    self._round(job)
            except Exception as error:  # noqa: BLE001 - one request's fault is not the others'
                self._hung = False
                if not job.future.done():  # it is, if it hung
                    job.future.set_exception(error)
                continue
            if not job.order:
                job.future.set_result(job.vectors)
            else:
                with self._changed:
                    self._queue(job)
        self._fail_all(EngineStoppedError("the embedding model was stopped"))

    def _queue(self, job: _Job) -> None:
        self._jobs.setdefault(job.owner, deque()).append(job)

    def _next_job(self) -> _Job | None:
        with self._changed:
            while True:
                self._current = None
                self._changed.wait_for(lambda: self._stopped or self._jobs)
                if self._stopped:
                    return None
                owner = next(iter(self._jobs))
                jobs = self._jobs.pop(owner)
                job = jobs.popleft()
                if jobs:
                    self._jobs[owner] = jobs  # behind the other owners
                if job.future.running() or job.future.set_running_or_notify_cancel():
                    self._current = job
                    return job

    def _give_up_round(self) -> None:
        """Fail every request while a round hangs. The heartbeat holds the thread there."""
        with self._changed:
            self._hung, stopped = True, self._stopped
        log.error("a round of embeddings hangs")
        self._fail_all(
            EngineStoppedError("the embedding model was stopped")
            if stopped
            else EngineFailedError("the embedding model does not answer")
        )

    def _fail_all(self, error: EngineError) -> None:
        with self._changed:
            left = [job for jobs in self._jobs.values() for job in jobs]
            left += [self._current] if self._current else []
            self._jobs = {}
        for job in left:
            if job.future.running() or job.future.set_running_or_notify_cancel():
                job.future.set_exception(error)

    def _round(self, job: _Job) -> None:
        """Compute the longest texts that are left: dispatch all batches, then read them."""
        batches = []
        for indices, rows, length in self._cut(job):
            tokens = np.zeros((rows, length), np.int32)
            lengths = np.zeros(rows, np.int32)
            for row, index in enumerate(indices):
                text = job.texts[index]
                tokens[row, : len(text)] = text
                lengths[row] = len(text)
            step = self._compiled[rows, length]
            batches.append((indices, step(self._weights, tokens, lengths)))
        for indices, vectors in batches:
            job.vectors[indices] = np.asarray(vectors)[: len(indices)]

    def _cut(self, job: _Job) -> Iterator[tuple[list[int], int, int]]:
        """Take batches off the end of the job's order: text indices, rows, length."""
        for _ in range(_ROUND_BATCHES):
            if not job.order:
                return
            longest = len(job.texts[job.order[-1]])
            length = next(size for size in self._lengths() if size >= longest)
            rows = self._row_choices(length)[-1]
            # A few texts run faster one by one than padded to a full batch.
            few = len(job.order) <= rows // 4
            take = 1 if few else rows
            indices = job.order[-take:]
            del job.order[-take:]
            yield indices, take, length
