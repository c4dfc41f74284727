"""The compiled programs of a model on a mesh: what the runner runs, and what a plan looks at.

Each step is one ``jax.shard_map`` over the whole mesh, whatever its size: weights split by their
logical axes, the cache by page and KV head, slots and rows by data-parallel rank. All of this is
abstract, shapes and shardings only, so the same programs are compiled for hardware that is there
and for hardware that is not.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from inferneo_jax import models
from inferneo_jax.config import BatchSizes, EngineConfig
from inferneo_jax.layers.cache import KVCache, PagedAttention, read_pages, write_pages
from inferneo_jax.layers.sampler import Sampler, Sampling
from inferneo_jax.models.steps import PromptStates, SampleInputs, SlotState, Steps, sample_bucket
from inferneo_jax.runner.backends import DecoderBackend
from inferneo_jax.runner.inputs import InputBuilder
from inferneo_jax.scheduler.prefill import PrefillShapes, Shape
from inferneo_jax.sharding import mesh as meshes
from inferneo_jax.weights.placement import flat, local_bytes, weight_shapes


@dataclass(frozen=True, order=True, slots=True)
class Decode:
    """Computes the next token of ``rows`` rows; all rows are those of one data-parallel rank."""

    rows: int


@dataclass(frozen=True, order=True, slots=True)
class Verify:
    """Computes ``rows`` rows of ``tokens`` tokens each: the newest one and its draft."""

    rows: int
    tokens: int


@dataclass(frozen=True, order=True, slots=True)
class Prefill:
    """Computes up to ``tokens`` prompt tokens of each of ``rows`` rows."""

    rows: int
    tokens: int


@dataclass(frozen=True, order=True, slots=True)
class Mixed:
    """Computes the next token of ``rows`` rows, and in the same pass what ``prefill`` computes."""

    rows: int
    prefill: Prefill


@dataclass(frozen=True, order=True, slots=True)
class Draft:
    """Computes the next token of the drafts of ``rows`` rows with the draft model."""

    rows: int


@dataclass(frozen=True, order=True, slots=True)
class Fill:
    """Computes the draft model's keys and values of up to ``tokens`` tokens of ``rows`` rows."""

    rows: int
    tokens: int


@dataclass(frozen=True, order=True, slots=True)
class Admit:
    """Writes ``rows`` requests into their slots."""

    rows: int


@dataclass(frozen=True, order=True, slots=True)
class Sample:
    """Samples tokens from the logits of ``rows`` rows, after one of the forward passes.

    Every program is compiled for each kind, and the host runs the least that the rows need.
    """

    rows: int
    kind: Sampling


@dataclass(frozen=True, order=True, slots=True)
class Constrain:
    """Removes the tokens that grammars do not allow from the logits of ``rows`` rows.

    Where a step has such rows, it runs after the forward pass and before ``Sample``: which tokens
    are allowed is only known once those of the step before are.
    """

    rows: int


@dataclass(frozen=True, order=True, slots=True)
class Score:
    """Computes log probabilities of what was sampled from the logits of ``rows`` rows."""

    rows: int


@dataclass(frozen=True, order=True, slots=True)
class ScorePrompt:
    """Scores the tokens of prompts at ``positions`` positions, after a prefill of as many."""

    positions: int


@dataclass(frozen=True, order=True, slots=True)
class EmptyCache:
    """Makes the KV cache of the model, or of the draft model."""

    draft: bool


@dataclass(frozen=True, order=True, slots=True)
class ReadPages:
    """Copies ``pages`` pages out of the model's cache, for another engine."""

    pages: int


@dataclass(frozen=True, order=True, slots=True)
class WritePages:
    """Puts the contents of ``pages`` pages of another engine into the model's cache."""

    pages: int


Forward = Decode | Verify | Prefill | Mixed | Draft
"""Programs that leave logits, from which tokens are sampled."""
Called = Forward | Fill | Admit | Constrain
"""Programs that the host calls with arguments of its own."""
Following = Sample | Score | ScorePrompt | Constrain
"""Programs that are given what a forward pass leaves on the device."""
Handover = ReadPages | WritePages
"""Programs of engines that hand keys and values over to each other; other engines have none."""
Key = Called | Following | EmptyCache | Handover
"""Identifies a compiled program."""


_VOCABULARY = {"model.model.vocab_size", "model.padded.vocab_size"}
_SLOTS = {"batch.slots", "max_len"}
_PARAMETERS = _SLOTS | {"settings.max_logit_bias"}
_PAGED = _SLOTS | {"batch.row_buckets", "num_pages"}


def depends(key: Key, fact: str) -> bool:
    """Whether a program depends on a fact of those of ``decoder_facts`` and ``Programs.sizes``.

    By this, starts with other settings load what they have in common, and so do models of one
    vocabulary. Most settings only decide which programs there are, or how backends are resolved,
    and these have facts of their own.
    """
    whose = fact.partition(".")[0]
    if whose not in ("model", "draft_model", "settings", "batch") and fact not in _PAGED:
        return True
    match key:
        case Sample():
            return fact in _VOCABULARY | _PARAMETERS
        case Constrain():
            return fact in _VOCABULARY
        case Score():
            return fact in _VOCABULARY | {"settings.max_logprobs"}
        case Admit():
            return fact in _PARAMETERS | {"model.attention.page_len"}
        case ScorePrompt():
            return whose == "model" or fact == "settings.max_logprobs"
        case Draft() | Fill() | EmptyCache(draft=True):
            return whose == "draft_model" or fact in _VOCABULARY | _PAGED
    return whose == "model" or fact in _PAGED


def keeps(mesh: Mesh, key: Key) -> bool:
    """Whether a program may be kept on disk.

    XLA:CPU runs independent collectives of a program that it has read from a file in any order,
    and takes one for the other, as they are all of one channel (seen with jaxlib 0.10.2). The
    collectives of forward passes follow from each other; those of sampling and scoring do not.
    """
    several = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"
    return not (several and isinstance(key, Sample | Score | ScorePrompt))


def num_tokens(key: Forward | Fill) -> int:
    """Tokens that a forward pass computes on one data-parallel rank."""
    match key:
        case Decode(rows) | Draft(rows):
            return rows
        case Mixed(rows, prefill):
            return rows + num_tokens(prefill)
        case Verify(rows, tokens) | Prefill(rows, tokens) | Fill(rows, tokens):
            return rows * tokens


def prefill_of(key: Key) -> Prefill | None:
    """What a program prefills, alone or beside decode rows; None: it prefills nothing."""
    return key.prefill if isinstance(key, Mixed) else key if isinstance(key, Prefill) else None


def num_sampled(key: Forward) -> int:
    """Rows of logits that a forward pass leaves to be sampled on one data-parallel rank."""
    return key.rows * key.tokens if isinstance(key, Verify) else key.rows


def dispatch_forward(
    program: Any, weights: Any, cache: Any, state: SlotState, inputs: Any
) -> tuple[Any, ...]:
    """Dispatch a compiled forward pass.

    Args:
        program: the forward pass.
        weights: of its model.
        cache: of its model. It is consumed.
        state: of all slots. Its tokens and block tables are consumed.
        inputs: of the forward pass.

    Returns:
        The new cache and state, what to sample from, and what else the forward pass returns, all
        on the device.
    """
    tokens, block_tables, sampling = state
    cache, tokens, block_tables, *rest = program(weights, cache, tokens, block_tables, inputs)
    return cache, SlotState(tokens, block_tables, sampling), *rest


def dispatch_sample(
    sample: Any, state: SlotState, to_sample: SampleInputs
) -> tuple[SlotState, jax.Array]:
    """Dispatch the sampling of what a forward pass has computed.

    Args:
        sample: a ``Sample`` program for as many rows.
        state: of all slots. Its tokens are consumed.
        to_sample: what to sample from.

    Returns:
        The new state, and the sampled ids, on the device.
    """
    tokens, ids = sample(state.tokens, state.sampling, to_sample)
    return state._replace(tokens=tokens), ids


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
        draft: how the draft model runs, on the same mesh; None: there is none. Its cache has the
            same pages, and so the same block tables.
    """

    backend: DecoderBackend
    config: EngineConfig
    max_len: int
    num_pages: int
    draft: DecoderBackend | None = None

    @property
    def mesh(self) -> Mesh:
        """The devices they run on."""
        return self.backend.mesh

    @property
    def attention(self) -> PagedAttention:
        """How the cache is stored and read."""
        return self.backend.attention

    @cached_property
    def batch(self) -> BatchSizes:
        """What is computed at once, on all data-parallel ranks."""
        return self.config.batch_sizes(self.backend.platform)

    @cached_property
    def weights(self) -> list[jax.ShapeDtypeStruct]:
        """The shapes of the weights."""
        return flat(weight_shapes(self.backend.padded, self.mesh, self.backend.quantization))

    @cached_property
    def drafter(self) -> "Programs | None":
        """The programs of the draft model, of which only ``Draft`` and ``Fill`` are its own."""
        return dataclasses.replace(self, backend=self.draft, draft=None) if self.draft else None

    @property
    def page_len(self) -> int:
        """Tokens of one page."""
        return self.attention.page_len

    @property
    def sizes(self) -> dict[str, str]:
        """What the programs depend on beside the backends and the configuration, by name."""
        return {"max_len": str(self.max_len), "num_pages": str(self.num_pages)}

    @property
    def dp_size(self) -> int:
        """Number of data-parallel ranks, each of which serves requests of its own."""
        return meshes.parts(self.mesh, "slots")

    @property
    def slots(self) -> int:
        """Number of slots of one data-parallel rank."""
        return self.batch.slots // self.dp_size

    @property
    def mask_words(self) -> int:
        """Words of 32 bits that have one for each token of the vocabulary, padding included."""
        return -(-self.backend.padded.vocab_size // 32)

    @cached_property
    def inputs(self) -> InputBuilder:
        """Builds what the host passes to the programs."""
        return InputBuilder(
            dp_size=self.dp_size,
            slots=self.slots,
            max_len=self.max_len,
            page_len=self.page_len,
            vocab_size=self.backend.model.vocab_size,
            mask_words=self.mask_words,
            max_bias=self.config.max_logit_bias,
            max_stops=MAX_STOP_IDS,
        )

    @property
    def cache_bytes(self) -> int:
        """What one device holds of the model's own cache."""
        return local_bytes(jax.tree.leaves(self.cache()))

    @property
    def token_bytes(self) -> int:
        """What one device holds of a token in the caches of the model and the draft model."""
        both = self.cache_bytes + (self.drafter.cache_bytes if self.drafter else 0)
        return both // (self.num_pages * self.page_len)

    @property
    def state_bytes(self) -> int:
        """What one device holds of the state of all slots."""
        return local_bytes(jax.tree.leaves(self.state()))

    @property
    def row_buckets(self) -> list[int]:
        """Rows of one data-parallel rank for which decode is compiled, rising."""
        buckets = self.batch.row_buckets
        return [*(b for b in buckets if b < self.slots), sample_bucket(self.slots, buckets)]

    @property
    def draft_buckets(self) -> list[int]:
        """Rows of one data-parallel rank for which drafts can be verified, rising."""
        if self.config.speculation == "off":
            return []
        return [bucket for bucket in self.row_buckets if bucket <= self.config.draft_rows]

    @property
    def prefill_shapes(self) -> PrefillShapes:
        """For which prefill is compiled."""
        overhead = _CPU_OVERHEAD if self.backend.platform == "cpu" else _OVERHEAD
        padding = self.backend.quantization.linear.padding_cost
        return PrefillShapes.of(self.batch.prefill_chunks, self.slots, overhead, padding)

    def sampled_rows(self, key: Forward) -> int:
        """The rows of the programs that sample and score what a forward pass has computed."""
        return sample_bucket(num_sampled(key), self.batch.row_buckets)

    def scored_by(self, key: Prefill) -> ScorePrompt:
        """The program that scores the prompts of a prefill."""
        return ScorePrompt(num_tokens(key))

    def score_keys(self) -> list[ScorePrompt]:
        """The programs that follow a prefill where a request wants its prompt's scores."""
        return sorted({self.scored_by(Prefill(*each)) for each in self.prefill_shapes.shapes})

    def sample_keys(self) -> list[Sample | Score]:
        """The programs that follow a forward pass."""
        rows = self._rows_to_sample()
        kinds = sorted(Sampling, reverse=True)
        return [*(Sample(each, kind) for kind in kinds for each in rows), *map(Score, rows)]

    def constrain_keys(self) -> list[Constrain]:
        """The programs that apply grammars between a forward pass and sampling."""
        return [Constrain(rows) for rows in self._rows_to_sample()]

    def _rows_to_sample(self) -> list[int]:
        return sorted({self.sampled_rows(key) for key in self.forward_keys()})

    def forward_keys(self) -> list[Forward]:
        """The forward passes, in the same order in all processes."""
        tokens = self.config.draft_tokens + 1
        return [
            *(Decode(bucket) for bucket in self.row_buckets),
            *(Verify(bucket, tokens) for bucket in self.draft_buckets),
            *(Draft(bucket) for bucket in self.draft_buckets if self.draft),
            *(Prefill(rows, chunk) for rows, chunk in self.prefill_shapes.shapes),
            *(self.mixed(shape) for shape in self.prefill_shapes.shapes),
        ]

    def mixed(self, shape: Shape) -> Mixed:
        """The program that prefills a shape beside the decode rows, however many there are."""
        return Mixed(self.row_buckets[-1], Prefill(*shape))

    def fill_keys(self) -> list[Fill]:
        """The programs that compute what the draft model lacks, by rising numbers of tokens.

        The first is for one token of each row, the others for many tokens of one row.
        """
        if not self.draft or not self.draft_buckets:
            return []
        chunks = [Fill(1, chunk) for chunk in self.batch.prefill_chunks]
        return [Fill(self.draft_buckets[-1], 1), *chunks]

    def keys(self) -> list[Called]:
        """Every program that the host calls with arguments of its own."""
        admitted = [Admit(rows) for rows in sorted({1, self.prefill_shapes.max_rows})]
        return [*self.forward_keys(), *self.fill_keys(), *admitted, *self.constrain_keys()]

    def first_keys(self) -> list[Key]:
        """The few programs that all work can be done with, and those that are timed at start.

        The largest ones stand in for all others, and prefill of one row for that of several. So
        does the kind of sampling that does all; most requests need the least.
        """
        chunks = [chunk for rows, chunk in self.prefill_shapes.shapes if rows == 1]
        forward: list[Forward] = [Decode(self.row_buckets[-1])]
        forward += [Prefill(1, chunk) for chunk in {min(chunks), max(chunks)}]
        for bucket in self.draft_buckets[-1:]:
            forward += [Decode(bucket), Verify(bucket, self.config.draft_tokens + 1)]
            forward += [Draft(bucket)] if self.draft else []
        rows = {self.sampled_rows(key) for key in forward}
        sampling = {Sample(each, kind) for each in rows for kind in (min(Sampling), max(Sampling))}
        scored_by = {self.scored_by(key) for key in forward if isinstance(key, Prefill)}
        scoring = {*map(Score, rows), *scored_by}
        needed = {*forward, *sampling, *scoring, *map(Constrain, rows), *self.fill_keys()}
        always = (Admit, EmptyCache)
        return [key for key in self.all_keys() if key in needed or isinstance(key, always)]

    def following_keys(self) -> list[Following]:
        """The programs that follow a forward pass, in the same order in all processes."""
        return [*self.sample_keys(), *self.constrain_keys(), *self.score_keys()]

    def all_keys(self) -> list[Key]:
        """All programs, those that take longest to compile first."""
        return [*self.sample_keys(), *self.keys(), *self.score_keys(), *self.cache_keys()]

    def cache_keys(self) -> list[EmptyCache]:
        """The programs that make the caches."""
        return [EmptyCache(draft=False), *([EmptyCache(draft=True)] if self.draft else [])]

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

    def state(self) -> SlotState:
        """The shapes of the state of all slots."""
        # One slot's arrays tell them: those of all slots may be large.
        one = dataclasses.replace(self.inputs, dp_size=1, slots=1).empty_state()
        slots = self.batch.slots
        every = jax.tree.map(lambda x: jax.ShapeDtypeStruct((slots, *x.shape[1:]), x.dtype), one)
        return self._split(every, "slots")

    def host_arguments(self, key: Called) -> tuple[Any, ...]:
        """What the host passes to a program when it has nothing to do, as numpy arrays."""
        nothing = ((),) * self.dp_size
        match key:
            case Decode(rows) | Draft(rows):
                return tuple(self.inputs.decode(nothing, rows))
            case Verify(rows, tokens):
                return (self.inputs.verify(nothing, rows, tokens - 1),)
            case Prefill(rows, _) | Fill(rows, _):
                return (self.inputs.prefill(nothing, rows),)
            case Mixed(rows, prefill):
                return (self.inputs.mixed(nothing, rows, nothing, prefill.rows),)
            case Admit(rows):
                return self.inputs.admit(nothing, rows)
            case Constrain(rows):
                return (self.inputs.masks(rows, []),)

    def busy_arguments(
        self, key: Called, tokens: int | None = None, rows: int | None = None
    ) -> tuple[Any, ...]:
        """As ``host_arguments``, but rows have tokens to compute, without pages.

        They show how long a program takes.

        Args:
            key: the program.
            tokens: prompt tokens of each row of a prefill; None: as many as it has room for.
            rows: how many rows of each rank have tokens; None: all.
        """
        arguments = self.host_arguments(key)
        if isinstance(key, Admit | Constrain):
            return arguments
        (nothing,) = arguments
        if isinstance(key, Mixed):
            (decode,) = self.busy_arguments(Decode(key.rows), rows=rows)
            (prefill,) = self.busy_arguments(key.prefill, tokens)
            return (nothing._replace(decode=decode, prefill=prefill),)
        slots = np.minimum(np.arange(key.rows, dtype=np.int32), self.inputs.slots - 1)
        slots[key.rows if rows is None else rows :] = self.inputs.slots
        busy = nothing._replace(slots=np.tile(slots, self.dp_size))
        match key:
            case Prefill(_, chunk) | Fill(_, chunk):
                busy = busy._replace(length=np.full_like(nothing.slots, tokens or chunk))
            case Verify(_, length):
                busy = busy._replace(num_drafted=np.full_like(nothing.slots, length - 1))
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
            "draft_model": self.drafter and self.drafter.described(),
            "programs": [repr(key) for key in self.keys()],
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
        drafts = isinstance(key, Draft | Fill) or key == EmptyCache(draft=True)
        runs = self.drafter if drafts else self
        assert runs, "there is no draft model"
        if isinstance(key, EmptyCache):
            return jax.jit(runs._init_cache()).lower()
        if isinstance(key, ReadPages | WritePages):
            return self._lower_handover(key)
        graphdef, treedef = models.graphdef(runs.backend.padded, runs.backend.quantization)
        vocab_size = self.backend.model.vocab_size
        steps = Steps(
            graphdef,
            treedef,
            runs.attention,
            Sampler(vocab_size, num_top=min(self.config.max_logprobs, vocab_size)),
            min(vocab_size, runs.backend.model.vocab_size),
            self.backend.padded.vocab_size,
            self.batch.row_buckets,
        )
        in_cache, in_rows = meshes.spec("pages", "kv_heads"), meshes.spec("rows")
        in_logits: Any = meshes.spec("rows", "vocab")
        of_rows: Any = in_rows
        to_sample = SampleInputs(in_logits, of_rows, of_rows, of_rows)
        in_state, everywhere = meshes.spec("slots"), PartitionSpec()
        in_weights = [each.sharding.spec for each in runs.weights]
        state = self.state()
        step: Callable[..., Any]
        specs: tuple[Any, ...]
        out: Any
        arguments: tuple[Any, ...]
        donate: tuple[int, ...]
        match key:
            case Admit():
                step, donate = steps.admit, (0,)
                arguments = state, *self._split(self.host_arguments(key), "rows")
                specs, out = (in_state, in_rows, in_rows), in_state
            case Sample(_, kind):
                step, donate = partial(steps.sample, kind), (0,)
                arguments = state.tokens, state.sampling, *self._left_for(key)
                specs, out = (in_state, in_state, to_sample), (in_state, everywhere)
            case Constrain():
                step, donate = steps.constrain, ()
                arguments = *self._left_for(key), *self._split(self.host_arguments(key), "rows")
                specs, out = (to_sample, in_rows), in_logits
            case Score():
                step, donate = steps.score, ()
                arguments = self._left_for(key)
                specs, out = (to_sample, everywhere), everywhere
            case ScorePrompt():
                step, donate = steps.score_prompt, ()
                arguments = runs.weights, *self._left_for(key)
                specs, out = (in_weights, in_rows), everywhere
            case Fill(_, chunk):
                step, donate = partial(steps.fill, chunk), (1,)
                inputs = self._split(self.host_arguments(key), "rows")
                arguments = runs.weights, runs.cache(), state.tokens, state.block_tables, *inputs
                specs, out = (in_weights, in_cache, in_state, in_state, in_rows), in_cache
            case Decode() | Verify() | Prefill() | Mixed() | Draft():
                inputs = self._split(self.host_arguments(key), "rows")
                arguments = runs.weights, runs.cache(), state.tokens, state.block_tables, *inputs
                specs = in_weights, in_cache, in_state, in_state, in_rows
                out, donate = (in_cache, in_state, in_state, to_sample), (1, 2, 3)
                match key:
                    case Decode() | Draft():
                        step = steps.decode
                    case Verify():
                        step = steps.verify
                    case Prefill(_, chunk):
                        step, out = partial(steps.prefill, chunk), (*out, in_rows)
                    case Mixed(_, Prefill(_, chunk)):
                        step, out = partial(steps.mixed, chunk), (*out, in_rows)
        mapped = jax.shard_map(step, mesh=self.mesh, in_specs=specs, out_specs=out, check_vma=False)
        return jax.jit(mapped, donate_argnums=donate).lower(*arguments)

    def handed_over(self, pages: int) -> KVCache:
        """The shapes of the contents of some pages in every layer."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((pages, *x.shape[1:]), x.dtype, sharding=x.sharding),
            self.cache(),
        )

    def _lower_handover(self, key: Handover) -> Any:
        in_cache, everywhere = meshes.spec("pages", "kv_heads"), PartitionSpec()
        arguments: list[Any] = [self.cache(), jax.ShapeDtypeStruct((key.pages,), np.int32)]
        specs: list[Any] = [in_cache, everywhere]
        if writes := isinstance(key, WritePages):
            arguments.append(self.handed_over(key.pages))
            specs.append(in_cache)
        mapped = jax.shard_map(
            write_pages if writes else read_pages,
            mesh=self.mesh,
            in_specs=tuple(specs),
            out_specs=in_cache,
            check_vma=False,
        )
        return jax.jit(mapped, donate_argnums=(0,) if writes else ()).lower(*arguments)

    def _left_for(self, key: Following) -> tuple[Any, ...]:
        """Shapes of what all ranks' forward passes leave for a program that follows."""
        match key:
            case Sample(rows) | Constrain(rows):
                return (self._sample_inputs(rows),)
            case Score(rows):  # every device has the ids that were sampled
                ids = jax.ShapeDtypeStruct((rows * self.dp_size,), np.int32)
                return self._sample_inputs(rows), self._split(ids)
            case ScorePrompt(positions):
                shape = positions * self.dp_size, self.backend.model.hidden_size
                hidden: Any = jax.ShapeDtypeStruct(shape, np.float32)
                successors: Any = jax.ShapeDtypeStruct(shape[:1], np.int32)
                return (self._split(PromptStates(hidden, successors), "rows"),)

    def _sample_inputs(self, rows: int) -> SampleInputs:
        """Shapes of all ranks' rows to be sampled."""
        shape = rows * self.dp_size, self.backend.padded.vocab_size
        logits = jax.ShapeDtypeStruct(shape, np.float32)
        each = self._split(jax.ShapeDtypeStruct(shape[:1], np.int32), "rows")
        return SampleInputs(self._split(logits, "rows", "vocab"), each, each, each)

    def nothing_for(self, key: Following) -> tuple[Any, ...]:
        """Zeros instead of what a forward pass leaves for a program that follows, on the device."""

        def zeros(shape: jax.ShapeDtypeStruct) -> jax.Array:
            array = np.zeros(shape.shape, shape.dtype)
            return jax.make_array_from_callback(array.shape, shape.sharding, array.__getitem__)

        left: tuple[Any, ...] = jax.tree.map(zeros, self._left_for(key))
        return (
            (*left, *self.place(self.host_arguments(key))) if isinstance(key, Constrain) else left
        )

    def _split(self, tree: Any, *axes: str) -> Any:
        """Shapes of a tree of arrays that are split by their leading logical axes."""
        sharding = NamedSharding(self.mesh, meshes.spec(*axes))
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )
