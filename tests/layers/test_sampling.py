"""The sampler against plain numpy written from the definitions."""

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from inferneo_jax.config import MeshShape
from inferneo_jax.layers.sampler import (
    Sampler,
    Sampling,
    SamplingParamsBatch,
    Scores,
    argmax,
    sampling_of,
)
from inferneo_jax.planner.hlo import Program
from inferneo_jax.request import GenerationRequest, SamplingParams
from inferneo_jax.runner.inputs import InputBuilder
from inferneo_jax.scheduler.scheduler import DecodeRow, PrefillChunk
from inferneo_jax.scheduler.sequence import Sequence
from inferneo_jax.sharding import mesh as meshes

VOCAB, MAX_LEN = 300, 16
BUILDER = InputBuilder(
    dp_size=1,
    slots=4,
    max_len=MAX_LEN,
    page_len=16,
    vocab_size=VOCAB,
    mask_words=10,
    max_bias=8,
    max_stops=4,
)


@cache
def _sampler(kind: Sampling, shape: MeshShape | None = None, vocab: int = VOCAB) -> Any:
    """Sample and score; on a mesh with the vocabulary split, in parts with padding."""
    sampler = Sampler(vocab, num_top=5)

    def step(logits: Any, *arguments: Any) -> tuple[jax.Array, Scores]:
        ids = sampler(kind, logits, *arguments)
        return ids, sampler.score(logits, ids)

    if shape is None:
        return jax.jit(step)
    mesh = meshes.make_mesh(shape)
    padding = -vocab % meshes.parts(mesh, "vocab")
    split = jax.jit(
        jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(meshes.spec(None, "vocab"), *[PartitionSpec()] * 4),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
    )
    return lambda logits, *arguments: split(
        jnp.pad(logits, ((0, 0), (0, padding)), constant_values=-jnp.inf), *arguments
    )


def _rows(requests: list[GenerationRequest]) -> SamplingParamsBatch:
    rows = [BUILDER.slot_row(Sequence(r, lambda _: None, 0)).sampling for r in requests]
    return jax.tree.map(lambda *parts: np.stack([np.asarray(p) for p in parts]), *rows)


def _request(prompt: tuple[int, ...] = (1,), **fields: Any) -> GenerationRequest:
    sampling = {k: fields.pop(k) for k in list(fields) if k in SamplingParams.__slots__}
    return GenerationRequest(
        id="x", prompt=prompt, max_tokens=9, sampling=SamplingParams(**sampling), **fields
    )


def _sample(
    logits: np.ndarray,
    requests: list[GenerationRequest],
    histories: list[list[int]],
    kind: Sampling | None = None,
    shape: MeshShape | None = None,
) -> tuple[np.ndarray, Any]:
    """Tokens and scores, from the least kind of sampling that all requests need, or another."""
    history = np.zeros((len(requests), MAX_LEN), np.int32)
    for row, tokens in enumerate(histories):
        history[row, : len(tokens)] = tokens
    lengths = np.array([len(tokens) for tokens in histories], np.int32)
    slots = np.arange(len(requests), dtype=np.int32)
    params = _rows(requests)
    least = Sampling(sampling_of(params, VOCAB).max())
    ids, scores = _sampler(least if kind is None else kind, shape)(
        jnp.asarray(logits, jnp.float32), params, jnp.asarray(history), slots, lengths
    )
    return np.asarray(ids), jax.tree.map(np.asarray, scores)


def _kept(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The tokens that may be drawn, by sorting."""
    p = np.exp((logits - logits.max()) / params.temperature)
    order = np.argsort(-p, kind="stable")
    keep = np.zeros(len(p), bool)
    keep[order[: params.top_k or len(p)]] = True
    mass = np.cumsum(np.where(keep[order], p[order], 0.0))
    needed = int(np.searchsorted(mass, params.top_p * mass[-1])) + 1
    keep[order[needed:]] = False
    return keep & (p >= params.min_p)


def _logits(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, VOCAB)).astype(np.float32) * 2


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32),
    st.floats(0.1, 2),
    st.integers(0, 40),
    st.floats(0.05, 1),
    st.sampled_from([0.0, 0.01, 0.3, 1.0]),
)
def test_draws_come_from_the_kept_set(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    fields = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    logits = _logits(1, seed % 1000)
    requests = [_request(seed=seed + i, **fields) for i in range(4)]
    ids, _ = _sample(np.repeat(logits, 4, axis=0), requests, [[1]] * 4)
    kept = _kept(logits[0].astype(np.float64), SamplingParams(**fields))
    # A token whose mass ends within rounding of top_p may fall to either side.
    loose = _kept(
        logits[0].astype(np.float64),
        SamplingParams(**(fields | {"top_p": min(1.0, top_p + 1e-5)})),
    )
    assert all(kept[i] or loose[i] for i in ids)


def test_frequencies_follow_the_distribution() -> None:
    params = {"temperature": 0.7, "top_p": 0.9, "top_k": 30}
    logits = _logits(1, 5)
    draws = []
    for seed in range(375):
        requests = [_request(seed=16 * seed + i, **params) for i in range(16)]
        ids, _ = _sample(np.repeat(logits, 16, axis=0), requests, [[1] * (seed % 9 + 1)] * 16)
        draws += ids.tolist()
    kept = _kept(logits[0].astype(np.float64), SamplingParams(**params))
    p = np.where(kept, np.exp(logits[0].astype(np.float64) / 0.7), 0)
    p /= p.sum()
    counts = np.bincount(draws, minlength=VOCAB)
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(kept))
    expected = p[kept] * len(draws)
    chi_square = ((counts[kept] - expected) ** 2 / expected).sum()
    freedom = kept.sum() - 1
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


def test_penalties_follow_their_definitions() -> None:
    logits = _logits(4, 1)
    prompt, output = (7, 8, 8), [9, 9, 10]
    fields = [
        {"frequency_penalty": 1.5},
        {"presence_penalty": 1.5},
        {"repetition_penalty": 1.8},
        {"frequency_penalty": -2.0, "presence_penalty": 0.5, "repetition_penalty": 0.5},
    ]
    requests = [_request(prompt, temperature=0.0, **f) for f in fields]
    for row in range(4):
        logits[row, [7, 8, 9, 10, 11]] = [6, 5.9, 6.1, 5.8, 4.3]
    expected = logits.copy()
    counts = np.bincount(output, minlength=VOCAB)
    seen = np.isin(np.arange(VOCAB), (*prompt, *output))
    for row, request in enumerate(requests):
        p = request.sampling
        x = expected[row]
        x[seen] = np.where(
            x[seen] > 0, x[seen] / p.repetition_penalty, x[seen] * p.repetition_penalty
        )
        x -= counts * p.frequency_penalty + (counts > 0) * p.presence_penalty
    ids, _ = _sample(logits, requests, [[*prompt, *output]] * 4)
    assert ids.tolist() == expected.argmax(axis=-1).tolist()
    assert len(set(ids.tolist())) > 1


def test_bias_and_banned_stops() -> None:
    logits = np.zeros((4, VOCAB), np.float32)
    logits[:, 20] = 5
    requests = [
        _request(temperature=0.0),
        _request(temperature=0.0, logit_bias={20: -100.0, 33: 1.0}),
        _request(temperature=0.0, logit_bias={299: 100.0}),
        _request(temperature=0.0, stop_token_ids=frozenset({20}), min_tokens=2),
    ]
    assert _sample(logits, requests, [[1]] * 4)[0].tolist() == [20, 33, 299, 0]
    assert _sample(logits, requests, [[1, 2, 3]] * 4)[0].tolist() == [20, 33, 299, 20]


def test_scores_are_of_the_models_own_distribution() -> None:
    logits = _logits(2, 3)
    requests = [_request(temperature=2.0, top_k=1, logprobs=2, seed=i) for i in range(2)]
    ids, scores = _sample(logits, requests, [[1]] * 2)
    exact = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=-1, keepdims=True))
    rows = np.arange(2)
    np.testing.assert_allclose(scores.chosen, exact[rows, ids], atol=1e-5)
    np.testing.assert_array_equal(scores.top_ids, np.argsort(-logits, axis=-1)[:, :5])
    np.testing.assert_allclose(
        scores.top, np.take_along_axis(exact, scores.top_ids, axis=-1), atol=1e-5
    )


@pytest.mark.parametrize("row", [[0, 3, 3, 1], [-1, -2], [5.0]])
def test_argmax_is_the_first_of_the_best(row: list[float]) -> None:
    assert argmax(jnp.asarray([row], jnp.float32)).tolist() == [int(np.argmax(row))]


def test_argmax_of_nan_is_a_token() -> None:
    assert 0 <= int(argmax(jnp.full((1, 7), jnp.nan, jnp.float32))[0]) < 7


def test_parameters_out_of_range_are_named() -> None:
    from inferneo_jax.errors import RequestError

    for name, value in [
        ("temperature", 2.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_k", -1),
        ("min_p", 1.5),
        ("frequency_penalty", -2.5),
        ("repetition_penalty", 0.0),
        ("seed", 2**64),
        ("logit_bias", {1: 101.0}),
    ]:
        with pytest.raises(RequestError) as caught:
            SamplingParams(**{name: value})
        assert caught.value.param == name


def test_a_row_is_truncated_alike_alone_and_beside_others() -> None:
    fields: list[dict[str, Any]] = [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.2}, {}]
    requests = [_request(temperature=1.0, seed=i, **each) for i, each in enumerate(fields)]
    for seed in range(20):
        logits = _logits(4, seed)
        together, _ = _sample(logits, requests, [[1]] * 4)
        alone = [_sample(logits[i : i + 1], [requests[i]], [[1]])[0][0] for i in range(4)]
        assert together.tolist() == alone


KINDS: dict[Sampling, list[dict[str, Any]]] = {
    Sampling.GREEDY: [{"temperature": 0.0}, {"temperature": 0.0, "top_k": 3, "top_p": 0.5}],
    Sampling.DRAWN: [{"temperature": 1.0}, {"temperature": 0.3}],
    Sampling.TRUNCATED: [{"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.7}],
    Sampling.SHAPED: [
        {"temperature": 0.0, "frequency_penalty": 0.5},
        {"temperature": 1.0, "top_k": 20, "presence_penalty": 0.5, "repetition_penalty": 1.3},
        {"temperature": 0.0, "logit_bias": {3: 4.0, 299: 4.0}},
        {"temperature": 1.0, "stop_token_ids": frozenset({7, 299}), "min_tokens": 2},
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_host_finds_the_least_that_a_request_needs(kind: Sampling) -> None:
    for fields in KINDS[kind]:
        assert sampling_of(_rows([_request(**fields)]), VOCAB).tolist() == [kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_sampled_alike_by_every_program_that_can(kind: Sampling) -> None:
    requests = [_request((7, 8), seed=i, **each) for i, each in enumerate(KINDS[kind])]
    for seed in range(10):
        logits = _logits(len(requests), seed)
        found = [
            _sample(logits, requests, [[7, 8, 9]] * len(requests), other)[0].tolist()
            for other in Sampling
            if other >= kind
        ]
        assert found == [found[0]] * len(found)


@pytest.mark.parametrize("shape", [MeshShape(1, 2), MeshShape(1, 8)], ids=str)
def test_a_split_vocabulary_is_sampled_as_a_whole_one(shape: MeshShape) -> None:
    every = [(kind, fields) for kind, many in KINDS.items() for fields in many]
    requests = [_request((7, 8), seed=i, **each) for i, (_, each) in enumerate(every)]
    histories = [[7, 8, 9, 299]] * len(requests)
    for seed in range(20):
        logits = _logits(len(requests), seed)
        logits[:, 200] = logits.max(axis=-1)  # ties go to the first token, whoever has it
        for kind in (Sampling.GREEDY, Sampling.SHAPED):
            whole, scores = _sample(logits, requests, histories, kind)
            split, same = _sample(logits, requests, histories, kind, shape)
            assert split.tolist() == whole.tolist()
            np.testing.assert_array_equal(same.top_ids, scores.top_ids)
            np.testing.assert_allclose(same.top, scores.top, atol=1e-5)
            np.testing.assert_allclose(same.chosen, scores.chosen, atol=1e-5)


def test_no_row_of_logits_leaves_its_device() -> None:
    """What devices exchange for a row does not grow with the vocabulary."""
    rows, vocab = 4, 96_000
    params = _rows([_request(top_k=5, top_p=0.9, frequency_penalty=0.5)] * rows)
    logits = np.zeros((rows, vocab), np.float32)
    step = _sampler(Sampling.SHAPED, MeshShape(1, 8), vocab)
    slots = np.arange(rows, dtype=np.int32)
    history = np.zeros((rows, MAX_LEN), np.int32)
    text = jax.jit(step).lower(logits, params, history, slots, slots).compile().as_text()
    exchanged = Program(text).collectives()
    assert exchanged
    assert max(each.num_bytes for each in exchanged) <= 4 * rows * 8 * 7


def test_a_search_gives_the_exact_weight_of_top_k() -> None:
    """Of weights that differ in the last bit only, those beyond ``top_k`` are never drawn."""
    logits = np.full((16, VOCAB), -30.0, np.float32)
    close = np.log(np.float32(0.5) + np.arange(8, dtype=np.float32) * np.float32(2**-22))
    logits[:, 100:108] = close
    logits[:, 5] = 0.0
    drawn = set()
    for seed in range(8):
        requests = [_request(seed=16 * seed + i, temperature=1.0, top_k=5) for i in range(16)]
        drawn |= set(_sample(logits, requests, [[1]] * 16)[0].tolist())
    assert drawn == {5, 104, 105, 106, 107}


def test_inputs_of_a_step_are_padded_with_no_slot() -> None:
    sequence = Sequence(_request((1, 2, 3)), lambda _: None, 0, slot=2, blocks=[5])
    inputs = BUILDER.prefill([[PrefillChunk(sequence, 1, 2, sample=True, ends_prompt=True)]], 2)
    expected = [[2, 4], [1, 0], [2, 1], [True, False], [False, False]]
    assert [np.asarray(x).tolist() for x in inputs] == expected
    assert BUILDER.decode([], 2)[0].slots.tolist() == [4, 4]


def test_pages_are_sent_at_admission_and_when_a_step_reaches_them() -> None:
    builder = dataclasses.replace(BUILDER, page_len=4)
    sequence = Sequence(_request((1, 2, 3)), lambda _: None, 0, slot=2, blocks=[5, 7, 6])
    assert builder.slot_row(sequence).block_tables.tolist() == [5, 7, 6, 0]
    assert builder.decode([[DecodeRow(sequence, 4)]], 2)[0].pages.tolist() == [[7], [0]]
    # Of three steps from position 6 on, the row takes part in two.
    steps = builder.decode([[DecodeRow(sequence, 7, num_steps=2)]], 1, 3)
    assert [(*each.slots, *each.positions, *each.pages[0]) for each in steps[:2]] == [
        (2, 7, 7),
        (2, 8, 6),
    ]
    assert steps[2].slots.tolist() == [4]
    # Five positions from 7 on lie in three pages at most, and here in two.
    drafted = builder.verify([[DecodeRow(sequence, 7, (1, 2, 3, 4))]], 1, 5)
    assert drafted.pages.tolist() == [[7, 6, 0]]


@pytest.mark.parametrize("shape", [None, MeshShape(data=1, model=4), MeshShape(data=1, model=8)])
def test_only_allowed_tokens_keep_their_logits(shape: MeshShape | None) -> None:
    vocab, rows = 301, 3
    sampler, rng = Sampler(vocab, num_top=5), np.random.default_rng(0)
    logits = rng.normal(size=(rows, vocab)).astype(np.float32)
    allowed = rng.random((rows, vocab)) < 0.3
    mesh = meshes.make_mesh(shape or MeshShape(data=1, model=1))
    padding = -vocab % meshes.parts(mesh, "vocab")
    words = -(-(vocab + padding) // 32)
    bits = np.zeros((rows, 32 * words), np.uint8)
    bits[:, :vocab] = allowed
    masks = np.packbits(bits, axis=1, bitorder="little").view(np.uint32)
    constrain = jax.jit(
        jax.shard_map(
            sampler.constrain,
            mesh=mesh,
            in_specs=(meshes.spec(None, "vocab"), PartitionSpec()),
            out_specs=meshes.spec(None, "vocab"),
            check_vma=False,
        )
    )
    found = constrain(np.pad(logits, ((0, 0), (0, padding))), masks)
    np.testing.assert_array_equal(np.asarray(found)[:, :vocab], np.where(allowed, logits, -np.inf))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_brings_back_a_token_that_is_not_allowed(temperature: float) -> None:
    logits = np.full((1, VOCAB), -np.inf, np.float32)
    logits[0, [7, 9]] = 0.0
    wants = {3: 100.0, 9: -100.0}
    shaped = {"logit_bias": wants, "repetition_penalty": 10.0, "frequency_penalty": -2.0}
    request = _request(temperature=temperature, **shaped)
    ids, _ = _sample(logits, [request], [[1, 3, 3]])
    assert ids.tolist() == [7]
    # Where only a stop token is allowed, it ends an output that is too short.
    logits[0, 7] = -np.inf
    stopped = _request(temperature=temperature, stop_token_ids=frozenset({4, 9}), min_tokens=5)
    ids, _ = _sample(logits, [stopped], [[1, 3, 3]])
    assert ids.tolist() == [9]
