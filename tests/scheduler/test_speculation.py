"""One law: with drafts, requests get what they get without. And drafts are what came before."""

from collections.abc import Callable
from collections.abc import Sequence as Tokens
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferneo_jax.engine.engine import Engine
from inferneo_jax.request import GenerationRequest
from inferneo_jax.scheduler.sequence import Sequence
from inferneo_jax.scheduler.speculation import (
    Acceptance,
    Draft,
    NGramIndex,
    SpeculativeConfig,
    Speculator,
    StepCosts,
    accepted_tokens,
)
from tests.support.tiny_model import MIXED, Collected, close, close_all, prompt, submit

Make = Callable[..., Engine]
SIZES: dict[str, Any] = {"slots": 4, "prefill_chunks": (8,), "row_buckets": (4,)}
REPEATS = prompt(5) * 3 + prompt(3)


def _outputs(engine: Engine, together: bool) -> list[Collected]:
    found: list[Collected] = []
    for i, fields in enumerate(MIXED):
        found.append(submit(engine, REPEATS[i:], 24, **fields))
        if not together:
            found[-1].wait()
    return [each.wait() for each in found]


@pytest.mark.parametrize("together", [False, True])
def test_speculative_equals_plain(tiny_engine: Make, together: bool) -> None:
    plain = tiny_engine(**SIZES, speculation="off")
    drafted = tiny_engine(**SIZES, speculation="ngram")
    close_all(_outputs(drafted, together), _outputs(plain, together))
    stats, without = drafted.stats(), plain.stats()
    assert stats.output_tokens == without.output_tokens
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    assert stats.steps < without.steps
    assert (without.drafted_tokens, stats.compiles_after_ready) == (0, 0)
    assert not drafted._scheduler._speculator._drafters, "it keeps drafts of what has ended"


def test_a_stop_token_inside_a_draft_ends_the_request(tiny_engine: Make) -> None:
    engine = tiny_engine(**SIZES, speculation="ngram")
    whole = submit(engine, REPEATS, 24).tokens
    assert engine.stats().accepted_tokens
    for stop in sorted(set(whole)):
        got = submit(engine, REPEATS, 24, stop_token_ids=frozenset({stop}))
        assert got.tokens == whole[: whole.index(stop) + 1]
        assert got.finish_reason == "stop"


@pytest.mark.parametrize("most", [1, 2, 3, 7])
def test_no_more_tokens_come_than_were_asked_for(tiny_engine: Make, most: int) -> None:
    engine = tiny_engine(**SIZES, speculation="ngram")
    whole = submit(engine, REPEATS, 24).tokens
    assert submit(engine, REPEATS, most).tokens == whole[:most]


def test_drafts_give_way_where_blocks_are_short(tiny_engine: Make) -> None:
    few = tiny_engine(**SIZES, speculation="ngram", kv_tokens=64)
    plain = tiny_engine(**SIZES, speculation="off")
    close_all(*([submit(e, REPEATS[i:], 30) for i in range(4)] for e in (few, plain)))
    assert few.stats().preemptions > 0


def test_a_reader_that_stops_reading_gets_the_same(tiny_engine: Make) -> None:
    engine = tiny_engine(**SIZES, speculation="ngram")
    whole = submit(engine, REPEATS, 24)
    whole.wait()
    again = submit(engine, REPEATS, 24)
    again.wait_for_tokens(3)
    engine.pause(again.request.id)
    engine.resume(again.request.id)
    close(again, whole)


def _looked_up(tokens: Tokens[int], most: int) -> list[int]:
    """By reading all of it: where the newest tokens came last, and what followed."""
    for size in (3, 2):
        suffix = list(tokens[len(tokens) - size :])
        for start in range(len(tokens) - size - 1, -1, -1):
            if len(tokens) >= size and list(tokens[start : start + size]) == suffix:
                draft = list(tokens)
                for i in range(most):
                    draft.append(draft[start + size + i])
                return draft[len(tokens) :]
    return []


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 6), st.integers(1, 9))
def test_a_draft_is_what_followed_the_last_time(tokens: list[int], most: int, step: int) -> None:
    index = NGramIndex()
    for end in range(1, len(tokens) + 1, step):
        index.extend(tokens[len(index.tokens) : end])
        assert index.draft(most) == _looked_up(tokens[:end], most)


def test_a_long_prompt_is_indexed_in_parts() -> None:
    index = NGramIndex()
    index.extend(prompt(12) * 400)
    drafts = [index.draft(5) for _ in range(6)]
    assert drafts[0] == []
    assert drafts[-1] == list(prompt(12)[:5])
    assert sum(not draft for draft in drafts) == 4


def test_no_draft_is_made_during_a_cooldown_nor_beyond_the_last_token() -> None:
    request = GenerationRequest(id="0", prompt=(1, 2, 3) * 3, max_tokens=100)
    sequence = Sequence(request, lambda _: None, 0)
    speculator = Speculator(SpeculativeConfig(max_tokens=4, costs=(StepCosts(2.0),) * 2))
    assert speculator.allows(2)
    assert not speculator.allows(3)
    assert speculator.draft(sequence) == Draft((1, 2, 3, 1), 4)
    while speculator.draft(sequence).count:
        speculator.update(sequence, 4, 0, by_model=False)
    for _ in range(8):
        assert not speculator.draft(sequence).count
        speculator.decoded(sequence)
    assert speculator.draft(sequence).count
    sequence.output += [1, 2, 3] * 32
    assert speculator.draft(sequence) == Draft((1, 2, 3), 3)
    speculator.forget(sequence)
    assert not speculator._drafters
    assert not Speculator(None).allows(0)


def test_a_draft_is_accepted_as_far_as_it_is_sampled() -> None:
    assert accepted_tokens([], [5]) == (5,)
    assert accepted_tokens([1, 2, 3], [1, 2, 3, 4]) == (1, 2, 3, 4)
    assert accepted_tokens([1, 2, 3], [1, 7, 3, 4]) == (1, 7)
    assert accepted_tokens([1, 2], [9, 2, 4, 0]) == (9,)


def test_drafts_that_do_not_pay_are_made_ever_less_often() -> None:
    acceptance, cooldowns = Acceptance(), []
    for _ in range(100):
        acceptance.update(5, 0, cost=1.5)
        if acceptance.cooldown:
            cooldowns.append(acceptance.cooldown)
            acceptance.cooldown = 0
    assert cooldowns == sorted(cooldowns)
    assert cooldowns[0] < cooldowns[-1] == 256
    for _ in range(5):
        acceptance.update(5, 5, cost=1.5)
        assert acceptance.cooldown == 0
    acceptance.update(5, 0, cost=0.0)
    assert acceptance.cooldown == 0
