"""A request's form of the answer reaches the engine as a grammar, or is refused with its reason."""

import json
import os
import random
import time
from typing import Any

import pytest
from websockets.sync.client import connect

from inferneo_jax import ConstraintError
from tests.support.asking import (
    BODIES,
    CHATS,
    COMPLETIONS,
    ask,
    frames,
    receive,
    refused,
    send,
    stream,
)
from tests.support.fake_server import Rig

FUZZED = int(os.environ.get("FUZZ_GRAMMARS", "60"))
"""Number of malformed requests."""
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
LOOSE = {"type": "array", "uniqueItems": True}
GBNF = 'root ::= "a" | "b"'
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}

both = pytest.mark.parametrize("path", [CHATS, COMPLETIONS])


def schema_format(schema: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **fields}}


@both
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"response_format": FORMAT}, '"integer"'),
        ({"response_format": {"type": "json_object"}}, '"object"'),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, '"integer"'),
        ({"structured_outputs": {"json": SCHEMA}}, '"integer"'),
        ({"structured_outputs": {"json": json.dumps(SCHEMA), "regex": None}}, '"integer"'),
        ({"structured_outputs": {"regex": "a{2}"}}, "a{2}"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes"),
        ({"structured_outputs": {"grammar": GBNF}}, "start"),
        ({"structured_outputs": {"grammar": 'start: "c"'}}, "start"),
        ({"structured_outputs": {"json_object": True}}, '"object"'),
        ({"grammar": GBNF}, "start"),
        ({"json_schema": SCHEMA}, '"integer"'),
    ],
)
def test_every_form_reaches_the_engine_as_a_grammar(
    rig: Rig, path: str, fields: dict[str, Any], words: str
) -> None:
    answer = ask(rig, path, **fields)
    assert "warnings" not in answer
    constraint = rig.engine.submitted[-1].constraint
    assert constraint is not None
    assert words in constraint.grammar.replace("\\", "")


@both
@pytest.mark.parametrize("fields", [{}, {"response_format": {"type": "text"}}, {"grammar": None}])
def test_text_has_no_grammar(rig: Rig, path: str, fields: dict[str, Any]) -> None:
    ask(rig, path, **fields)
    assert rig.engine.submitted[-1].constraint is None


def test_streams_and_sockets_have_it_too(rig: Rig) -> None:
    for path in (CHATS, COMPLETIONS):
        stream(rig, path, response_format=FORMAT)
        frames(rig, path, response_format=FORMAT)
        one, other = rig.engine.submitted[-2:]
        assert one.constraint == other.constraint
        assert one.constraint is not None
        with connect(rig.ws + path) as ws:
            send(ws, BODIES[path] | {"grammar": "root ::= missing"})
            assert receive(ws)["error"]["param"] == "grammar"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": "json"}, "response_format", "an object"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_object, json_schema"),
        ({"response_format": {}}, "response_format.type", "null"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "an object"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
            "required",
        ),
        (
            {"response_format": schema_format(SCHEMA, strict="yes")},
            "response_format.json_schema.strict",
            "true or false",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "one of json, regex"),
        (
            {"structured_outputs": {"regex": "a", "choice": ["a"]}},
            "structured_outputs",
            "regex and",
        ),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least one"),
        ({"structured_outputs": {"choice": [1]}}, "structured_outputs.choice", "strings"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "valid JSON"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "unclosed"),
        (
            {"structured_outputs": {"structural_tag": "{}"}},
            "structured_outputs.structural_tag",
            "not supported",
        ),
        ({"grammar": "root ::= missing"}, "grammar", "missing"),
        ({"json_schema": {"type": "text"}}, "json_schema", "text"),
        ({"json_schema": SCHEMA, "grammar": GBNF}, "json_schema", "exclude each other"),
        ({"response_format": FORMAT, "grammar": GBNF}, "grammar", "exclude each other"),
        (
            {"response_format": schema_format(LOOSE, strict=True)},
            "response_format.json_schema.schema",
            "uniqueItems",
        ),
    ],
)
def test_what_is_wrong_is_named(rig: Rig, fields: dict[str, Any], param: str, words: str) -> None:
    for path in (CHATS, COMPLETIONS):
        error = refused(rig, path, **fields)
        assert error["type"] == "invalid_request_error"
        assert error["param"] == param
        assert words in error["message"]
    assert not rig.engine.submitted


def test_what_is_not_enforced_is_warned_of_and_refused_if_strict(rig: Rig) -> None:
    fields = {"response_format": schema_format(LOOSE)}
    (warning,) = ask(rig, CHATS, **fields)["warnings"]
    assert "response_format.json_schema.schema" in warning
    assert "uniqueItems" in warning
    first = stream(rig, CHATS, **fields)[0]
    assert first["warnings"] == [warning]
    error = refused(rig, CHATS, {"X-Inferneo-Strict": "true"}, **fields)
    assert "uniqueItems" in error["message"]


def test_unknown_fields_beside_a_form_are_named(rig: Rig) -> None:
    fields = {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}
    (warning,) = ask(rig, COMPLETIONS, **fields)["warnings"]
    assert "structured_outputs.whitespace_pattern" in warning
    error = refused(rig, COMPLETIONS, {"X-Inferneo-Strict": "true"}, **fields)
    assert error["param"] == "structured_outputs.whitespace_pattern"


def test_a_grammar_that_fails_later_is_the_requests_own_error(rig: Rig) -> None:
    failure = ConstraintError("the grammar cannot be followed further: too complex")
    rig.engine.limit, rig.engine.failure = 0, failure
    error = refused(rig, CHATS, grammar=GBNF)
    assert error["type"] == "invalid_request_error"
    assert "too complex" in error["message"]


def test_malformed_requests_are_refused_in_time(rig: Rig) -> None:
    rng = random.Random(5)
    forms: list[Any] = [FORMAT, SCHEMA, GBNF, {"regex": "(a|b){2,5}[c-f]+"}, {"choice": ["a", "b"]}]
    for _ in range(FUZZED):
        text = json.dumps(rng.choice(forms))
        at = rng.randrange(1, len(text) - 1)
        broken = text[:at] + rng.choice('{}[]()"\\|*?~:') * rng.choice((1, 30)) + text[at:]
        try:
            value = json.loads(broken)
        except json.JSONDecodeError:
            value = broken
        name = rng.choice(("response_format", "structured_outputs", "grammar", "json_schema"))
        started = time.monotonic()
        answer = rig.post(COMPLETIONS, BODIES[COMPLETIONS] | {name: value})
        assert answer.status_code in (200, 400), answer.text
        assert time.monotonic() - started < 10
    assert ask(rig, COMPLETIONS)
