"""The two device programs of generation: prefill a chunk of a prompt, decode one token a row.

Both are pure functions over the weights, the cache and the state of all slots. What the host
passes per step is small: which slots, at which positions, in which pages. The tokens themselves
never leave the device between steps: each step reads its input where the last one left it.

On a mesh each device runs them on its part (see ``programs.py``): its weights and KV heads, and the
slots, pages and rows of its group, all counted from 0 there. Results are those of all groups.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from inferneo_jax import mesh
from inferneo_jax.cache import KVCache, PagedAttention, PageView
from inferneo_jax.models.decoder import Decoder
from inferneo_jax.sampling import Sampler, SamplingRows, Scores, needs_more

_SCORED_AT_ONCE = 32
"""Prompt positions scored at once: logits for a whole chunk would take vocab x chunk x 4 bytes."""


class SlotState(NamedTuple):
    """What the device knows of every slot: its tokens so far and its sampling parameters."""

    tokens: Int[Array, "slots max_len"]
    sampling: SamplingRows


class DecodeRows(NamedTuple):
    """The rows of one decode step. Padding rows have a slot beyond the last and no pages.

    ``positions`` is where the row's newest token lies, whose successor is to be found.
    """

    slots: Int[Array, " rows"]
    positions: Int[Array, " rows"]
    tables: Int[Array, "rows max_pages"]


class VerifyRows(NamedTuple):
    """The rows of a decode step that verifies drafts: the first ``num_drafted`` of each are one."""

    slots: Int[Array, " rows"]
    positions: Int[Array, " rows"]
    tables: Int[Array, "rows max_pages"]
    drafts: Int[Array, "rows most"]
    num_drafted: Int[Array, " rows"]


class PrefillRows(NamedTuple):
    """The rows of one prefill step: ``length`` tokens from position ``start`` on.

    ``last`` rows end their prompt, so a token is sampled after it.
    """

    slots: Int[Array, " rows"]
    start: Int[Array, " rows"]
    length: Int[Array, " rows"]
    last: Bool[Array, " rows"]
    tables: Int[Array, "rows max_pages"]


class Sampled(NamedTuple):
    """What a step brings back to the host; prompt scores in prefill steps only."""

    ids: Int[Array, "*rows"]
    scores: Scores
    prompt_scores: Scores | None = None


Weights = list[Array]


@dataclass(frozen=True)
class Steps:
    """The pure steps of one model.

    ``graphdef`` and ``treedef`` are those of ``models.skeleton`` of the fitted model, whose
    vocabulary may be padded beyond ``vocab_size``.
    """

    graphdef: nnx.GraphDef[Decoder]
    treedef: jax.tree_util.PyTreeDef
    attention: PagedAttention
    sampler: Sampler
    vocab_size: int

    def admit(self, state: SlotState, slots: Int[Array, " rows"], rows: SlotState) -> SlotState:
        """Put requests into slots: their tokens and parameters. A slot beyond the last: none."""
        return jax.tree.map(lambda old, new: old.at[slots].set(new, mode="drop"), state, rows)

    def decode(
        self, weights: Weights, cache: KVCache, state: SlotState, rows: DecodeRows
    ) -> tuple[KVCache, SlotState, Sampled]:
        """Feed each row its newest token and sample the next one."""
        model = self._model(weights)
        newest = state.tokens.at[rows.slots, rows.positions].get(mode="clip")
        live = rows.slots < state.tokens.shape[0]
        view = PageView(rows.tables, rows.positions[:, None], live.astype(jnp.int32))
        hidden, cache = model(newest[:, None], self.attention, cache, view)
        logits = self._logits(model, hidden[:, 0])
        state, ids, scores = self._sample(state, rows.slots, rows.positions + 1, logits)
        return cache, state, _from_all(Sampled(ids, scores))

    def verify(
        self, weights: Weights, cache: KVCache, state: SlotState, rows: VerifyRows
    ) -> tuple[KVCache, SlotState, Sampled]:
        """Feed each row its newest token and its draft, and sample after each of them.

        What is sampled holds as far as the draft is the same, and for one token more; up to there
        it becomes the row's. Keys and values behind that are written again before anything can see
        them.

        Returns:
            Ids and scores ``[rows, most + 1]``.
        """
        model = self._model(weights)
        num_rows, most = rows.drafts.shape
        steps = jnp.arange(most + 1, dtype=jnp.int32)[None, :]
        positions = rows.positions[:, None] + steps
        drafted = steps[:, :most] < rows.num_drafted[:, None]
        slots = rows.slots[:, None]
        # Where nothing is drafted, nothing is written: beyond the last slot.
        places = jnp.where(drafted, slots, state.tokens.shape[0])
        tokens = state.tokens.at[places, positions[:, 1:]].set(rows.drafts, mode="drop")
        inputs = tokens.at[slots, positions].get(mode="clip")
        live = rows.slots < state.tokens.shape[0]
        view = PageView(rows.tables, positions, jnp.where(live, rows.num_drafted + 1, 0))
        hidden, cache = model(inputs, self.attention, cache, view)

        logits = self._logits(model, hidden.reshape(num_rows * (most + 1), -1))
        params, history = jax.tree.map(
            lambda x: jnp.repeat(x.at[rows.slots].get(mode="clip"), most + 1, axis=0),
            (state.sampling, tokens),
        )
        ids, scores = self.sampler(logits, params, history, positions.reshape(-1) + 1)
        ids, scores = jax.tree.map(
            lambda x: x.reshape(num_rows, most + 1, *x.shape[1:]), (ids, scores)
        )
        same = drafted & (ids[:, :most] == rows.drafts)
        accepted = jnp.cumprod(same.astype(jnp.int32), axis=1).sum(axis=1)
        places = jnp.where(steps <= accepted[:, None], slots, state.tokens.shape[0])
        tokens = tokens.at[places, positions + 1].set(ids, mode="drop")
        return cache, SlotState(tokens, state.sampling), _from_all(Sampled(ids, scores))

    def prefill(
        self,
        chunk: int,
        weights: Weights,
        cache: KVCache,
        state: SlotState,
        rows: PrefillRows,
    ) -> tuple[KVCache, SlotState, Sampled]:
        """Run up to ``chunk`` (static) prompt tokens a row; sample where the prompt ends.

        Padding positions lie behind the live ones: they write to no page, or to places that are
        written again before anything can see them.
        """
        model = self._model(weights)
        positions = rows.start[:, None] + jnp.arange(chunk, dtype=jnp.int32)[None, :]
        tokens = state.tokens.at[rows.slots[:, None], positions].get(mode="clip")
        live = rows.slots < state.tokens.shape[0]
        view = PageView(rows.tables, positions, jnp.where(live, rows.length, 0))
        hidden, cache = model(tokens, self.attention, cache, view)

        final = jnp.take_along_axis(hidden, rows.length[:, None, None] - 1, axis=1)[:, 0]
        successors = state.tokens.at[rows.slots[:, None], positions + 1].get(mode="clip")
        wanted = state.sampling.want_prompt_logprobs.at[rows.slots].get(mode="clip").any()
        prompt_scores = self._score_prompt(model, hidden, successors, wanted)

        num_slots = state.tokens.shape[0]
        targets = jnp.where(rows.last, rows.slots, num_slots)  # elsewhere nothing is written
        state, ids, scores = self._sample(
            state, rows.slots, rows.start + rows.length, self._logits(model, final), targets
        )
        return cache, state, _from_all(Sampled(ids, scores, prompt_scores))

    def _model(self, weights: Weights) -> Decoder:
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, weights))

    def _logits(
        self, model: Decoder, hidden: Float[Array, "rows embed"]
    ) -> Float[Array, "rows vocab"]:
        return model.logits(hidden)[:, : self.vocab_size]

    def _sample(
        self,
        state: SlotState,
        slots: Int[Array, " rows"],
        lengths: Int[Array, " rows"],
        logits: Float[Array, "rows vocab"],
        targets: Int[Array, " rows"] | None = None,
    ) -> tuple[SlotState, Int[Array, " rows"], Scores]:
        """Sample each row's token at position ``length`` and write it to its target slot."""

        def of_rows(tree: Any) -> Any:
            return jax.tree.map(lambda x: x.at[slots].get(mode="clip"), tree)

        def sample() -> tuple[Int[Array, " rows"], Scores]:
            params, history = of_rows((state.sampling, state.tokens))
            return self.sampler(logits, params, history, lengths)

        # Rows that are all greedy are the usual ones. What others want would cost them copies of
        # the logits, and tables of a thousand biases.
        first = jax.tree.map(lambda x: x[:, :1] if x.ndim > 1 else x, state.sampling)
        live = slots < state.tokens.shape[0]
        more = live & needs_more(of_rows(first), lengths, self.vocab_size)
        ids, scores = lax.cond(more.any(), sample, lambda: self.sampler.plain(logits))
        targets = slots if targets is None else targets
        tokens = state.tokens.at[targets, lengths].set(ids, mode="drop")
        return SlotState(tokens, state.sampling), ids, scores

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


def _from_all(sampled: Sampled) -> Sampled:
    """The results of every group of devices, on each: whichever host reads them has them all."""
    return jax.tree.map(lambda x: mesh.gather(x, "rows", 0), sampled)
