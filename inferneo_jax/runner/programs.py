"""The compiled programs of a model on a mesh: what the runner runs, and what a plan looks at.

Each step is one ``jax.shard_map`` over the whole mesh, whatever its size: weights split by their
logical axes, the cache by page and KV head, slots and rows by data-parallel rank. All of this is
abstract, shapes and shardings only, so the same programs are compiled for hardware that is there
and for hardware that is not.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from inferneo_jax import models
from inferneo_jax.config import EngineConfig
from inferneo_jax.layers.cache import KVCache, PagedAttention
from inferneo_jax.layers.sampler import Sampler
from inferneo_jax.models.steps import SampleInputs, Steps, sample_bucket
from inferneo_jax.runner.backends import DecoderBackend
from inferneo_jax.runner.inputs import InputBuilder
from inferneo_jax.scheduler.chunked_prefill import PrefillShapes
from inferneo_jax.sharding import mesh as meshes
from inferneo_jax.weights.placement import flat, local_bytes, weight_shapes

Key = tuple[str, int, int]
"""A program: ``decode``, ``verify``, ``prefill``, ``admit`` or ``sample``, its rows on one
data-parallel rank and the tokens of each."""

MAX_STOP_IDS = 32
"""Most stop token ids of one request."""

_CPU_OVERHEAD, _OVERHEAD = 32, 256
"""Tokens whose products take as long as reading the weights does: 240 on a TPU v5e (197 TFLOP/s,
819 GB/s), 295 on an H100; a CPU was measured."""


@dataclass(frozen=True)
class Programs:
    """All programs of one decoder.

    Attributes:
        backend: how the model runs, in the quantization that its weights have.
        config: of the engine.
        max_len: tokens of the longest sequence.
        num_pages: of one data-parallel rank's cache, page 0 included.
    """

    backend: DecoderBackend
    config: EngineConfig
    max_len: int
    num_pages: int

    @property
    def mesh(self) -> Mesh:
        """The devices they run on."""
        return self.backend.mesh

    @property
    def attention(self) -> PagedAttention:
        """How the cache is stored and read."""
        return self.backend.attention

    @property
    def weights(self) -> list[jax.ShapeDtypeStruct]:
        """The shapes of the weights."""
        return flat(weight_shapes(self.backend.padded, self.mesh, self.backend.quantization))

    @property
    def page_len(self) -> int:
        """Tokens of one page."""
        return self.attention.page_len

    @property
    def dp_size(self) -> int:
        """Number of data-parallel ranks, each of which serves requests of its own."""
        return meshes.parts(self.mesh, "slots")

    @property
    def inputs(self) -> InputBuilder:
        """Builds what the host passes to the programs."""
        return InputBuilder(
            dp_size=self.dp_size,
            slots=self.config.slots // self.dp_size,
            max_len=self.max_len,
            max_pages=-(-self.max_len // self.page_len),
            vocab_size=self.backend.model.vocab_size,
            max_bias=self.config.max_logit_bias,
            max_stops=MAX_STOP_IDS,
        )

    @property
    def cache_bytes(self) -> int:
        """What one device holds of the cache."""
        return local_bytes(jax.tree.leaves(self.cache()))

    @property
    def row_buckets(self) -> list[int]:
        """Rows of one data-parallel rank for which decode is compiled, rising."""
        slots = self.config.slots // self.dp_size
        buckets = [b for b in self.config.row_buckets if b < slots]
        return [*buckets, next(b for b in self.config.row_buckets if b >= slots)]

    @property
    def draft_buckets(self) -> list[int]:
        """Rows of one data-parallel rank for which drafts can be verified, rising."""
        if self.config.speculation == "off":
            return []
        return [bucket for bucket in self.row_buckets if bucket <= self.config.draft_rows]

    @property
    def prefill_shapes(self) -> PrefillShapes:
        """For which prefill is compiled."""
        slots = self.config.slots // self.dp_size
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        overhead = _CPU_OVERHEAD if on_cpu else _OVERHEAD
        padding = self.backend.quantization.linear.padding_cost
        return PrefillShapes.of(self.config.prefill_chunks, slots, overhead, padding)

    def sampled_by(self, key: Key) -> Key:
        """The program that samples what another has computed."""
        kind, rows, tokens = key
        count = rows * tokens if kind == "verify" else rows
        return "sample", sample_bucket(count, self.config.row_buckets), 1

    def sample_keys(self) -> list[Key]:
        """The programs that follow another one in every step."""
        return sorted({self.sampled_by(key) for key in self.keys() if key[0] != "admit"})

    def keys(self) -> list[Key]:
        """Every program that the host calls with arguments of its own."""
        shapes = self.prefill_shapes
        tokens = self.config.draft_tokens + 1
        return [
            *(("decode", bucket, 1) for bucket in self.row_buckets),
            *(("verify", bucket, tokens) for bucket in self.draft_buckets),
            *(("prefill", rows, chunk) for rows, chunk in shapes.shapes),
            *(("admit", rows, 0) for rows in sorted({1, shapes.max_rows})),
        ]

    def empty_cache(self) -> Callable[[], KVCache]:
        """A function that makes the cache of all ranks, where it belongs."""
        return jax.jit(self._init_cache())

    def _init_cache(self) -> Callable[[], KVCache]:
        parts = meshes.parts(self.mesh, "kv_heads")
        own = dataclasses.replace(self.attention, kv_heads=self.attention.kv_heads // parts)
        return jax.shard_map(
            lambda: own.init(self.backend.padded, self.num_pages),
            mesh=self.mesh,
            in_specs=(),
            out_specs=meshes.spec("pages", "kv_heads"),
            check_vma=False,
        )

    def cache(self) -> KVCache:
        """The cache's shapes."""
        made: Any = jax.eval_shape(self._init_cache())
        return self._split(made, "pages", "kv_heads")

    def host_arguments(self, key: Key) -> tuple[Any, ...]:
        """What the host passes to a program when it has nothing to do, as numpy arrays."""
        kind, rows, tokens = key
        nothing = ((),) * self.dp_size
        if kind == "decode":
            return (self.inputs.decode(nothing, rows),)
        if kind == "verify":
            return (self.inputs.verify(nothing, rows, tokens - 1),)
        if kind == "prefill":
            return (self.inputs.prefill(nothing, rows),)
        return self.inputs.admit(nothing, rows)

    def busy_arguments(self, key: Key) -> tuple[Any, ...]:
        """As ``host_arguments``, but every row has all its tokens to compute, if no pages.

        To see how long a program takes: what padding costs is another matter.
        """
        kind, rows, tokens = key
        arguments = self.host_arguments(key)
        if kind == "admit":
            return arguments
        slots = np.minimum(np.arange(rows, dtype=np.int32), self.inputs.slots - 1)
        (nothing,) = arguments
        every = np.full_like(nothing.slots, tokens)
        busy = nothing._replace(slots=np.tile(slots, self.dp_size))
        if kind == "prefill":
            busy = busy._replace(length=every)
        if kind == "verify":
            busy = busy._replace(num_drafted=every - 1)
        return (busy,)

    def described(self) -> dict[str, Any]:
        """All that makes these programs what they are, in JSON's types: to compare processes."""
        return {
            "max_len": self.max_len,
            "num_pages": self.num_pages,
            "page_len": self.page_len,
            "attention": type(self.attention).__name__,
            "kv_dtype": str(self.attention.dtype),
            "weights": sorted({str(each.dtype) for each in self.weights}),
            "programs": [list(key) for key in self.keys()],
        }

    def place(self, arguments: Any, axis: str = "rows") -> Any:
        """Numpy arrays of all ranks as arguments of a program, split by their leading axis.

        Processes that hold only a part of the mesh must each be given the same ones.
        """
        if jax.process_count() == 1:
            return arguments  # the program splits them itself

        def put(array: np.ndarray[Any, np.dtype[Any]]) -> jax.Array:
            sharding = NamedSharding(self.mesh, meshes.spec(axis))
            return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

        return jax.tree.map(put, arguments)

    def lower(self, key: Key) -> Any:
        """A program lowered for the mesh's devices; ``compile()`` it."""
        kind, num_rows, chunk = key
        graphdef, treedef = models.graphdef(self.backend.padded, self.backend.quantization)
        sampler = Sampler(num_top=min(self.config.max_logprobs, self.backend.model.vocab_size))
        steps = Steps(
            graphdef,
            treedef,
            self.attention,
            sampler,
            self.backend.model.vocab_size,
            self.config.row_buckets,
        )
        weights = self.weights
        in_weights = [each.sharding.spec for each in weights]
        in_cache, in_rows = meshes.spec("pages", "kv_heads"), meshes.spec("rows")
        in_state, everywhere = meshes.spec("slots"), PartitionSpec()
        state = self._split(self.inputs.empty_state(), "slots")
        step: Callable[..., Any] = getattr(steps, kind)
        specs: tuple[Any, ...]
        out: Any
        arguments: tuple[Any, ...]
        donate: tuple[int, ...]
        if kind == "admit":
            arguments = state, *self._split(self.host_arguments(key), "rows")
            specs, out, donate = (in_state, in_rows, in_rows), in_state, (0,)
        elif kind == "sample":
            arguments = state, self._split(self._sample_inputs(num_rows), "rows")
            specs, out, donate = (in_state, in_rows), (in_state, everywhere), (0,)
        else:
            rows = self._split(self.host_arguments(key), "rows")
            arguments = weights, self.cache(), state.tokens, *rows
            specs = in_weights, in_cache, in_state, in_rows
            out, donate = (in_cache, in_state, in_rows), (1, 2)
            if kind == "prefill":
                step, out = partial(steps.prefill, chunk), (*out, everywhere)
        mapped = jax.shard_map(step, mesh=self.mesh, in_specs=specs, out_specs=out, check_vma=False)
        return jax.jit(mapped, donate_argnums=donate).lower(*arguments)

    def _sample_inputs(self, rows: int) -> SampleInputs:
        """Shapes of all ranks' rows to be sampled."""
        rows *= self.dp_size
        logits: Any = jax.ShapeDtypeStruct((rows, self.backend.model.vocab_size), np.float32)
        each: Any = jax.ShapeDtypeStruct((rows,), np.int32)
        return SampleInputs(logits, each, each, each)

    def _split(self, tree: Any, *axes: str) -> Any:
        """Shapes of a tree of arrays that are split by their leading logical axes."""
        sharding = NamedSharding(self.mesh, meshes.spec(*axes))
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )
