"""Grammars of calls: what they allow is what the parsers read, and nothing else."""

import json
from typing import Any

import pytest

from inferneo_jax import GrammarCompiler, Tokenizer, lark_constraint
from server.parsers.families import FORMATS, form_of
from server.parsers.grammar import Frame
from server.parsers.parser import OutputParser
from tests.support.fake_server import make_tokenizer

LOOK = {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]}
TOOLS: dict[str, Any] = {"look": LOOK, "now": {"type": "object", "properties": {}}}
HERMES = FORMATS["hermes"]
MARKERS = ("<tool_call>", "</tool_call>", "<think>", "</think>")
PLAIN, MARKED = make_tokenizer(), make_tokenizer(*MARKERS)
COMPILERS = {tokenizer: GrammarCompiler.of(tokenizer) for tokenizer in (PLAIN, MARKED)}
CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "x"}}\n</tool_call>'
SCHEMA = '%json {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'


def frame(tokenizer: Tokenizer, **changes: Any) -> Frame:
    fields = {"format": HERMES, "form": form_of(HERMES, ""), "tools": TOOLS, "repeats": True}
    fields |= {"thinking": False, "thinks": False} | changes
    return Frame(tokenizer=tokenizer, **fields)


def allowed(tokenizer: Tokenizer, grammar: str, text: str) -> bool:
    """Whether a grammar allows all of a text's tokens."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return COMPILERS[tokenizer].compile(lark_constraint(grammar)).accepted(ids) == len(ids)


FORMS = [(name, mark, form) for name, format in FORMATS.items() for mark, form in format.forms]


@pytest.mark.parametrize(("name", "mark", "form"), FORMS, ids=[f"{n}{m}" for n, m, _ in FORMS])
def test_what_a_grammar_forces_its_parser_reads(name: Any, mark: str, form: Any) -> None:
    assert form_of(FORMATS[name], mark) is form
    calls = [("look", {"at": '"</x> {'}), ("now", {})]
    written = [
        form.before + tool + form.between + json.dumps(arguments) + form.after
        for tool, arguments in calls
    ]
    text = form.begin + form.separator.join(written) + form.end
    grammar = frame(PLAIN, format=FORMATS[name], form=form).around("", lenient=False)
    assert allowed(PLAIN, grammar, text)
    once = frame(PLAIN, format=FORMATS[name], form=form, repeats=False).around("", lenient=False)
    assert not allowed(PLAIN, once, text)
    parser = OutputParser(FORMATS[name], TOOLS, thinking=False)
    parser.push(text)
    parser.finish(cut=False)
    content, _, found = parser.take()
    assert (content, [(call.name, json.loads(call.arguments)) for call in found]) == ("", calls)


@pytest.mark.parametrize("tokenizer", [PLAIN, MARKED], ids=["as text", "as markers"])
@pytest.mark.parametrize(
    ("changes", "answer", "texts"),
    [
        ({}, "", {CALL: True, "Hi": False, "<think>Hm</think>" + CALL: False, '{"a": 1}': False}),
        ({"thinks": True}, "", {"<think>Hm</think>\n\n" + CALL: True, CALL: True}),
        ({"thinking": True}, "", {"Hm\n</think>\n\n" + CALL: True, "Hm</think>Hi": False}),
        ({"thinking": True, "tools": {}}, SCHEMA, {'Hm</think>{"a": 1}': True}),
        ({}, SCHEMA, {'{"a": 1}': True, CALL: True, '{"a": "1"}': False}),
        (
            {},
            "",
            {
                CALL.replace("look", "go"): False,
                CALL.replace('"x"', "5"): False,
                CALL.replace('{"at": "x"}', "{}"): False,
            },
        ),
    ],
)
def test_reasoning_comes_first_then_calls_or_the_form(
    tokenizer: Tokenizer, changes: dict[str, Any], answer: str, texts: dict[str, bool]
) -> None:
    grammar = frame(tokenizer, **changes).around(answer, lenient=False)
    for text, fits in texts.items():
        assert allowed(tokenizer, grammar, text) is fits, text


def test_markers_are_tokens_where_the_tokenizer_has_them() -> None:
    grammar = frame(MARKED).around("", lenient=False)
    spelled = [token for word in CALL for token in MARKED.encode(word, add_special_tokens=False)]
    matcher = COMPILERS[MARKED].compile(lark_constraint(grammar))
    assert matcher.accepted(spelled) == 0
