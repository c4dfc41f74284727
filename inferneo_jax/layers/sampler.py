"""Sampling: logits to next tokens, as one batched, pure function with parameters per row.

A feature costs nothing unless a row of the batch uses it: the program branches on the device, so
one compiled program serves every mixture of requests.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

_BLOCK = 256
"""Vocabulary entries of one block in the two-level inverse of the cumulative distribution."""

_NEVER = -1e30


class SamplingParamsBatch(NamedTuple):
    """The sampling parameters of a batch, one row per request. Slots keep them in the same form.

    Attributes:
        temperature, top_k, top_p, min_p: as in ``SamplingParams``; 0 stands for no ``top_k``.
        frequency_penalty, presence_penalty, repetition_penalty: as in ``SamplingParams``.
        seed: high and low word.
        prompt_len: number of prompt tokens; those after them are output.
        min_len: prompt and output must have this many tokens before a stop token is sampled.
        want_logprobs: whether the request asked for log probabilities.
        bias_ids: biased tokens; unused entries hold the vocabulary size, which scatters drop.
        bias: what is added to their logits.
        stop_ids: stop tokens, padded like ``bias_ids``.
    """

    temperature: Float[Array, " rows"]
    top_k: Int[Array, " rows"]
    top_p: Float[Array, " rows"]
    min_p: Float[Array, " rows"]
    frequency_penalty: Float[Array, " rows"]
    presence_penalty: Float[Array, " rows"]
    repetition_penalty: Float[Array, " rows"]
    seed: UInt32[Array, "rows 2"]
    prompt_len: Int[Array, " rows"]
    min_len: Int[Array, " rows"]
    want_logprobs: Bool[Array, " rows"]
    bias_ids: Int[Array, "rows max_bias"]
    bias: Float[Array, "rows max_bias"]
    stop_ids: Int[Array, "rows max_stops"]


class Scores(NamedTuple):
    """Log probabilities, in nats, of given tokens and of the best ones; zeros when unwanted."""

    chosen: Float[Array, "*rows"]
    top_ids: Int[Array, "*rows k"]
    top: Float[Array, "*rows k"]


@dataclass(frozen=True)
class Sampler:
    """The sampling function.

    Attributes:
        num_top: number of most likely tokens that are scored when a row wants log probabilities.
    """

    num_top: int

    def __call__(
        self,
        logits: Float[Array, "rows vocab"],
        params: SamplingParamsBatch,
        tokens: Int[Array, "slots max_len"],
        slots: Int[Array, " rows"],
        lengths: Int[Array, " rows"],
    ) -> tuple[Int[Array, " rows"], Scores]:
        """Choose one token per row.

        Args:
            logits: float32.
            params: of each row.
            tokens: of each slot so far, prompt first. Only penalties read them.
            slots: of each row; any number for a row of padding.
            lengths: how many ``tokens`` each row has, and so the position of the token to choose.
                With the seed it determines the draw, whatever else is in the batch.

        Returns:
            Token ids, and their scores under the model's own distribution.
        """
        shaped = _penalize(logits, params, tokens, slots, lengths)
        shaped = _bias(shaped, params, lengths)
        greedy = argmax(shaped)
        random = params.temperature > 0
        drawn = lax.cond(random.any(), lambda: _draw(shaped, params, lengths), lambda: greedy)
        ids = jnp.where(random, drawn, greedy)
        scores = lax.cond(
            params.want_logprobs.any(),
            lambda: self.score(logits, ids),
            lambda: self._no_scores(logits.shape[0]),
        )
        return ids, scores

    def plain(self, logits: Float[Array, "rows vocab"]) -> tuple[Int[Array, " rows"], Scores]:
        """The result of ``__call__`` for rows that all want their most likely token only."""
        return argmax(logits), self._no_scores(logits.shape[0])

    def score(self, logits: Float[Array, "rows vocab"], ids: Int[Array, " rows"]) -> Scores:
        """Log probabilities of the given ids and of the most likely tokens of each row."""
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, ids[:, None], axis=-1)[:, 0] - normaliser
        top, top_ids = lax.top_k(logits, self.num_top)
        return Scores(chosen, top_ids, top - normaliser[:, None])

    def _no_scores(self, rows: int) -> Scores:
        top = jnp.zeros((rows, self.num_top), jnp.float32)
        return Scores(jnp.zeros(rows, jnp.float32), top.astype(jnp.int32), top)


def needs_more(
    params: SamplingParamsBatch, lengths: Int[Array, " rows"], vocab: int
) -> Bool[Array, " rows"]:
    """Whether a row wants more than its most likely token: a draw, other logits, scores.

    Only the first of ``bias_ids`` is read: it is unused when there are no biases.
    """
    return (
        (params.temperature > 0)
        | params.want_logprobs
        | _penalized(params)
        | (params.bias_ids[:, 0] < vocab)
        | (lengths < params.min_len)
    )


def argmax(logits: Float[Array, "rows vocab"]) -> Int[Array, " rows"]:
    """The first index of each row's largest value.

    Written as a maximum and a search, which XLA:CPU runs seven times faster than its argmax.
    """
    vocab = logits.shape[-1]
    best = logits.max(axis=-1, keepdims=True)
    places = jnp.broadcast_to(jnp.arange(vocab, dtype=jnp.int32)[None, :], logits.shape)
    first = jnp.where(logits == best, places, vocab).min(axis=-1)
    return jnp.minimum(first, vocab - 1)  # a row of NaN has no best


def _penalize(
    logits: Float[Array, "rows vocab"],
    params: SamplingParamsBatch,
    tokens: Int[Array, "slots max_len"],
    slots: Int[Array, " rows"],
    lengths: Int[Array, " rows"],
) -> Float[Array, "rows vocab"]:
    def apply() -> Float[Array, "rows vocab"]:
        history = tokens.at[slots].get(mode="clip")
        places = jnp.arange(history.shape[1], dtype=jnp.int32)[None, :]
        live = places < lengths[:, None]
        generated = live & (places >= params.prompt_len[:, None])
        row = jnp.arange(history.shape[0])[:, None]
        nothing = jnp.zeros(logits.shape, jnp.float32)
        seen = nothing.at[row, history].max(live.astype(jnp.float32), mode="drop") > 0
        counts = nothing.at[row, history].add(generated.astype(jnp.float32), mode="drop")
        repetition = params.repetition_penalty[:, None]
        repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
        out = jnp.where(seen, repeated, logits)
        out = out - counts * params.frequency_penalty[:, None]
        return out - (counts > 0).astype(jnp.float32) * params.presence_penalty[:, None]

    return lax.cond(_penalized(params).any(), apply, lambda: logits)


def _penalized(params: SamplingParamsBatch) -> Bool[Array, " rows"]:
    return (
        (params.frequency_penalty != 0)
        | (params.presence_penalty != 0)
        | (params.repetition_penalty != 1)
    )


def _bias(
    logits: Float[Array, "rows vocab"], params: SamplingParamsBatch, lengths: Int[Array, " rows"]
) -> Float[Array, "rows vocab"]:
    row = jnp.arange(logits.shape[0])[:, None]
    vocab = logits.shape[1]
    too_short = lengths < params.min_len

    def add() -> Float[Array, "rows vocab"]:
        return logits.at[row, params.bias_ids].add(params.bias, mode="drop")

    biased = lax.cond((params.bias_ids < vocab).any(), add, lambda: logits)

    def ban() -> Float[Array, "rows vocab"]:
        banned = jnp.where(too_short[:, None], params.stop_ids, vocab)
        return biased.at[row, banned].set(_NEVER, mode="drop")

    return lax.cond(too_short.any(), ban, lambda: biased)


def _draw(
    logits: Float[Array, "rows vocab"], params: SamplingParamsBatch, lengths: Int[Array, " rows"]
) -> Int[Array, " rows"]:
    """Sample the tempered, truncated distribution by inverting its cumulative sum."""
    temperature = jnp.where(params.temperature > 0, params.temperature, 1.0)[:, None]
    scaled = logits / temperature
    weights = jnp.exp(scaled - scaled.max(axis=-1, keepdims=True))
    truncated = (params.top_k > 0) | (params.top_p < 1) | (params.min_p > 0)
    weights = lax.cond(truncated.any(), lambda: _truncate(weights, params), lambda: weights)
    return _invert(weights, _uniform(params.seed, lengths))


def _truncate(
    weights: Float[Array, "rows vocab"], params: SamplingParamsBatch
) -> Float[Array, "rows vocab"]:
    """Zero what top-k, then top-p of what is left, then min-p remove.

    Each keeps the weights at or above a threshold. Those of top-k and top-p are searched bit by
    bit, where a row asks for them: non-negative floats are ordered as their bit patterns, so 30
    counting passes give the exact value. A sort of the vocabulary would take some 40 times as long
    on a CPU. Tokens that tie at a threshold stay.
    """
    rows, vocab = weights.shape
    everything = jnp.zeros(rows, jnp.float32)

    def by_count() -> Float[Array, " rows"]:
        top_k = jnp.where(params.top_k > 0, params.top_k, vocab)
        return _greatest(lambda t: (weights >= t[:, None]).sum(axis=-1) >= top_k, rows)

    kept = _keep_from(weights, lax.cond((params.top_k > 0).any(), by_count, lambda: everything))

    def by_mass() -> Float[Array, " rows"]:
        target = kept.sum(axis=-1) * params.top_p
        threshold = _greatest(lambda t: _keep_from(kept, t).sum(axis=-1) >= target, rows)
        return jnp.where(params.top_p < 1, threshold, 0.0)

    top_p = lax.cond((params.top_p < 1).any(), by_mass, lambda: everything)
    # Rounding can leave the best weight just below 1, so min-p is measured against it.
    min_p = params.min_p * kept.max(axis=-1)
    return _keep_from(kept, jnp.maximum(top_p, min_p))


def _keep_from(
    weights: Float[Array, "rows vocab"], threshold: Float[Array, " rows"]
) -> Float[Array, "rows vocab"]:
    return jnp.where(weights >= threshold[:, None], weights, 0.0)


def _greatest(
    holds: Callable[[Float[Array, " rows"]], Bool[Array, " rows"]], rows: int
) -> Float[Array, " rows"]:
    """The greatest float in [0, 2) at which a falling predicate still holds, per row."""

    def try_bit(i: Int[Array, ""], bits: Int[Array, " rows"]) -> Int[Array, " rows"]:
        candidate = bits | (jnp.int32(1 << 29) >> i)
        value = lax.bitcast_convert_type(candidate, jnp.float32)
        return jnp.where(holds(value), candidate, bits)

    bits = lax.fori_loop(0, 30, try_bit, jnp.zeros(rows, jnp.int32))
    return lax.bitcast_convert_type(bits, jnp.float32)


def _uniform(seed: UInt32[Array, "rows 2"], counter: Int[Array, " rows"]) -> Float[Array, " rows"]:
    """One number in [0, 1) per row, from its seed and counter alone."""

    def one(words: UInt32[Array, " 2"], count: Int[Array, ""]) -> Float[Array, ""]:
        key = jax.random.fold_in(jax.random.wrap_key_data(words, impl="threefry2x32"), count)
        return jax.random.uniform(key)

    return jax.vmap(one)(seed, counter)


def _invert(
    weights: Float[Array, "rows vocab"], uniform: Float[Array, " rows"]
) -> Int[Array, " rows"]:
    """The token at which the cumulative sum of the weights passes ``uniform`` of their total.

    In two levels, since a cumulative sum over the whole vocabulary is slow: the block, then the
    token within it. A token of weight 0 is never chosen.
    """
    rows, vocab = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -vocab % _BLOCK))).reshape(rows, -1, _BLOCK)
    sums = blocks.sum(axis=-1)
    target = uniform * sums.sum(axis=-1)
    block, before = _first_beyond(sums, target)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    token, _ = _first_beyond(inside, target - before)
    return block * _BLOCK + token


def _first_beyond(
    weights: Float[Array, "rows n"], target: Float[Array, " rows"]
) -> tuple[Int[Array, " rows"], Float[Array, " rows"]]:
    """The first index of positive weight whose cumulative sum exceeds the target.

    Where rounding leaves the target at or beyond the whole sum, the last index of positive weight.
    Also the sum of all before it.
    """
    cumulative = jnp.cumsum(weights, axis=-1)
    positive = weights > 0
    beyond = positive & (cumulative > target[:, None])
    places = jnp.arange(weights.shape[-1], dtype=jnp.int32)[None, :]
    places = jnp.broadcast_to(places, weights.shape)
    first = jnp.where(beyond, places, weights.shape[-1]).min(axis=-1)
    last = jnp.where(positive, places, 0).max(axis=-1)
    index = jnp.minimum(first, last)
    upto = jnp.take_along_axis(cumulative - weights, index[:, None], axis=-1)[:, 0]
    return index, upto
