"""The device programs of generation: the forward pass of each kind of step, and sampling.

All are pure functions of the weights, the KV cache and the state of all slots. Everything that
belongs to a request is sent once, when it gets its slot; after that a step's inputs say only which
slots take part, at which positions, and which pages those positions lie in. Tokens never travel to
the host and back between steps: a step reads its input where the step before wrote it.

Sampling is a program of its own that follows every forward pass, compiled for a few numbers of
rows. It takes several times as long to compile as all layers, which are compiled once and called.
Scoring a prompt is another, which follows a prefill where a request asks for it. The host chooses
how much of sampling a step needs, and whether log probabilities are computed after it. Where a
grammar says which tokens are allowed, ``constrain`` goes before it.

On a mesh, each device runs these functions on its part (see ``runner/programs.py``): its weights
and KV heads, and the slots, pages and rows of its data parallel rank, counted from 0 within the
rank. Sampled tokens and scores are those of all ranks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from inferneo_jax.layers.cache import AttentionMetadata, KVCache, MixedMetadata, PagedAttention
from inferneo_jax.layers.sampler import Sampler, Sampling, SamplingParamsBatch, Scores
from inferneo_jax.models.decoder import Decoder
from inferneo_jax.sharding import mesh

T = TypeVar("T")

_SCORED_AT_ONCE = 32
"""Prompt positions scored at once: logits for a whole chunk would take vocab x chunk x 4 bytes."""


class SlotState(NamedTuple):
    """What the device keeps of every slot. Admission writes all of it, for one request.

    Attributes:
        tokens: prompt and output so far; sampling appends to them.
        block_tables: pages of the KV cache in order of position, 0 where there is none yet. Decode
            steps append to them.
        sampling: the request's parameters, which do not change.
    """

    tokens: Int[Array, "slots max_len"]
    block_tables: Int[Array, "slots max_pages"]
    sampling: SamplingParamsBatch


class DecodeInputs(NamedTuple):
    """The rows of a decode step. Padding rows have a slot beyond the last.

    Attributes:
        slots: of each row.
        positions: where the row's newest token lies; the next token is sampled after it.
        pages: the page of that position.
    """

    slots: Int[Array, " rows"]
    positions: Int[Array, " rows"]
    pages: Int[Array, "rows 1"]


class VerifyInputs(NamedTuple):
    """The rows of a decode step that also verifies drafts.

    Attributes:
        slots, positions: as in :class:`DecodeInputs`.
        pages: from the one of ``positions`` on, as many as the longest draft can reach; 0 where
            the row has none.
        drafts: tokens that may follow the newest one.
        num_given: how many of ``drafts`` are meant; the draft model has written its own to the
            slots already.
        num_drafted: how many tokens of the row, given or written, are verified.
    """

    slots: Int[Array, " rows"]
    positions: Int[Array, " rows"]
    pages: Int[Array, "rows num_pages"]
    drafts: Int[Array, "rows max_draft"]
    num_given: Int[Array, " rows"]
    num_drafted: Int[Array, " rows"]


class PrefillInputs(NamedTuple):
    """The rows of a prefill step. Padding rows have a slot beyond the last.

    Attributes:
        slots: of each row.
        start: position of the row's first token.
        length: how many tokens the row computes.
        last: whether these end the prompt, so that a token is sampled after them.
        scored: whether log probabilities of the prompt's tokens are wanted. The host reads it.
    """

    slots: Int[Array, " rows"]
    start: Int[Array, " rows"]
    length: Int[Array, " rows"]
    last: Bool[Array, " rows"]
    scored: Bool[Array, " rows"]


class MixedInputs(NamedTuple):
    """The rows of a step that decodes and prefills in one forward pass.

    Attributes:
        decode: rows that get their next token.
        prefill: chunks of prompts.
        sampled: the rows to sample, as many as the decode rows with padding: ``i`` is the decode
            row ``i``, and what is beyond their number counts prefill rows; padding lies beyond all.
    """

    decode: DecodeInputs
    prefill: PrefillInputs
    sampled: Int[Array, " rows"]


class SampleInputs(NamedTuple):
    """What a forward pass hands to sampling. Padding rows have a slot beyond the last.

    Attributes:
        logits: float32, of the vocabulary with the padding that divides it among devices.
        slots: whose parameters and tokens apply.
        lengths: tokens so far, and so the position of the one that is sampled.
        targets: the slot that the sampled token is written to; one beyond the last for none.
    """

    logits: Float[Array, "rows vocab"]
    slots: Int[Array, " rows"]
    lengths: Int[Array, " rows"]
    targets: Int[Array, " rows"]


class PromptStates(NamedTuple):
    """What prefill leaves of the positions of its rows, one row after the other.

    Attributes:
        hidden: states after the last layer.
        successors: the tokens that follow, as far as they are known.
    """

    hidden: Float[Array, "positions embed"]
    successors: Int[Array, " positions"]


class Sampled(NamedTuple):
    """What a step samples, for all rows of :class:`SampleInputs`, padding included.

    Attributes:
        ids: of the sampled tokens.
        scores: of these; None unless a row wants them.
        prompt_scores: of all positions of a prefill; None unless a row wants them.
    """

    ids: Int[Array, "*rows"]
    scores: Scores | None
    prompt_scores: Scores | None = None


Weights = list[Array]
Tokens = Int[Array, "slots max_len"]
BlockTables = Int[Array, "slots max_pages"]
Forward = tuple[KVCache, Tokens, BlockTables, SampleInputs]


def sample_bucket(count: int, buckets: Sequence[int]) -> int:
    """The number of rows that ``count`` rows are padded to for sampling; ``buckets`` rise."""
    return next((bucket for bucket in buckets if bucket >= count), count)


@dataclass(frozen=True)
class Steps:
    """The pure step functions of one model.

    Attributes:
        graphdef: of the model, padded for the mesh.
        treedef: of its weights.
        attention: over the KV cache.
        sampler: of tokens.
        vocab_size: tokens of the model's vocabulary.
        num_logits: of a row, over all devices. A draft model has as many as the model it drafts
            for.
        buckets: numbers of rows that sampling is compiled for, rising.
    """

    graphdef: nnx.GraphDef[Decoder]
    treedef: jax.tree_util.PyTreeDef
    attention: PagedAttention
    sampler: Sampler
    vocab_size: int
    num_logits: int
    buckets: tuple[int, ...]

    def admit(self, state: SlotState, slots: Int[Array, " rows"], admitted: SlotState) -> SlotState:
        """Put requests into ``slots``; rows whose slot is beyond the last are dropped."""
        return jax.tree.map(lambda old, new: old.at[slots].set(new, mode="drop"), state, admitted)

    def decode(
        self,
        weights: Weights,
        cache: KVCache,
        tokens: Tokens,
        block_tables: BlockTables,
        inputs: DecodeInputs,
    ) -> Forward:
        """Run the newest token of each row."""
        model = self._model(weights)
        block_tables = self._append_pages(block_tables, inputs)
        newest, metadata = _newest(tokens, block_tables, inputs)
        hidden, cache = model(newest, self.attention, cache, metadata)
        to_sample = self._sample_inputs(
            model, hidden[:, 0], inputs.slots, inputs.positions + 1, inputs.slots
        )
        return cache, tokens, block_tables, to_sample

    def verify(
        self,
        weights: Weights,
        cache: KVCache,
        tokens: Tokens,
        block_tables: BlockTables,
        inputs: VerifyInputs,
    ) -> Forward:
        """Run the newest token and the draft of each row; a token is sampled after each of these.

        The sampled tokens count as far as they equal the draft, and one more. Tokens, keys and
        values beyond that are overwritten before anything reads them.

        Returns:
            ``max_draft + 1`` consecutive rows to sample for each row of ``inputs``.
        """
        model = self._model(weights)
        block_tables = self._append_pages(block_tables, inputs)
        max_draft = inputs.drafts.shape[1]
        steps = jnp.arange(max_draft + 1, dtype=jnp.int32)[None, :]
        positions = inputs.positions[:, None] + steps
        slots = inputs.slots[:, None]
        # Padding of the drafts is not written: its slot is beyond the last.
        beyond = tokens.shape[0]
        given = jnp.where(steps[:, :max_draft] < inputs.num_given[:, None], slots, beyond)
        tokens = tokens.at[given, positions[:, 1:]].set(inputs.drafts, mode="drop")
        token_ids = tokens.at[slots, positions].get(mode="clip")
        metadata = _metadata(block_tables, inputs.slots, positions, inputs.num_drafted + 1)
        hidden, cache = model(token_ids, self.attention, cache, metadata)

        flat = hidden.reshape(-1, hidden.shape[-1])
        each = jnp.repeat(inputs.slots, max_draft + 1)
        targets = jnp.where(steps <= inputs.num_drafted[:, None], slots, beyond).reshape(-1)
        to_sample = self._sample_inputs(model, flat, each, positions.reshape(-1) + 1, targets)
        return cache, tokens, block_tables, to_sample

    def prefill(
        self,
        chunk: int,
        weights: Weights,
        cache: KVCache,
        tokens: Tokens,
        block_tables: BlockTables,
        inputs: PrefillInputs,
    ) -> tuple[KVCache, Tokens, BlockTables, SampleInputs, PromptStates]:
        """Run up to ``chunk`` (static) prompt tokens of each row.

        Padding lies after a row's tokens: what it writes goes to page 0, or to positions that are
        overwritten before anything reads them.

        Returns:
            Also what ``score_prompt`` scores the prompt's own tokens from, if a row wants that.
        """
        model = self._model(weights)
        token_ids, metadata = _chunks(chunk, tokens, block_tables, inputs)
        hidden, cache = model(token_ids, self.attention, cache, metadata)
        to_sample = self._sample_inputs(model, *_ends(hidden, tokens, inputs))
        return cache, tokens, block_tables, to_sample, _prompt_states(hidden, tokens, inputs)

    def score_prompt(self, weights: Weights, states: PromptStates) -> Scores:
        """Score each position's successor, a few positions at a time."""
        model, (positions, embed) = self._model(weights), states.hidden.shape
        at_once = math.gcd(_SCORED_AT_ONCE, positions)
        parts = states.hidden.reshape(-1, at_once, embed), states.successors.reshape(-1, at_once)
        scores = lax.map(
            lambda part: self.sampler.score(self._logits(model, part[0]), part[1]), parts
        )
        return _gather(jax.tree.map(lambda x: x.reshape(positions, *x.shape[2:]), scores))

    def mixed(
        self,
        chunk: int,
        weights: Weights,
        cache: KVCache,
        tokens: Tokens,
        block_tables: BlockTables,
        inputs: MixedInputs,
    ) -> tuple[KVCache, Tokens, BlockTables, SampleInputs, PromptStates]:
        """Run decode rows, and up to ``chunk`` (static) prompt tokens of each prefill row.

        Every weight is read once for both.

        Returns:
            As ``prefill``, but the rows to sample are those that ``inputs.sampled`` names.
        """
        model = self._model(weights)
        decode, prefill = inputs.decode, inputs.prefill
        block_tables = self._append_pages(block_tables, decode)
        newest, decoded = _newest(tokens, block_tables, decode)
        token_ids, chunks = _chunks(chunk, tokens, block_tables, prefill)
        both = jnp.concatenate([newest.reshape(1, -1), token_ids.reshape(1, -1)], axis=1)
        hidden, cache = model(both, self.attention, cache, MixedMetadata((decoded, chunks)))

        rows = len(decode.slots)
        of_chunks = hidden[0, rows:].reshape(*token_ids.shape, -1)
        beyond = np.iinfo(np.int32).max
        decode_rows = hidden[0, :rows], decode.slots, decode.positions + 1, decode.slots
        to_sample = [
            jnp.concatenate(pair).at[inputs.sampled].get(mode="fill", fill_value=fill)
            for *pair, fill in zip(
                decode_rows, _ends(of_chunks, tokens, prefill), (0, beyond, 0, beyond), strict=True
            )
        ]
        sample_inputs = self._sample_inputs(model, *to_sample)
        states = _prompt_states(of_chunks, tokens, prefill)
        return cache, tokens, block_tables, sample_inputs, states

    def fill(
        self,
        chunk: int,
        weights: Weights,
        cache: KVCache,
        tokens: Tokens,
        block_tables: BlockTables,
        inputs: PrefillInputs,
    ) -> KVCache:
        """Compute keys and values of up to ``chunk`` (static) tokens of each row, nothing else."""
        token_ids, metadata = _chunks(chunk, tokens, block_tables, inputs)
        _, cache = self._model(weights)(token_ids, self.attention, cache, metadata)
        return cache

    def constrain(
        self, inputs: SampleInputs, allowed: UInt32[Array, "rows words"]
    ) -> Float[Array, "rows vocab"]:
        """The logits to sample from, where only some tokens are allowed in each row."""
        return self.sampler.constrain(inputs.logits, allowed)

    def sample(
        self, kind: Sampling, tokens: Tokens, sampling: SamplingParamsBatch, inputs: SampleInputs
    ) -> tuple[Tokens, Int[Array, " all_rows"]]:
        """Sample a token for each row, and write it to where the next step reads it.

        Args:
            kind: what the rows need at most; static.
            tokens: of all slots.
            sampling: of all slots.
            inputs: the rows.
        """
        params = jax.tree.map(lambda x: x.at[inputs.slots].get(mode="clip"), sampling)
        ids = self.sampler(kind, inputs.logits, params, tokens, inputs.slots, inputs.lengths)
        tokens = tokens.at[inputs.targets, inputs.lengths].set(ids, mode="drop")
        return tokens, _gather(ids)

    def score(self, inputs: SampleInputs, ids: Int[Array, " all_rows"]) -> Scores:
        """The log probabilities of what ``sample`` has sampled from the same inputs."""
        rows = inputs.logits.shape[0]
        own = lax.dynamic_slice_in_dim(ids, mesh.first_index("rows", rows), rows)
        return _gather(self.sampler.score(inputs.logits, own))

    def _model(self, weights: Weights) -> Decoder:
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, weights))

    def _append_pages(
        self, block_tables: BlockTables, inputs: DecodeInputs | VerifyInputs
    ) -> BlockTables:
        """Write the pages of a step's positions into its slots' block tables."""
        first = inputs.positions[:, None] // self.attention.page_len
        index = first + jnp.arange(inputs.pages.shape[1], dtype=jnp.int32)[None, :]
        return block_tables.at[inputs.slots[:, None], index].set(inputs.pages, mode="drop")

    def _logits(
        self, model: Decoder, hidden: Float[Array, "rows embed"]
    ) -> Float[Array, "rows part"]:
        """Logits of this device's part of the vocabulary; minus infinity for its padding."""
        logits = model.logits(hidden)
        size = mesh.local_size("vocab", self.num_logits)
        first = mesh.first_index("vocab", size)
        if logits.shape[1] != size:
            # A draft model whose table has another size is split at other tokens.
            whole = mesh.gather(logits, "vocab", 1)[:, : self.num_logits]
            whole = jnp.pad(whole, ((0, 0), (0, self.num_logits - whole.shape[1])))
            logits = lax.dynamic_slice_in_dim(whole, first, size, axis=1)
        if self.vocab_size < self.num_logits:
            ids = jnp.arange(size, dtype=jnp.int32) + first
            logits = jnp.where((ids < self.vocab_size)[None, :], logits, -jnp.inf)
        return logits

    def _sample_inputs(
        self,
        model: Decoder,
        hidden: Float[Array, "rows embed"],
        slots: Int[Array, " rows"],
        lengths: Int[Array, " rows"],
        targets: Int[Array, " rows"],
    ) -> SampleInputs:
        """The inputs of sampling after these hidden states, padded to one of the buckets."""
        padding = 0, sample_bucket(len(slots), self.buckets) - len(slots)
        beyond = np.iinfo(np.int32).max
        return SampleInputs(
            jnp.pad(self._logits(model, hidden), (padding, (0, 0))),
            jnp.pad(slots, padding, constant_values=beyond),
            jnp.pad(lengths, padding),
            jnp.pad(targets, padding, constant_values=beyond),
        )


def _metadata(
    block_tables: BlockTables,
    slots: Int[Array, " rows"],
    positions: Int[Array, "rows tokens"],
    lengths: Int[Array, " rows"],
) -> AttentionMetadata:
    """What attention needs to know of a step's rows; those without a slot are all padding."""
    return AttentionMetadata(
        block_tables.at[slots].get(mode="fill", fill_value=0),
        positions,
        jnp.where(slots < block_tables.shape[0], lengths, 0),
    )


def _newest(
    tokens: Tokens, block_tables: BlockTables, inputs: DecodeInputs
) -> tuple[Int[Array, "rows 1"], AttentionMetadata]:
    """The newest token of each row."""
    newest = tokens.at[inputs.slots, inputs.positions].get(mode="clip")
    positions, ones = inputs.positions[:, None], jnp.ones_like(inputs.slots)
    return newest[:, None], _metadata(block_tables, inputs.slots, positions, ones)


def _chunks(
    chunk: int, tokens: Tokens, block_tables: BlockTables, inputs: PrefillInputs
) -> tuple[Int[Array, "rows {chunk}"], AttentionMetadata]:
    """The prompt tokens of each row."""
    positions = inputs.start[:, None] + jnp.arange(chunk, dtype=jnp.int32)[None, :]
    token_ids = tokens.at[inputs.slots[:, None], positions].get(mode="clip")
    return token_ids, _metadata(block_tables, inputs.slots, positions, inputs.length)


def _ends(
    hidden: Float[Array, "rows chunk embed"], tokens: Tokens, inputs: PrefillInputs
) -> tuple[
    Float[Array, "rows embed"], Int[Array, " rows"], Int[Array, " rows"], Int[Array, " rows"]
]:
    """The last token of each chunk: hidden state, slot, length of its sequence, and target."""
    final = jnp.take_along_axis(hidden, inputs.length[:, None, None] - 1, axis=1)[:, 0]
    targets = jnp.where(inputs.last, inputs.slots, tokens.shape[0])
    return final, inputs.slots, inputs.start + inputs.length, targets


def _prompt_states(
    hidden: Float[Array, "rows chunk embed"], tokens: Tokens, inputs: PrefillInputs
) -> PromptStates:
    """What the tokens of prompts are scored from."""
    _, chunk, embed = hidden.shape
    successors = inputs.start[:, None] + jnp.arange(1, chunk + 1, dtype=jnp.int32)[None, :]
    ids = tokens.at[inputs.slots[:, None], successors].get(mode="clip")
    return PromptStates(hidden.reshape(-1, embed), ids.reshape(-1))


def _gather(results: T) -> T:
    """The results of all ranks, on every device: each process can read all of them."""
    return jax.tree.map(lambda x: mesh.gather(x, "rows", 0), results)
