"""Grammars: what they allow is valid, and what is wrong with one is its own error."""

import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from typing import Any

import jsonschema
import numpy as np
import pytest

from inferneo_jax.errors import ConstraintError
from inferneo_jax.request import Constraint
from inferneo_jax.text import grammar
from inferneo_jax.text.grammar import (
    ConstrainedRow,
    GrammarCompiler,
    choice_constraint,
    fill_masks,
    gbnf_constraint,
    json_object_constraint,
    json_schema_constraint,
    lark_constraint,
    regex_constraint,
)
from inferneo_jax.text.tokenizer import Tokenizer
from tests.support.fake_server import make_tokenizer
from tests.support.walks import allowed_of, mask_words, tiny_speller, walk

MALFORMED = int(os.environ.get("FUZZ_GRAMMARS", "300"))
"""Number of malformed grammars and schemas."""
SECONDS = 5.0
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "size": {"type": "integer", "minimum": -20, "maximum": 300},
        "tags": {"type": "array", "items": {"enum": ["a", "bé", None]}, "maxItems": 3},
        "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
    },
    "required": ["name", "size"],
    "additionalProperties": False,
}
GBNF = """
root ::= "yes" | "no " number
number ::= [1-9] [0-9]{0,2}
"""


@pytest.fixture(scope="module")
def speller() -> Tokenizer:
    return make_tokenizer("<think>")


@pytest.fixture(scope="module")
def compiler(speller: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler.of(speller)


def _is_json(schema: dict[str, Any], text: str) -> bool:
    jsonschema.validate(json.loads(text), schema)
    return True


@pytest.mark.parametrize(
    ("constraint", "holds"),
    [
        (json_schema_constraint(SCHEMA), lambda text: _is_json(SCHEMA, text)),
        (json_object_constraint(), lambda text: _is_json({"type": "object"}, text)),
        (
            regex_constraint(r"[a-f]+/[0-9]{2,3}(é|\n)?"),
            re.compile(r"[a-f]+/\d{2,3}[é\n]?").fullmatch,
        ),
        (
            choice_constraint(['"one"', "two\nthree", "é"]),
            ['"one"', "two\nthree", "é"].__contains__,
        ),
        (gbnf_constraint(GBNF), re.compile(r"yes|no [1-9]\d{0,2}").fullmatch),
        (lark_constraint('start: "(" start ")" | "x"'), re.compile(r"\(*x\)*").fullmatch),
    ],
)
def test_every_walk_is_valid(
    compiler: GrammarCompiler, speller: Tokenizer, constraint: Constraint, holds: Any
) -> None:
    rng = np.random.default_rng(0)
    texts = [walk(compiler, speller, constraint, rng) for _ in range(30)]
    complete = [text for text in texts if text is not None]
    assert len(complete) > 15
    assert len(set(complete)) > 1
    assert all(holds(text) for text in complete)


def _next(
    compiler: GrammarCompiler, speller: Tokenizer, constraint: Constraint, text: str
) -> set[str]:
    """The texts of the tokens that may follow a text."""
    matcher = compiler.compile(constraint)
    for token in speller.encode(text):
        matcher.consume(token)
    masks = np.zeros((1, mask_words(speller)), np.uint32)
    fill_masks([ConstrainedRow(matcher, 0)], masks)
    assert matcher.error is None
    return {speller.token_text(int(token)) for token in allowed_of(masks[0])}


def test_the_end_is_allowed_exactly_where_the_grammar_accepts(
    compiler: GrammarCompiler, speller: Tokenizer
) -> None:
    end = "<|end|>"
    allowed = {
        text: end in _next(compiler, speller, regex_constraint("ab*c?"), text)
        for text in ("", "a", "ab", "abb")
    }
    assert allowed == {"": False, "a": True, "ab": True, "abb": True}
    matcher = compiler.compile(regex_constraint("ab*c"))
    assert [matcher.consume(token) for token in speller.encode("abbc")] == [False] * 3 + [True]
    assert matcher.error is None


def test_special_tokens_are_no_text_and_can_be_named(
    compiler: GrammarCompiler, speller: Tokenizer
) -> None:
    assert "<|start|>" not in _next(compiler, speller, regex_constraint(r"(?s:.*)"), "a")
    named = lark_constraint('start: <think> "x"')
    assert _next(compiler, speller, named, "") == {"<think>"}


def test_white_space_is_bounded(compiler: GrammarCompiler, speller: Tokenizer) -> None:
    text = '{"name":'
    assert " " in _next(compiler, speller, json_schema_constraint(SCHEMA), text + " " * 63)
    assert " " not in _next(compiler, speller, json_schema_constraint(SCHEMA), text + " " * 64)


def test_masks_of_drafts_are_those_of_their_tokens_one_by_one(
    compiler: GrammarCompiler, speller: Tokenizer
) -> None:
    constraint, draft = json_schema_constraint(SCHEMA), tuple(speller.encode('{"name":'))
    matcher = compiler.compile(constraint)
    assert matcher.accepted([*draft, 0]) == len(draft)
    masks = np.zeros((len(draft) + 1, mask_words(speller)), np.uint32)
    fill_masks([ConstrainedRow(matcher, 0, draft)], masks)
    one = np.zeros_like(masks[:1])
    for i, token in enumerate((*draft, None)):
        fill_masks([ConstrainedRow(matcher, 0)], one)
        np.testing.assert_array_equal(masks[i], one[0])
        if token is not None:
            matcher.consume(token)
    assert matcher.error is None


def test_what_a_grammar_forces_is_known(compiler: GrammarCompiler, speller: Tokenizer) -> None:
    matcher = compiler.compile(regex_constraint("the END of (it|that)"))
    assert speller.decode(matcher.forced()) == "the END of "
    for token in speller.encode("the END of "):
        matcher.consume(token)
    assert matcher.forced() == []


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "format": "color"}, "color"),
        ({"type": "object", "propertyNames": {"maxLength": 3}}, "propertyNames"),
        ({"not": {"type": "string"}}, "not"),
        ({"$ref": "https://example.com/schema"}, "example.com"),
        ({"type": "text"}, "text"),
    ],
)
def test_what_cannot_be_enforced_is_named(
    compiler: GrammarCompiler, schema: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConstraintError, match=words):
        compiler.compile(json_schema_constraint(schema))


def test_a_lenient_schema_is_enforced_as_far_as_it_can_be(
    compiler: GrammarCompiler, speller: Tokenizer
) -> None:
    schema = {"type": "array", "uniqueItems": True, "items": {"enum": [1, 2]}, "minItems": 1}
    lenient = json_schema_constraint(schema, lenient=True)
    rng = np.random.default_rng(1)
    texts = [walk(compiler, speller, lenient, rng) for _ in range(10)]
    assert all(set(json.loads(text)) <= {1, 2} for text in texts if text)


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        (lark_constraint("start: nothing"), "nothing"),
        (lark_constraint("start: " + "(" * 20_000), "at most 16384"),
        (lark_constraint('start: "' + "x" * grammar.MAX_GRAMMAR_BYTES + '"'), "at most 262144"),
        (regex_constraint("("), "unclosed group"),
        (regex_constraint(r"(?=a)"), "look-around"),
        (Constraint(grammar="{"), "not JSON"),
        (Constraint(grammar='{"grammars": 5}'), "not JSON"),
        (lark_constraint('start: A\nA: "x" A'), "A stands for"),
    ],
)
def test_what_is_malformed_is_refused_with_its_reason(
    compiler: GrammarCompiler, constraint: Constraint, words: str
) -> None:
    with pytest.raises(ConstraintError, match=words):
        compiler.compile(constraint)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("root ::= missing", "missing"),
        ('first ::= "a"', "root"),
        ('root ::= "a', "end of input"),
        ('root ::= "a"\n' * 1001, "at most 1000"),
        ("root ::= " + "(" * 5000, "."),
    ],
)
def test_malformed_gbnf_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConstraintError, match=words):
        gbnf_constraint(text)


def test_what_a_vocabulary_cannot_spell_is_an_error_of_its_matcher() -> None:
    speller = tiny_speller()
    matcher = GrammarCompiler.of(speller).compile(regex_constraint("é"))
    masks = np.zeros((1, mask_words(speller)), np.uint32)
    fill_masks([ConstrainedRow(matcher, 0)], masks)
    assert matcher.error is not None
    assert not matcher.consume(0)
    assert (matcher.accepted([0]), matcher.forced()) == (0, [])


def test_compiled_grammars_are_kept_within_bounds(
    speller: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "_MAX_KEPT", 2)
    compiler = GrammarCompiler.of(speller)
    one, two, three = (regex_constraint(f"{i}+") for i in range(3))
    for each in (one, two, one, three):
        compiler.compile(each)
    assert list(compiler._kept) == [one.grammar, three.grammar]


def test_matchers_of_one_grammar_are_independent(
    compiler: GrammarCompiler, speller: Tokenizer
) -> None:
    constraint = regex_constraint("ab+c")
    first, second = compiler.compile(constraint), compiler.compile(constraint)
    a, b, c = speller.encode("abc")
    assert not first.consume(a)
    assert not first.consume(c)  # not allowed
    assert first.error is not None
    assert [second.consume(token) for token in (a, b, c)] == [False, False, True]


def test_a_start_imports_no_library_of_grammars() -> None:
    code = "import sys, inferneo_jax.text.grammar; assert 'llguidance' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# What strangers send: mutations of grammars that are valid, and what is known to be costly.

_SEEDS = [
    json_schema_constraint(SCHEMA).grammar,
    regex_constraint(r"([a-f]+/|[0-9]{2,3}){1,9}(é|\n)?").grammar,
    choice_constraint(["one", "two"]).grammar,
    gbnf_constraint(GBNF).grammar,
    lark_constraint('start: "(" start ")" | A & ~B\nA: /x+/\nB: "xx" | /(?i)y/').grammar,
]
_COSTLY = [
    regex_constraint("(a{1000}){1000}"),
    regex_constraint("(a|b|ab){500}(.*c){200}"),
    regex_constraint(".*a.{60}" * 20),
    json_schema_constraint({"type": "string", "pattern": "(x+x+)+y", "maxLength": 10**9}),
    json_schema_constraint({"type": "array", "minItems": 10**7}),
    json_schema_constraint({"enum": [f"{i}" * 20 for i in range(5000)]}),
    json_schema_constraint(
        {"allOf": [{"anyOf": [{"const": i}, {"type": "object"}]} for i in range(40)]}
    ),
    json_schema_constraint({"$ref": "#"}),
    lark_constraint(
        "start: a0\n" + "\n".join(f"a{i}: a{i + 1} a{i + 1}" for i in range(60)) + '\na60: "x"'
    ),
    lark_constraint(
        "start: A0\n" + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(60)) + '\nA60: "x"'
    ),
    lark_constraint("start: " + "(" * 4000 + '"x"' + ")" * 4000),
    lark_constraint("start: A\nA: " + "~" * 5000 + '"x"'),
    lark_constraint("start: start"),
    lark_constraint('start: "x" start'),
    lark_constraint(
        "start: A0\n" + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(14)) + '\nA14: "x"'
    ),
    regex_constraint("(b|c)(a{1000}){1000}"),
    choice_constraint(["ab" * 60_000]),
    json_schema_constraint({"type": "array", "minItems": 10**6, "items": {"const": 1}}),
    json_schema_constraint(
        {"properties": {"a": {"$ref": "#"}}, "required": ["a"], "type": "object"}
    ),
    lark_constraint("start: start start | "),
]


def _mutated(rng: random.Random) -> str:
    text = rng.choice(_SEEDS)
    for _ in range(rng.randint(1, 6)):
        at, size = rng.randrange(len(text)), rng.choice((1, 1, 2, 8, 40))
        part = rng.choice(_SEEDS)
        start = rng.randrange(len(part))
        new = rng.choice(("", part[start : start + size], rng.choice('{}[]()"\\|*+?~:/.,9é\0')))
        text = text[:at] + new * rng.choice((1, 1, 1, 50)) + text[at + rng.choice((0, size)) :]
    return text


def test_no_grammar_takes_long_or_ends_the_process(speller: Tokenizer) -> None:
    compiler, rng = GrammarCompiler.of(speller), random.Random(7)
    masks = np.zeros((1, mask_words(speller)), np.uint32)
    texts = [each.grammar for each in _COSTLY] + [_mutated(rng) for _ in range(MALFORMED)]
    refused = 0
    for text in texts:
        started = time.monotonic()
        try:
            matcher = compiler.compile(Constraint(grammar=text))
            for _ in range(3):
                fill_masks([ConstrainedRow(matcher, 0)], masks)
                matcher.consume(int(allowed_of(masks[0])[0]))
            refused += matcher.error is not None
        except ConstraintError:
            refused += 1
        assert time.monotonic() - started < 2 * SECONDS, text[:200]
    assert refused > len(texts) / 3
    assert compiler.compile(regex_constraint("a")).error is None
    assert threading.active_count() < 50
