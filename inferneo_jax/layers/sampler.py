"""Sampling: logits to next tokens, as one batched, pure function with parameters per row.

How much of it a program does is chosen by the host (``Sampling``), since a branch on the device
would make a GPU's host wait for the forward pass.

Where the vocabulary is split over a mesh, every device has the logits of its part, and they stay
there. What devices exchange are maxima, sums and candidates: a few numbers for each row.
"""

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num, UInt32

from inferneo_jax.sharding import mesh

_BLOCK, _LEAST_BLOCK = 256, 32
"""Vocabulary entries of one block in two-level searches, at most and at least."""

_NEVER = -1e30

_MASS_BITS = 30
"""The masses of a row, its probabilities as integers, sum to half of 2^30 at least."""

_WEIGHT_BITS, _DIGIT_BITS = 30, 3
"""A float in [0, 2) has 30 bits, which a search finds by three in one pass: with 7 sums a pass,
XLA:CPU took least time. A GPU reads the weights 11 times, and with five bits a pass 8 times."""


class Sampling(IntEnum):
    """What a program does for its rows. Each does what those before it do, and more."""

    GREEDY = 0
    """The most likely token."""
    DRAWN = 1
    """A draw at a temperature."""
    TRUNCATED = 2
    """A draw after top-k, top-p and min-p."""
    SHAPED = 3
    """Any of these from logits with penalties, biases and banned stop tokens."""


class SamplingParamsBatch(NamedTuple):
    """The sampling parameters of a batch, one row per request. Slots keep them in the same form.

    Attributes:
        temperature, top_k, top_p, min_p: as in ``SamplingParams``; 0 stands for no ``top_k``.
        frequency_penalty, presence_penalty, repetition_penalty: as in ``SamplingParams``.
        seed: high and low word.
        prompt_len: number of prompt tokens; those after them are output.
        min_len: prompt and output must have this many tokens before a stop token is sampled.
        want_logprobs: whether the request asked for log probabilities.
        constrained: whether a grammar says which tokens are allowed. The host reads it.
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
    constrained: Bool[Array, " rows"]
    bias_ids: Int[Array, "rows max_bias"]
    bias: Float[Array, "rows max_bias"]
    stop_ids: Int[Array, "rows max_stops"]


class Scores(NamedTuple):
    """Log probabilities, in nats, of given tokens and of the best ones."""

    chosen: Float[Array, "*rows"]
    top_ids: Int[Array, "*rows k"]
    top: Float[Array, "*rows k"]


def sampling_of(params: Any, vocab_size: int) -> np.ndarray[Any, np.dtype[np.int8]]:
    """The least of ``Sampling`` that each row of a batch needs.

    Args:
        params: a ``SamplingParamsBatch`` of numpy arrays.
        vocab_size: what unused ``bias_ids`` hold; the first is unused if there are no biases.
    """
    truncated = (params.top_k > 0) | (params.top_p < 1) | (params.min_p > 0)
    shaped = (
        (params.frequency_penalty != 0)
        | (params.presence_penalty != 0)
        | (params.repetition_penalty != 1)
        | (params.bias_ids[:, 0] < vocab_size)
        | (params.min_len > params.prompt_len)
    )
    drawn = np.where(truncated, Sampling.TRUNCATED, Sampling.DRAWN)
    least = np.where(params.temperature > 0, drawn, Sampling.GREEDY)
    return np.where(shaped, Sampling.SHAPED, least).astype(np.int8)


@dataclass(frozen=True)
class Sampler:
    """The sampling function.

    Logits are float32, and those of this device's part of the vocabulary. Entries beyond
    ``vocab_size``, which pad the last parts, are minus infinity.

    Attributes:
        vocab_size: number of tokens that there are.
        num_top: number of most likely tokens that are scored, at most ``vocab_size``.
    """

    vocab_size: int
    num_top: int

    def __call__(
        self,
        kind: Sampling,
        logits: Float[Array, "rows part"],
        params: SamplingParamsBatch,
        tokens: Int[Array, "slots max_len"],
        slots: Int[Array, " rows"],
        lengths: Int[Array, " rows"],
    ) -> Int[Array, " rows"]:
        """Choose one token per row.

        Args:
            kind: static; no row may need more.
            logits: of each row.
            params: of each row.
            tokens: of each slot so far, prompt first. Only penalties read them.
            slots: of each row; any number for a row of padding.
            lengths: how many ``tokens`` each row has, and so the position of the token to choose.
                With the seed it determines the draw, whatever else is in the batch.

        Returns:
            Token ids, on every device.
        """
        if kind == Sampling.SHAPED:
            logits = self._penalize(logits, params, tokens, slots, lengths)
            logits = self._bias(logits, params, lengths)
        greedy = argmax(logits)
        if kind == Sampling.GREEDY:
            return greedy
        drawn = _draw(logits, params, lengths, truncated=kind >= Sampling.TRUNCATED)
        return jnp.where(params.temperature > 0, drawn, greedy)

    def constrain(
        self, logits: Float[Array, "rows part"], allowed: UInt32[Array, "rows words"]
    ) -> Float[Array, "rows part"]:
        """Logits that are minus infinity for all tokens but the allowed ones.

        Nothing that is done to them later can bring a token back.

        Args:
            logits: of each row.
            allowed: bit ``i % 32`` of word ``i // 32`` says whether token ``i`` is allowed; as many
                words as the whole vocabulary, with its padding, needs.
        """
        places = jnp.arange(32, dtype=jnp.uint32)[None, None, :]
        bits = ((allowed[:, :, None] >> places) & jnp.uint32(1)).reshape(logits.shape[0], -1)
        size = logits.shape[1]
        own = lax.dynamic_slice_in_dim(bits, mesh.first_index("vocab", size), size, axis=1)
        return jnp.where(own == 1, logits, -jnp.inf)

    def score(self, logits: Float[Array, "rows part"], ids: Int[Array, " rows"]) -> Scores:
        """Log probabilities of the given ids and of the most likely tokens of each row.

        They are those of the model's own distribution, before any sampling parameter. A device
        contributes its own best tokens.
        """
        peak = mesh.maximum(logits.max(axis=-1), "vocab")
        total = mesh.reduce(jnp.exp(logits - peak[:, None]).sum(axis=-1), "vocab")
        normaliser = peak + jnp.log(total)
        size = logits.shape[1]
        own = jnp.take_along_axis(
            logits, self._local(ids, size)[:, None], axis=-1, mode="fill", fill_value=0
        )
        chosen = mesh.reduce(own[:, 0], "vocab") - normaliser
        top, places = lax.top_k(logits, min(self.num_top, size))
        top_ids = mesh.gather(places + mesh.first_index("vocab", size), "vocab", 1)
        top, best = lax.top_k(mesh.gather(top, "vocab", 1), self.num_top)
        top_ids = jnp.take_along_axis(top_ids, best, axis=-1)
        return Scores(chosen, top_ids, top - normaliser[:, None])

    def _local(self, ids: Int[Array, "*ids"], size: int) -> Int[Array, "*ids"]:
        """Where tokens lie in this device's part; ``size``, which is beyond it, for others."""
        places = ids - mesh.first_index("vocab", size)
        held = (places >= 0) & (places < size) & (ids < self.vocab_size)
        return jnp.where(held, places, size)

    def _penalize(
        self,
        logits: Float[Array, "rows part"],
        params: SamplingParamsBatch,
        tokens: Int[Array, "slots max_len"],
        slots: Int[Array, " rows"],
        lengths: Int[Array, " rows"],
    ) -> Float[Array, "rows part"]:
        history = tokens.at[slots].get(mode="clip")
        places = jnp.arange(history.shape[1], dtype=jnp.int32)[None, :]
        live = places < lengths[:, None]
        generated = live & (places >= params.prompt_len[:, None])
        row = jnp.arange(history.shape[0])[:, None]
        history = self._local(history, logits.shape[1])
        nothing = jnp.zeros(logits.shape, jnp.float32)
        seen = nothing.at[row, history].max(live.astype(jnp.float32), mode="drop") > 0
        counts = nothing.at[row, history].add(generated.astype(jnp.float32), mode="drop")
        repetition = params.repetition_penalty[:, None]
        repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
        out = jnp.where(seen, repeated, logits)
        out = out - counts * params.frequency_penalty[:, None]
        return out - (counts > 0).astype(jnp.float32) * params.presence_penalty[:, None]

    def _bias(
        self,
        logits: Float[Array, "rows part"],
        params: SamplingParamsBatch,
        lengths: Int[Array, " rows"],
    ) -> Float[Array, "rows part"]:
        rows, size = logits.shape
        row = jnp.arange(rows)[:, None]
        biased = logits.at[row, self._local(params.bias_ids, size)].add(params.bias, mode="drop")
        too_short = lengths < params.min_len
        banned = jnp.where(too_short[:, None], self._local(params.stop_ids, size), size)
        # A token that a grammar does not allow stays at minus infinity: where only a stop token is
        # allowed, that one is sampled although the output is too short.
        return biased.at[row, banned].min(_NEVER, mode="drop")


def argmax(logits: Float[Array, "rows part"]) -> Int[Array, " rows"]:
    """The first token of each row's largest logit.

    First the block that holds it is found, then the token: XLA:CPU takes seven times as long to
    search a whole row as for its maximum.
    """
    size = logits.shape[1]
    blocks = _blocks(logits, -jnp.inf)
    number = _first_of_best(blocks.max(axis=-1))
    inside = jnp.take_along_axis(blocks, number[:, None, None], axis=1)[:, 0]
    token = jnp.minimum(number * blocks.shape[2] + _first_of_best(inside), size - 1)
    if not mesh.is_split("vocab"):
        return token
    best = lax.bitcast_convert_type(inside.max(axis=-1), jnp.int32)
    own = jnp.stack([best, token + mesh.first_index("vocab", size)], axis=1)
    every = mesh.gather(own[:, None], "vocab", 1)
    part = _first_of_best(lax.bitcast_convert_type(every[:, :, 0], jnp.float32))
    return jnp.take_along_axis(every[:, :, 1], part[:, None], axis=1)[:, 0]


def _blocks(values: Num[Array, "rows part"], fill: float | int) -> Num[Array, "rows blocks block"]:
    """The values in blocks of equal size, padded, by a copy, where none divides the part."""
    rows, size = values.shape
    block = math.gcd(size, _BLOCK)
    if block < _LEAST_BLOCK:
        block = _BLOCK
        values = jnp.pad(values, ((0, 0), (0, -size % block)), constant_values=fill)
    return values.reshape(rows, -1, block)


def _first_of_best(values: Float[Array, "rows n"]) -> Int[Array, " rows"]:
    n = values.shape[-1]
    places = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32)[None, :], values.shape)
    first = jnp.where(values == values.max(axis=-1, keepdims=True), places, n).min(axis=-1)
    return jnp.minimum(first, n - 1)  # a row of NaN has no best


def _draw(
    logits: Float[Array, "rows part"],
    params: SamplingParamsBatch,
    lengths: Int[Array, " rows"],
    *,
    truncated: bool,
) -> Int[Array, " rows"]:
    """Sample the tempered, truncated distribution by inverting its cumulative sum.

    Probabilities are rounded to integers, whose sums are exact in any order. So a draw does not
    depend on what it is batched with, or on how the vocabulary is split.
    """
    temperature = jnp.where(params.temperature > 0, params.temperature, 1.0)[:, None]
    scaled = logits / temperature
    peak = mesh.maximum(scaled.max(axis=-1), "vocab")
    weights = jnp.exp(scaled - peak[:, None])
    total = mesh.reduce(weights.sum(axis=-1), "vocab")
    # A power of two, so that the last bit of the total, which does depend on the order, has no say.
    exponent = lax.bitcast_convert_type(total, jnp.int32) >> 23
    scale = lax.bitcast_convert_type((2 * 127 + _MASS_BITS - 1 - exponent) << 23, jnp.float32)
    masses = jnp.round(weights * scale[:, None]).astype(jnp.int32)
    if truncated:
        masses = _truncate(weights, masses, params)
    return _invert(masses, _uniform(params.seed, lengths))


def _truncate(
    weights: Float[Array, "rows part"], masses: Int[Array, "rows part"], params: SamplingParamsBatch
) -> Int[Array, "rows part"]:
    """Zero the masses that top-k, then top-p of what is left, then min-p remove.

    Each keeps the weights at or above a threshold. Non-negative floats are ordered as their bit
    patterns, which are searched digit by digit: a radix search, exact, where a sort of the
    vocabulary would take some 40 times as long on a CPU. Tokens that tie at a threshold stay.
    """
    bits = lax.bitcast_convert_type(weights, jnp.int32)
    top_k = _threshold(bits, jnp.ones_like(bits), params.top_k)
    least = jnp.where(params.top_k > 0, top_k, 0)
    kept = jnp.where(bits >= least[:, None], masses, 0)
    total = mesh.reduce(kept.sum(axis=-1), "vocab")
    wanted = jnp.ceil(total.astype(jnp.float32) * params.top_p).astype(jnp.int32)
    top_p = _threshold(bits, kept, jnp.clip(wanted, 1, total))
    least = jnp.where(params.top_p < 1, jnp.maximum(top_p, least), least)
    # Rounding can leave the best weight just below 1, so min-p is measured against it.
    min_p = params.min_p * mesh.maximum(weights.max(axis=-1), "vocab")
    return jnp.where((bits >= least[:, None]) & (weights >= min_p[:, None]), masses, 0)


def _threshold(
    bits: Int[Array, "rows part"], amounts: Int[Array, "rows part"], target: Int[Array, " rows"]
) -> Int[Array, " rows"]:
    """The greatest number at which the amounts of at least as great ``bits`` reach a target.

    Its digits are found one after the other, all values of a digit in one pass.
    """
    digits = range(1, 1 << _DIGIT_BITS)

    def next_digit(i: Int[Array, ""], found: Int[Array, " rows"]) -> Int[Array, " rows"]:
        shift = _WEIGHT_BITS - _DIGIT_BITS * (i + 1)
        thresholds = [found | (jnp.int32(digit) << shift) for digit in digits]
        # One reduction of several operands reads them once, on every platform.
        sums = lax.reduce(
            tuple(jnp.where(bits >= each[:, None], amounts, 0) for each in thresholds),
            (jnp.int32(0),) * len(digits),
            lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True)),
            (1,),
        )
        reached = mesh.reduce(jnp.stack(sums), "vocab") >= target[None, :]
        return found | (reached.sum(axis=0, dtype=jnp.int32) << shift)

    steps = _WEIGHT_BITS // _DIGIT_BITS
    return lax.fori_loop(0, steps, next_digit, jnp.zeros(bits.shape[0], jnp.int32))


def _uniform(seed: UInt32[Array, "rows 2"], counter: Int[Array, " rows"]) -> Float[Array, " rows"]:
    """One number in [0, 1) per row, from its seed and counter alone."""

    def one(words: UInt32[Array, " 2"], count: Int[Array, ""]) -> Float[Array, ""]:
        key = jax.random.fold_in(jax.random.wrap_key_data(words, impl="threefry2x32"), count)
        return jax.random.uniform(key)

    return jax.vmap(one)(seed, counter)


def _invert(masses: Int[Array, "rows part"], uniform: Float[Array, " rows"]) -> Int[Array, " rows"]:
    """The token at which the cumulative sum of the masses passes ``uniform`` of their total.

    In levels, since a cumulative sum over the whole vocabulary is slow: the device, its block, then
    the token within it. A token of mass 0 is never chosen.
    """
    size = masses.shape[1]
    blocks = _blocks(masses, 0)
    sums = blocks.sum(axis=-1)
    parts = mesh.gather(sums.sum(axis=-1, keepdims=True), "vocab", 1)
    total = parts.sum(axis=-1)
    target = jnp.minimum((uniform * total.astype(jnp.float32)).astype(jnp.int32), total - 1)
    part, target = _first_beyond(parts, target)
    block, target = _first_beyond(sums, target)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    place, _ = _first_beyond(inside, target)
    token = jnp.minimum(block * blocks.shape[2] + place, size - 1) + mesh.first_index("vocab", size)
    return mesh.reduce(jnp.where(part == mesh.first_index("vocab", 1), token, 0), "vocab")


def _first_beyond(
    masses: Int[Array, "rows n"], target: Int[Array, " rows"]
) -> tuple[Int[Array, " rows"], Int[Array, " rows"]]:
    """The first index whose cumulative sum exceeds the target, and the target within it."""
    n = masses.shape[-1]
    cumulative = jnp.cumsum(masses, axis=-1)
    places = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32)[None, :], masses.shape)
    first = jnp.where(cumulative > target[:, None], places, n).min(axis=-1)
    index = jnp.minimum(first, n - 1)
    before = jnp.take_along_axis(cumulative - masses, index[:, None], axis=-1)[:, 0]
    return index, target - before
