"""One law: what a grammar constrains matches it, whatever sampling, batch and drafts."""

import json
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest

from inferneo_jax.engine.engine import Engine
from inferneo_jax.errors import ConstraintError, EngineStoppedError, RequestError
from inferneo_jax.request import Constraint, SamplingParams
from inferneo_jax.text.grammar import (
    GrammarCompiler,
    choice_constraint,
    json_schema_constraint,
    regex_constraint,
)
from tests.support.tiny_model import (
    MIXED,
    TINY,
    Collected,
    close_all,
    prompt,
    submit,
)
from tests.support.walks import tiny_speller

Make = Callable[..., Engine]
SIZES: dict[str, Any] = {"slots": 4, "prefill_chunks": (8,), "row_buckets": (4,)}
"""Those of the tests of drafts, so that programs are compiled once."""
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "age": {"type": "integer", "maximum": 99}},
    "required": ["kind", "age"],
    "additionalProperties": False,
}
CODE = re.compile(r"[a-c]{3,9}-(\d\d|END)")


SPELLER = tiny_speller()
GRAMMARS = GrammarCompiler(SPELLER, -(-TINY.vocab_size // 32))
ENDS = {"stop_token_ids": SPELLER.eos_token_ids}


@pytest.fixture
def make(tiny_engine: Make) -> Make:
    return lambda **changes: tiny_engine(grammars=GRAMMARS, **changes)


def _text(collected: Collected) -> str:
    return SPELLER.decode(collected.tokens)


def _code(engine: Engine, seed: int = 0, **fields: Any) -> Collected:
    constraint = regex_constraint(CODE.pattern)
    return submit(engine, prompt(5 + seed, seed=seed), 24, constraint=constraint, **ENDS | fields)


@pytest.mark.parametrize("speculation", ["off", "ngram"])
def test_what_is_constrained_is_valid_whatever_the_sampling(make: Make, speculation: str) -> None:
    engine = make(**SIZES, speculation=speculation)
    for i, fields in enumerate(MIXED):
        alone = _code(engine, i, **fields).wait()
        assert CODE.fullmatch(_text(alone)), _text(alone)
        assert alone.finish_reason == "stop"
        assert len(alone.logprobs) == (len(alone.tokens) if "logprobs" in fields else 0)
    assert engine.stats().compiles_after_ready == 0


def test_alone_equals_in_any_batch_and_disturbs_nobody(make: Make) -> None:
    engine = make(**SIZES, speculation="off")
    plain = [submit(engine, prompt(9 + i, seed=i), 24, **MIXED[i]).wait() for i in range(6)]
    alone = [_code(engine, i, **MIXED[i]).wait() for i in range(6)]
    together = [
        (_code(engine, i, **MIXED[i]), submit(engine, prompt(9 + i, seed=i), 24, **MIXED[i]))
        for i in range(6)
    ]
    close_all(alone, [each for each, _ in together])
    close_all(plain, [each for _, each in together])


def test_preempted_and_chunked_equal_undisturbed(make: Make) -> None:
    roomy = make(**SIZES, speculation="off")
    cramped = make(kv_tokens=64, prefill_chunks=(4,))

    def answers(engine: Engine) -> list[Collected]:
        found = [
            submit(
                engine,
                prompt(12 + i, seed=i),
                30,
                constraint=regex_constraint("([a-f]{2}[0-9]){6,8}"),
                sampling=SamplingParams(seed=i),
                logprobs=1,
                **ENDS,
            )
            for i in range(4)
        ]
        return [each.wait() for each in found]

    expected, found = answers(roomy), answers(cramped)
    close_all(expected, found)
    assert cramped.stats().preemptions > 0
    assert all(re.fullmatch("([a-f]{2}[0-9]){6,8}", _text(each)) for each in found)


def test_speculative_equals_plain_and_forced_tokens_take_no_steps(make: Make) -> None:
    plain, drafted = make(**SIZES, speculation="off"), make(**SIZES, speculation="ngram")
    forced = choice_constraint(["abcabcabcabcabcabcabcabc!", "abcabcabcabcabcabcabcabc?"])

    def answers(engine: Engine) -> list[Collected]:
        found = [_code(engine, i, **MIXED[i]) for i in range(4)]
        found += [
            submit(engine, prompt(5), 30, constraint=forced, **ENDS | MIXED[i]) for i in range(4)
        ]
        return [each.wait() for each in found]

    expected, found = answers(plain), answers(drafted)
    close_all(expected, found)
    assert all(_text(each)[:-1] == "abcabcabcabcabcabcabcabc" for each in found[4:])
    stats = drafted.stats()
    assert stats.accepted_tokens > 40
    assert stats.steps < plain.stats().steps * 0.7


def test_json_is_valid_by_its_schema_or_cut_short(make: Make) -> None:
    engine = make(**SIZES, speculation="ngram")
    requests = [
        submit(
            engine,
            prompt(4, seed=i),
            60,
            constraint=json_schema_constraint(SCHEMA),
            sampling=SamplingParams(seed=i, temperature=1.5),
            **ENDS,
        )
        for i in range(12)
    ]
    whole = [each for each in requests if each.finish_reason == "stop"]
    assert len(whole) > 2
    for each in whole:
        found = json.loads(_text(each).removesuffix("<|end|>"))
        assert found["kind"] in ("cat", "dog")
        assert found["age"] <= 99
    assert {each.finish_reason for each in requests} <= {"stop", "length"}


def test_an_answer_ends_where_nothing_may_follow(make: Make) -> None:
    engine = make(**SIZES, speculation="off")
    for fields in ({}, ENDS, ENDS | {"min_tokens": 20}):
        found = submit(engine, prompt(5), 20, constraint=choice_constraint(["cat"]), **fields)
        assert _text(found) == "cat"
        assert found.finish_reason == "stop"


def test_stop_tokens_are_sampled_only_where_the_grammar_accepts(make: Make) -> None:
    engine = make(**SIZES, speculation="off")
    (end,) = SPELLER.eos_token_ids
    wanted = SamplingParams(temperature=0, logit_bias={end: 100.0})
    found = _code(engine, sampling=wanted)
    assert re.fullmatch(r"[a-c]{3,9}-(\d\d|END)", _text(found))
    repeated = submit(
        engine, prompt(5), 20, constraint=regex_constraint("(ab)+"), sampling=wanted, **ENDS
    )
    assert repeated.tokens == [*SPELLER.encode("ab"), end]
    late = submit(
        engine,
        prompt(5),
        20,
        constraint=regex_constraint("(ab)+"),
        sampling=wanted,
        min_tokens=8,
        **ENDS,
    )
    assert late.tokens == [*SPELLER.encode("abababab"), end]


def test_a_grammar_that_fails_ends_its_own_request_only(make: Make) -> None:
    engine = make(**SIZES, speculation="off")
    beside = submit(engine, prompt(6), 40)
    beside.wait_for_tokens(2)
    unspelled = submit(engine, prompt(5), 9, constraint=regex_constraint("aé"), **ENDS)
    malformed = submit(engine, prompt(5), 9, constraint=Constraint(grammar="start: x"))
    for each in (unspelled, malformed):
        assert each.finish_reason == "error"
        error = each.outputs[-1].error
        assert isinstance(error, ConstraintError)
        assert str(error)
    assert len(beside.tokens) == 40
    assert CODE.fullmatch(_text(_code(engine)))


def test_an_engine_without_a_tokenizer_takes_no_grammar(tiny_engine: Make) -> None:
    with pytest.raises(RequestError, match="tokenizer") as caught:
        _code(tiny_engine(**SIZES))
    assert caught.value.param == "constraint"


class _Slow(GrammarCompiler):
    """Compiles when it is told to."""

    def __init__(self) -> None:
        super().__init__(SPELLER, -(-TINY.vocab_size // 32))
        self.go_on = threading.Event()

    def _copy(self, grammar: str) -> Any:
        assert self.go_on.wait(60)
        return super()._copy(grammar)


def test_nobody_waits_while_a_grammar_is_compiled(tiny_engine: Make) -> None:
    slow = _Slow()
    engine = tiny_engine(**SIZES, grammars=slow)
    aborted, kept = _code(engine, 1), _code(engine, 2)
    engine.abort(aborted.request.id)
    assert len(submit(engine, prompt(5), 9).tokens) == 9
    assert not kept.outputs
    slow.go_on.set()
    assert aborted.finish_reason == "abort"
    assert CODE.fullmatch(_text(kept))


def test_the_end_of_the_engine_ends_what_is_being_compiled(tiny_engine: Make) -> None:
    slow = _Slow()
    engine = tiny_engine(**SIZES, grammars=slow)
    waiting = _code(engine)
    engine.stop()
    assert waiting.finish_reason == "error"
    assert isinstance(waiting.outputs[-1].error, EngineStoppedError)
    slow.go_on.set()
