"""The catalog's models against transformers, and the main laws on real text."""

import numpy as np
import pytest

from inferneo_jax.engine.embedder import Embedder
from inferneo_jax.engine.served import LanguageModel
from inferneo_jax.request import SamplingParams
from tests.support.tiny_model import Collected, golden, submit

pytestmark = pytest.mark.real

CHAT = golden("chat")
NEAR_TIE = 0.02
"""Nats between the reference's two best tokens below which either is right."""


@pytest.fixture(scope="module")
def greedy(real_model: LanguageModel) -> dict[str, Collected]:
    """All prompts at once, as a server would see them."""
    runs = {
        case["name"]: submit(
            real_model.engine, tuple(case["prompt_ids"]), 48, logprobs=5, cache_salt=b"greedy"
        )
        for case in CHAT
    }
    return {name: run.wait() for name, run in runs.items()}


@pytest.mark.parametrize("case", CHAT, ids=lambda case: case["name"])
def test_greedy_tokens_equal_the_reference(
    greedy: dict[str, Collected], case: dict[str, list[float]]
) -> None:
    run = greedy[str(case["name"])]
    wanted, margins = case["output_ids"], case["margins"]
    assert len(run.tokens) == len(wanted) == 48
    for i, (token, expected) in enumerate(zip(run.tokens, wanted, strict=True)):
        if token != expected:
            assert margins[i] < NEAR_TIE
            return  # from here on the texts differ
        assert run.logprobs[i].logprob == pytest.approx(case["logprobs"][i], abs=1e-3)
        assert [score for _, score in run.logprobs[i].top] == pytest.approx(
            case["top_logprobs"][i], abs=1e-3
        )


def test_prompt_log_probabilities_equal_the_reference(real_model: LanguageModel) -> None:
    cases = [case for case in CHAT if "prompt_logprobs" in case]
    assert cases
    for case in cases:
        run = submit(real_model.engine, tuple(case["prompt_ids"]), 0, prompt_logprobs=0).wait()
        scores = run.outputs[-1].prompt_logprobs
        assert scores is not None
        got = [entry.logprob for entry in scores if entry]
        wanted = [value for value in case["prompt_logprobs"] if value is not None]
        assert got == pytest.approx(wanted, abs=1e-3)


def test_alone_equals_in_the_batch(real_model: LanguageModel, greedy: dict[str, Collected]) -> None:
    for case in CHAT[:3]:
        alone = submit(
            real_model.engine, tuple(case["prompt_ids"]), 24, logprobs=5, cache_salt=b"alone"
        )
        assert alone.tokens == greedy[case["name"]].tokens[:24]


def test_a_shared_prefix_equals_a_fresh_one(
    real_model: LanguageModel, greedy: dict[str, Collected]
) -> None:
    case = max(CHAT, key=lambda case: len(case["prompt_ids"]))
    again = submit(real_model.engine, tuple(case["prompt_ids"]), 24, cache_salt=b"greedy")
    assert again.tokens == greedy[case["name"]].tokens[:24]
    assert again.outputs[0].cached_tokens == (len(case["prompt_ids"]) - 1) // 16 * 16


def test_seeds_repeat_in_any_company(real_model: LanguageModel) -> None:
    ids = tuple(CHAT[0]["prompt_ids"])
    sampling = SamplingParams(temperature=0.9, top_p=0.95, seed=11)
    alone = submit(real_model.engine, ids, 24, sampling=sampling).tokens
    runs = [
        submit(real_model.engine, ids, 24, sampling=sampling if i == 3 else SamplingParams(seed=i))
        for i in range(6)
    ]
    assert runs[3].tokens == alone
    assert len({tuple(run.tokens) for run in runs}) == 6


def test_embeddings_equal_the_reference(real_embedder: Embedder) -> None:
    cases = golden("embeddings")
    vectors = real_embedder.embed([case["ids"] for case in cases]).result(timeout=120)
    np.testing.assert_allclose(vectors, [case["embedding"] for case in cases], atol=1e-4)


def test_embeddings_alone_equal_in_a_batch(real_embedder: Embedder) -> None:
    ids = [case["ids"] for case in golden("embeddings")]
    together = real_embedder.embed(ids * 20).result(timeout=120)
    for i, text in enumerate(ids):
        alone = real_embedder.embed([text]).result(timeout=60)[0]
        np.testing.assert_allclose(together[i + len(ids)], alone, atol=1e-5)


def test_a_large_embedding_job_lets_a_small_one_pass(real_embedder: Embedder) -> None:
    ids = [case["ids"] for case in golden("embeddings")]
    large = real_embedder.embed(ids * 100)
    small = real_embedder.embed(ids[:1])
    small.result(timeout=120)
    assert not large.done()
    assert np.isfinite(large.result(timeout=300)).all()


def test_a_cancelled_embedding_job_is_dropped(real_embedder: Embedder) -> None:
    ids = [case["ids"] for case in golden("embeddings")]
    blocker, dropped = real_embedder.embed(ids * 20), real_embedder.embed(ids * 500)
    assert dropped.cancel()
    blocker.result(timeout=120)
    real_embedder.embed(ids[:1]).result(timeout=30)
