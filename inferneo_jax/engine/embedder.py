"""Computes embeddings in batches: token ids in, one vector per text out."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32, Int

from inferneo_jax import models
from inferneo_jax.config import EngineConfig
from inferneo_jax.errors import (
    ContextLengthError,
    EngineError,
    EngineFailedError,
    EngineStoppedError,
    OverloadedError,
    RequestError,
)
from inferneo_jax.platform.progress import Progress
from inferneo_jax.platform.watchdog import PATIENCE, Heartbeat
from inferneo_jax.runner.backends import EncoderBackend
from inferneo_jax.runner.compile_cache import ExecutableStore
from inferneo_jax.runner.manifest import compiled_ahead, encoder_facts
from inferneo_jax.scheduler.packing import Packer
from inferneo_jax.sharding import mesh as meshes
from inferneo_jax.weights.placement import flat, weight_shapes

log = logging.getLogger(__name__)

Vectors = Float32[np.ndarray, "texts embed"]

_ROUND_BATCHES = 4
"""Number of full batches that one request gets before the next one has its turn."""

_STOP_SECONDS = 0.1


@dataclass(eq=False, slots=True)
class _Job:
    """One request: its owner, its texts with the longest last, and the vectors computed so far."""

    texts: Sequence[Sequence[int]]
    order: list[int]
    vectors: Vectors
    owner: str
    future: Future[Vectors] = field(default_factory=Future)


class Embedder:
    """Runs one encoder on its own thread, with a short list of batch sizes.

    Within a batch, texts are packed one after another, so that no shape depends on their lengths.
    Each data-parallel rank has its own texts. Owners take turns, and so do the requests of each
    owner, so that neither many requests nor a large one delay the others.

    Args:
        backend: how the encoder runs.
        weights: of it; their shapes, if only its programs are wanted.
        config: of the engine.

    Attributes:
        facts: what its programs depend on.
    """

    def __init__(
        self,
        backend: EncoderBackend,
        weights: list[Array] | list[jax.ShapeDtypeStruct],
        config: EngineConfig,
    ) -> None:
        model, quantization, mesh = backend.model, backend.quantization, backend.mesh
        self._step_seconds = config.step_seconds
        self.vocab_size = model.vocab_size
        self.hidden_size = model.hidden_size
        self.max_tokens = min(config.max_len or model.max_tokens, model.max_tokens)
        self._weights = weights
        self._graphdef, self._treedef = models.graphdef(backend.padded, quantization)
        self._attention = backend.attention
        self._mesh = mesh
        self._packer = Packer(
            self.max_tokens, meshes.parts(mesh, "rows"), quantization.linear.padding_cost
        )
        self.facts = encoder_facts(backend, self._packer.sizes)
        compiled_ahead(config.compilation_cache, self.facts)  # says what does not fit
        self._store = ExecutableStore(config.compilation_cache, mesh, self.facts)
        self._weight_specs = [
            each.sharding.spec for each in flat(weight_shapes(backend.padded, mesh, quantization))
        ]
        self._compiled: dict[int, Any] = {}
        self._changed = threading.Condition()
        self._jobs: dict[str, deque[_Job]] = {}  # by owner; the first one's turn is next
        self._current: _Job | None = None
        self._stopped = self._hung = False
        self._thread = threading.Thread(target=self._run, name="embedder", daemon=True)

    def programs(self) -> dict[int, Callable[[], jax.stages.Lowered]]:
        """The program of every batch size, to be lowered; shapes of the weights are enough."""
        step = self._step()

        def lower(size: int) -> jax.stages.Lowered:
            batch = self._packer.empty(size)
            return step.lower(self._weights, batch.tokens, batch.cu_seqlens)

        return {size: partial(lower, size) for size in self._packer.sizes}

    def start(self, progress: Progress | None = None) -> None:
        """Compile every batch size, then start the thread that serves requests."""
        self._compiled = self._store.compile_all(self.programs(), progress)
        self._heartbeat = Heartbeat("embedder", self._warm_up(), self._give_up_round)
        self._thread.start()

    def _warm_up(self) -> float:
        """Run every batch size once; return the seconds after which a round counts as hanging."""
        slowest = 0.0
        for size, step in self._compiled.items():
            started = time.perf_counter()
            batch = self._packer.empty(size)
            batch.cu_seqlens[:, 1:] = size  # one text
            jax.block_until_ready(step(self._weights, batch.tokens, batch.cu_seqlens))
            slowest = max(slowest, time.perf_counter() - started)
        return max(self._step_seconds, PATIENCE * _ROUND_BATCHES * slowest)

    def embed(self, texts: Sequence[Sequence[int]], owner: str = "") -> Future[Vectors]:
        """Queue texts, given as token ids; the future's result is float32 ``[texts, embed]``.

        Thread-safe. Cancelling the future drops the texts that are not computed yet.

        Raises:
            RequestError: a text is empty or contains an unknown id.
            ContextLengthError: a text is too long.
            EngineStoppedError: ``stop`` was called.
            OverloadedError: a batch hangs.
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

    def ended(self) -> bool:
        """Whether ``stop`` was called. Thread-safe."""
        return self._stopped

    def stop(self) -> None:
        """End the thread, unless it hangs; queued requests fail with EngineStoppedError.

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

    def _step(self) -> Any:
        """The jitted step, in which the data-parallel ranks are split over the mesh."""
        split = meshes.spec("rows")
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
        self,
        weights: list[Array],
        tokens: Int[Array, "1 tokens"],
        cu_seqlens: Int[Array, "1 segments_and_one"],
    ) -> Float32[Array, "1 texts embed"]:
        model: Any = nnx.merge(self._graphdef, jax.tree.unflatten(self._treedef, weights))
        return model(tokens[0], cu_seqlens[0], self._attention)[None]

    def _run(self) -> None:
        """The main loop of the embedder's thread, which runs a round for each owner in turn."""
        while job := self._next_job():
            try:
                with self._heartbeat:
                    self._round(job)
            except Exception as error:  # noqa: BLE001 - an error fails only its own request
                self._hung = False
                if not job.future.done():  # a hanging request has failed already
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
                    self._jobs[owner] = jobs  # after the other owners
                if job.future.running() or job.future.set_running_or_notify_cancel():
                    self._current = job
                    return job

    def _give_up_round(self) -> None:
        """Fail every request while a round hangs; the heartbeat holds the thread in the round."""
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
        """Compute the longest remaining texts: dispatch several batches, then read the results."""
        batches = []
        for _ in range(_ROUND_BATCHES):
            if not job.order:
                break
            batch = self._packer.take(job.texts, job.order)
            step = self._compiled[batch.tokens.shape[1]]
            batches.append((batch.places, step(self._weights, batch.tokens, batch.cu_seqlens)))
        for places, found in batches:
            indices, ranks, texts = map(list, zip(*places, strict=True))
            job.vectors[indices] = np.asarray(found)[ranks, texts]
