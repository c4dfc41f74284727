"""The device programs of generation: a step's forward pass, and the sampling behind it.

Pure functions over the weights, the cache and the state of all slots. What the host passes per
step is small: which slots, at which positions, in which pages. The tokens themselves never leave
the device between steps: each step reads its input where the last one left it.

Sampling is a program of its own, for a few numbers of rows, that every kind of step ends with: it
takes several times as long to compile as all layers, which are compiled once and called.

On a mesh each device runs them on its part (see ``programs.py``): its weights and KV heads, and the
slots, pages and rows of its group, all counted from 0 there. Results are those of all groups.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from inferneo_jax.layers.cache import AttentionMetadata, KVCache, PagedAttention
from inferneo_jax.layers.sampler import Sampler, SamplingParamsBatch, Scores, needs_more
from inferneo_jax.models.decoder import Decoder
from inferneo_jax.sharding import mesh

T = TypeVar("T")

_SCORED_AT_ONCE = 32
"""Prompt positions scored at once: logits for a whole chunk would take vocab x chunk x 4 bytes."""


class SlotState(NamedTuple):
    """What the device knows of every slot: its tokens so far and its sampling parameters."""

    tokens: Int[Array, "slots max_len"]
    sampling: SamplingParamsBatch


class DecodeInputs(NamedTuple):
    """The rows of one decode step. Padding rows have a slot beyond the last and no pages.

    ``positions`` is where the row's newest token lies, whose successor is to be found.
    """

    slots: Int[Array, " rows"]
    positions: Int[Array, " rows"]
    block_tables: Int[Array, "rows max_pages"]


class VerifyInputs(NamedTuple):
    """The rows of a decode step that verifies drafts: the first ``num_drafted`` of each are one."""

    slots: Int[Array, " rows"]
    positions: Int[Array, " rows"]
    block_tables: Int[Array, "rows max_pages"]
    drafts: Int[Array, "rows most"]
    num_drafted: Int[Array, " rows"]


class PrefillInputs(NamedTuple):
    """The rows of one prefill step: ``length`` tokens from position ``start`` on.

    ``last`` rows end their prompt, so a token is sampled after it; of those that are ``scored``
    log probabilities are wanted.
    """

    slots: Int[Array, " rows"]
    start: Int[Array, " rows"]
    length: Int[Array, " rows"]
    last: Bool[Array, " rows"]
    scored: Bool[Array, " rows"]
    block_tables: Int[Array, "rows max_pages"]


class SampleInputs(NamedTuple):
    """Rows after which a token is to be sampled, at position ``lengths``.

    It is written to the slots ``targets``. Rows of padding have no slot: one beyond the last.
    """

    logits: Float[Array, "rows vocab"]
    slots: Int[Array, " rows"]
    lengths: Int[Array, " rows"]
    targets: Int[Array, " rows"]


class Sampled(NamedTuple):
    """What a step brings back to the host; prompt scores in prefill steps only.

    Ids and scores are of all rows of :class:`SampleInputs`, padding included.
    """

    ids: Int[Array, "*rows"]
    scores: Scores
    prompt_scores: Scores | None = None


Weights = list[Array]
Tokens = Int[Array, "slots max_len"]
Forward = tuple[KVCache, Tokens, SampleInputs]


def sample_bucket(count: int, buckets: Sequence[int]) -> int:
    """To how many rows so many are padded to be sampled; ``buckets`` are rising."""
    return next((bucket for bucket in buckets if bucket >= count), count)


@dataclass(frozen=True)
class Steps:
    """The pure steps of one model.

    ``graphdef`` and ``treedef`` are those of ``models.graphdef`` of the padded model, whose
    vocabulary may be padded beyond ``vocab_size``. Rows to be sampled are padded to one of
    ``buckets``.
    """

    graphdef: nnx.GraphDef[Decoder]
    treedef: jax.tree_util.PyTreeDef
    attention: PagedAttention
    sampler: Sampler
    vocab_size: int
    buckets: tuple[int, ...]

    def admit(self, state: SlotState, slots: Int[Array, " rows"], rows: SlotState) -> SlotState:
        """Put requests into slots: their tokens and parameters. A slot beyond the last: none."""
        return jax.tree.map(lambda old, new: old.at[slots].set(new, mode="drop"), state, rows)

    def decode(
        self, weights: Weights, cache: KVCache, tokens: Tokens, rows: DecodeInputs
    ) -> Forward:
        """Feed each row its newest token."""
        model = self._model(weights)
        newest = tokens.at[rows.slots, rows.positions].get(mode="clip")
        metadata = _metadata(tokens, rows, rows.positions[:, None], jnp.ones_like(rows.slots))
        hidden, cache = model(newest[:, None], self.attention, cache, metadata)
        ends = self._ends(model, hidden[:, 0], rows.slots, rows.positions + 1, rows.slots)
        return cache, tokens, ends

    def verify(
        self, weights: Weights, cache: KVCache, tokens: Tokens, rows: VerifyInputs
    ) -> Forward:
        """Feed each row its newest token and its draft, after each of which one is sampled.

        What is sampled holds as far as the draft is the same, and for one token more. Whatever is
        written behind that, token, key or value, is written again before anything can see it.

        Returns:
            ``most + 1`` rows to be sampled for each of ``rows``, one after the other.
        """
        model = self._model(weights)
        most = rows.drafts.shape[1]
        steps = jnp.arange(most + 1, dtype=jnp.int32)[None, :]
        positions = rows.positions[:, None] + steps
        slots = rows.slots[:, None]
        # Where nothing is drafted, nothing is written: beyond the last slot.
        beyond = tokens.shape[0]
        places = jnp.where(steps[:, :most] < rows.num_drafted[:, None], slots, beyond)
        tokens = tokens.at[places, positions[:, 1:]].set(rows.drafts, mode="drop")
        inputs = tokens.at[slots, positions].get(mode="clip")
        metadata = _metadata(tokens, rows, positions, rows.num_drafted + 1)
        hidden, cache = model(inputs, self.attention, cache, metadata)

        flat = hidden.reshape(-1, hidden.shape[-1])
        each = jnp.repeat(rows.slots, most + 1)
        targets = jnp.where(steps <= rows.num_drafted[:, None], slots, beyond).reshape(-1)
        ends = self._ends(model, flat, each, positions.reshape(-1) + 1, targets)
        return cache, tokens, ends

    def prefill(
        self, chunk: int, weights: Weights, cache: KVCache, tokens: Tokens, rows: PrefillInputs
    ) -> tuple[KVCache, Tokens, SampleInputs, Scores]:
        """Run up to ``chunk`` (static) prompt tokens a row; sample where the prompt ends.

        Padding positions lie behind the live ones: they write to no page, or to places that are
        written again before anything can see them.

        Returns:
            Also the scores of the prompt's own tokens, where a row wants them.
        """
        model = self._model(weights)
        positions = rows.start[:, None] + jnp.arange(chunk, dtype=jnp.int32)[None, :]
        inputs = tokens.at[rows.slots[:, None], positions].get(mode="clip")
        metadata = _metadata(tokens, rows, positions, rows.length)
        hidden, cache = model(inputs, self.attention, cache, metadata)

        final = jnp.take_along_axis(hidden, rows.length[:, None, None] - 1, axis=1)[:, 0]
        successors = tokens.at[rows.slots[:, None], positions + 1].get(mode="clip")
        prompt_scores = self._score_prompt(model, hidden, successors, rows.scored.any())

        targets = jnp.where(rows.last, rows.slots, tokens.shape[0])  # elsewhere none is written
        ends = self._ends(model, final, rows.slots, rows.start + rows.length, targets)
        return cache, tokens, ends, _from_all(prompt_scores)

    def sample(self, state: SlotState, rows: SampleInputs) -> tuple[SlotState, Sampled]:
        """Sample each row's token, and write it to where the next step reads it."""

        def of_rows(tree: Any) -> Any:
            return jax.tree.map(lambda x: x.at[rows.slots].get(mode="clip"), tree)

        def sample() -> tuple[Int[Array, " rows"], Scores]:
            params, history = of_rows((state.sampling, state.tokens))
            return self.sampler(rows.logits, params, history, rows.lengths)

        # Rows that are all greedy are the usual ones. What others want would cost them copies of
        # the logits, and tables of a thousand biases.
        first = jax.tree.map(lambda x: x[:, :1] if x.ndim > 1 else x, state.sampling)
        live = rows.slots < state.tokens.shape[0]
        more = live & needs_more(of_rows(first), rows.lengths, self.vocab_size)
        ids, scores = lax.cond(more.any(), sample, lambda: self.sampler.plain(rows.logits))
        tokens = state.tokens.at[rows.targets, rows.lengths].set(ids, mode="drop")
        return SlotState(tokens, state.sampling), _from_all(Sampled(ids, scores))

    def _model(self, weights: Weights) -> Decoder:
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, weights))

    def _logits(
        self, model: Decoder, hidden: Float[Array, "rows embed"]
    ) -> Float[Array, "rows vocab"]:
        return model.logits(hidden)[:, : self.vocab_size]

    def _ends(
        self,
        model: Decoder,
        hidden: Float[Array, "rows embed"],
        slots: Int[Array, " rows"],
        lengths: Int[Array, " rows"],
        targets: Int[Array, " rows"],
    ) -> SampleInputs:
        """What is to be sampled after these, padded to one of the numbers of rows."""
        padding = 0, sample_bucket(len(slots), self.buckets) - len(slots)
        beyond = np.iinfo(np.int32).max
        return SampleInputs(
            jnp.pad(self._logits(model, hidden), (padding, (0, 0))),
            jnp.pad(slots, padding, constant_values=beyond),
            jnp.pad(lengths, padding),
            jnp.pad(targets, padding, constant_values=beyond),
        )

    def _score_prompt(
        self,
        model: Decoder,
        hidden: Float[Array, "rows chunk embed"],
        successors: Int[Array, "rows chunk"],
        wanted: Bool[Array, ""],
    ) -> Scores:
        """Score each position's successor, a few positions at a time."""
        rows, chunk, embed = hidden.shape
        at_once = math.gcd(_SCORED_AT_ONCE, rows * chunk)
        parts = (
            hidden.reshape(-1, at_once, embed),
            successors.reshape(-1, at_once),
        )

        def compute() -> Scores:
            always = jnp.bool_(True)
            return lax.map(
                lambda part: self.sampler.score(self._logits(model, part[0]), part[1], always),
                parts,
            )

        def skip() -> Scores:
            shapes = jax.eval_shape(compute)
            return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        scores = lax.cond(wanted, compute, skip)
        return jax.tree.map(lambda x: x.reshape(rows, chunk, *x.shape[2:]), scores)


def _metadata(
    tokens: Tokens,
    rows: DecodeInputs | VerifyInputs | PrefillInputs,
    positions: Int[Array, "rows tokens"],
    lengths: Int[Array, " rows"],
) -> AttentionMetadata:
    """Where so many tokens of each row live; rows without a slot are all padding."""
    return AttentionMetadata(
        rows.block_tables, positions, jnp.where(rows.slots < tokens.shape[0], lengths, 0)
    )


def _from_all(sampled: T) -> T:
    """The results of every group of devices, on each: whichever host reads them has them all."""
    return jax.tree.map(lambda x: mesh.gather(x, "rows", 0), sampled)
