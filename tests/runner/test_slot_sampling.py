"""The host knows what the rows of a step need of sampling."""

from typing import Any

import pytest

from inferneo_jax.engine.engine import Engine
from inferneo_jax.layers.sampler import Sampling
from inferneo_jax.request import Constraint, GenerationRequest, SamplingParams
from inferneo_jax.runner.inputs import InputBuilder
from inferneo_jax.runner.programs import Sample, Score, ScorePrompt
from inferneo_jax.runner.slot_sampling import SlotSampling
from inferneo_jax.scheduler.scheduler import DecodeRow, PrefillChunk
from inferneo_jax.scheduler.sequence import Sequence
from tests.support.instant_device import instant_runner
from tests.support.tiny_model import GREEDY, prompt, submit

BUILDER = InputBuilder(
    dp_size=2,
    slots=4,
    max_len=16,
    page_len=16,
    vocab_size=97,
    mask_words=4,
    max_bias=8,
    max_stops=4,
)
DRAWN = SamplingParams(temperature=1.0)
TRUNCATED = SamplingParams(temperature=1.0, top_k=5)
SHAPED = SamplingParams(temperature=0.0, frequency_penalty=0.5)


def _sequence(slot: int, sampling: SamplingParams, **fields: Any) -> Sequence:
    request = GenerationRequest(id="x", prompt=(1, 2, 3), max_tokens=8, sampling=sampling, **fields)
    return Sequence(request, lambda _: None, 0, slot=slot, blocks=[1])


def _chunk(sequence: Sequence, *, last: bool) -> PrefillChunk:
    return PrefillChunk(sequence, 0, 2, sample=last, ends_prompt=last)


def _found(known: SlotSampling, inputs: Any) -> tuple[Sampling, bool]:
    return known.kind(inputs), known.scored(inputs)


def test_only_rows_of_a_step_count_and_chunks_where_they_end_prompts() -> None:
    known = SlotSampling(BUILDER.dp_size, BUILDER.slots, BUILDER.vocab_size)
    greedy, drawn = _sequence(0, GREEDY), _sequence(3, DRAWN, logprobs=0)
    truncated, shaped = _sequence(0, TRUNCATED), _sequence(2, SHAPED, logprobs=2)
    known.admit(*BUILDER.admit([[greedy, drawn], [truncated]], 2))
    known.admit(*BUILDER.admit([[], [shaped]], 1))
    rows = {each: DecodeRow(each, 2) for each in (greedy, drawn, truncated, shaped)}

    def decode(*ranks: list[Sequence]) -> tuple[Sampling, bool]:
        (inputs,) = BUILDER.decode([[rows[each] for each in rank] for rank in ranks], 2)
        return _found(known, inputs)

    assert decode([], []) == (Sampling.GREEDY, False)
    assert decode([greedy], []) == (Sampling.GREEDY, False)
    assert decode([greedy, drawn], []) == (Sampling.DRAWN, True)
    assert decode([greedy], [truncated]) == (Sampling.TRUNCATED, False)
    assert decode([], [shaped, truncated]) == (Sampling.SHAPED, True)
    for last, found in ((False, (Sampling.GREEDY, False)), (True, (Sampling.SHAPED, True))):
        chunks = [[], [_chunk(shaped, last=last)]]
        assert _found(known, BUILDER.prefill(chunks, 2)) == found
        mixed = BUILDER.mixed([[rows[greedy]], []], 4, chunks, 2)
        assert _found(known, mixed) == found
    beside = BUILDER.mixed(
        [[rows[drawn]], [rows[truncated]]], 4, [[_chunk(greedy, last=True)], []], 1
    )
    assert _found(known, beside) == (Sampling.TRUNCATED, True)
    known.admit(*BUILDER.admit([[], [_sequence(2, GREEDY)]], 1))  # the slot is given to another
    assert decode([], [shaped]) == (Sampling.GREEDY, False)


def test_rows_with_grammars_are_known_until_their_slots_are_given_to_others() -> None:
    known = SlotSampling(BUILDER.dp_size, BUILDER.slots, BUILDER.vocab_size)
    free, constrained = (
        _sequence(2, GREEDY),
        _sequence(1, GREEDY, constraint=Constraint(grammar="")),
    )
    known.admit(*BUILDER.admit([[free], [constrained]], 1))
    (beside,) = BUILDER.decode([[DecodeRow(free, 2)], []], 2)
    (both,) = BUILDER.decode([[DecodeRow(free, 2)], [DecodeRow(constrained, 2)]], 2)
    begun, ended = (
        BUILDER.prefill([[], [_chunk(constrained, last=last)]], 2) for last in (False, True)
    )
    found = [known.constrained(each) for each in (beside, both, begun, ended)]
    assert found == [False, True, False, True]
    known.admit(*BUILDER.admit([[], [_sequence(1, GREEDY)]], 1))
    assert not known.constrained(both)


@pytest.mark.parametrize(
    ("fields", "kind", "scored"),
    [
        ({"sampling": GREEDY}, Sampling.GREEDY, set()),
        ({"sampling": DRAWN}, Sampling.DRAWN, set()),
        ({"sampling": TRUNCATED, "logprobs": 1}, Sampling.TRUNCATED, {Score}),
        ({"sampling": SHAPED}, Sampling.SHAPED, set()),
        ({"sampling": GREEDY, "prompt_logprobs": 1}, Sampling.GREEDY, {ScorePrompt}),
    ],
)
def test_a_step_runs_no_more_than_its_requests_need(
    fields: dict[str, Any], kind: Sampling, scored: set[type]
) -> None:
    ran: set[Any] = set()

    def note(key: Any, results: Any) -> Any:
        ran.add(key)
        return results

    engine = Engine(instant_runner(note=note))
    try:
        requests = [submit(engine, prompt(9, seed=i), 6, **fields) for i in range(3)]
        assert all(len(each.tokens) == 6 for each in requests)
    finally:
        engine.stop()
    assert {each.kind for each in ran if isinstance(each, Sample)} == {kind}
    assert {type(each) for each in ran if isinstance(each, Score | ScorePrompt)} == scored
