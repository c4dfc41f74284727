"""Laws of output parsers: whole = in pieces, nothing is lost, and a call is a call or text."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.config.schema import ParserName
from server.parsers.families import FORMATS
from server.parsers.parser import OutputParser
from server.parsers.reader import MAX_CALL

TOOLS: dict[str, Any] = {
    "look": {
        "type": "object",
        "properties": {
            "at": {"type": "string"},
            "times": {"type": "integer"},
            "deep": {"type": ["object", "null"]},
        },
    },
    "now": {"type": "object", "properties": {}},
}
LOOK = ("look", {"at": "a <b> {c}", "times": 2})
NOW = ("now", {})

Parts = tuple[str, str, list[tuple[str, Any]]]


def parsed(
    name: ParserName,
    text: str,
    cuts: list[int] | None = None,
    *,
    tools: bool = True,
    thinking: bool = False,
    cut: bool = False,
) -> Parts:
    """Content, reasoning and calls of a text that arrives in pieces of the sizes ``cuts``."""
    parser = OutputParser(FORMATS[name], TOOLS if tools else None, thinking=thinking)
    content, reasoning, calls = "", "", []
    rest = text
    for size in [*(cuts or []), len(text)]:
        parser.push(rest[:size])
        rest = rest[size:]
        new = parser.take()
        content, reasoning, calls = content + new[0], reasoning + new[1], [*calls, *new[2]]
    parser.finish(cut=cut)
    new = parser.take()
    calls += new[2]
    found = [(call.name, json.loads(call.arguments)) for call in calls]
    assert len(found) == parser.num_calls
    return content + new[0], reasoning + new[1], found


# An answer of each family with reasoning, if it has any, words, and two calls.
ANSWERS: dict[ParserName, str] = {
    "hermes": "<think>\nHm.\n</think>\n\nSo:\n<tool_call>\n"
    '{"name": "look", "arguments": {"at": "a <b> {c}", "times": 2}}\n</tool_call>\n'
    '<tool_call>{"name": "now"}</tool_call>',
    "qwen3-coder": "<think>Hm.</think>So:\n<tool_call>\n<function=look>\n<parameter=at>\n"
    "a <b> {c}\n</parameter>\n<parameter=times>\n2\n</parameter>\n</function>\n</tool_call>\n"
    "<function=now>\n</function>\n</tool_call>",
    "glm": "<think>Hm.</think>So:<tool_call>look\n<arg_key>at</arg_key>\n<arg_value>a <b> {c}"
    "</arg_value>\n<arg_key>times</arg_key><arg_value>2</arg_value>\n</tool_call>"
    "<tool_call>now</tool_call>",
    "kimi-k2": "<think>Hm.</think>So:<|tool_calls_section_begin|><|tool_call_begin|>"
    'functions.look:0<|tool_call_argument_begin|>{"at": "a <b> {c}", "times": 2}<|tool_call_end|>'
    "<|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
    "<|tool_calls_section_end|>",
    "kimi-k3": "<|open|>think<|sep|>Hm.<|close|>think<|sep|><|open|>response<|sep|>So:"
    "<|close|>response<|sep|><|open|>tools<|sep|>"
    '<|open|>call tool="look" index="1"<|sep|><|open|>argument key="at" type="string"<|sep|>'
    'a <b> {c}<|close|>argument<|sep|><|open|>argument key="times" type="number"<|sep|>2'
    '<|close|>argument<|sep|><|close|>call<|sep|><|open|>call tool="now" index="2"<|sep|>'
    "<|close|>call<|sep|><|close|>tools<|sep|><|close|>message<|sep|>",
    "deepseek": "<think>Hm.</think>So:<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function"
    '<｜tool▁sep｜>look\n```json\n{"at": "a <b> {c}", "times": 2}\n```<｜tool▁call▁end｜>'
    "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek-dsml": "<think>Hm.</think>So:\n\n<｜DSML｜tool_calls>\n"
    '<｜DSML｜invoke name="look">\n<｜DSML｜parameter name="at" string="true">a <b> {c}'
    '</｜DSML｜parameter>\n<｜DSML｜parameter name="times" string="false">2</｜DSML｜parameter>\n'
    '</｜DSML｜invoke>\n<｜DSML｜invoke name="now"/>\n</｜DSML｜tool_calls>',
    "gemma4": "<|channel>thought\nHm.<channel|>So:"
    '<|tool_call>call:look{at:<|"|>a <b> {c}<|"|>,times:2}<tool_call|>'
    "<|tool_call>call:now{}<tool_call|>",
    "function-gemma": "<think>Hm.</think>So:"
    "<start_function_call>call:look{at:<escape>a <b> {c}<escape>,times:2}<end_function_call>"
    "<start_function_call>call:now{}<end_function_call>",
    "mistral": '[THINK]Hm.[/THINK]So:[TOOL_CALLS]look[ARGS]{"at": "a <b> {c}", "times": 2}'
    '[TOOL_CALLS] [{"name": "now", "arguments": {}}]',
    "phi4": '<think>Hm.</think>So:<|tool_call|>[{"name": "look", "arguments": '
    '{"at": "a <b> {c}", "times": 2}}, {"name": "now", "arguments": {}}]<|/tool_call|>',
    "llama3": '<think>Hm.</think>So:<|python_tag|>{"type": "function", "name": "look", '
    '"parameters": {"at": "a <b> {c}", "times": 2}}; {"name": "now", "parameters": {}}',
    "llama4": "<think>Hm.</think><|python_start|>[look(at='a <b> {c}', times=2), now()]"
    "<|python_end|>So:",
    "harmony": "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary"
    "<|message|>So:<|end|><|start|>assistant<|channel|>commentary to=functions.look "
    '<|constrain|>json<|message|>{"at": "a <b> {c}", "times": 2}<|call|><|start|>assistant '
    "to=functions.now<|channel|>commentary<|message|>{}",
}

each_family = pytest.mark.parametrize("name", FORMATS)


def test_every_family_has_an_answer() -> None:
    assert ANSWERS.keys() == FORMATS.keys()


@each_family
def test_reasoning_words_and_calls_are_told_apart(name: ParserName) -> None:
    assert parsed(name, ANSWERS[name]) == ("So:", "Hm.", [LOOK, NOW])


@each_family
def test_in_pieces_is_whole(name: ParserName) -> None:
    text = ANSWERS[name]
    assert parsed(name, text, [1] * len(text)) == parsed(name, text)


@each_family
def test_wherever_a_text_is_cut_off_its_pieces_give_what_the_whole_does(name: ParserName) -> None:
    for end in range(0, len(ANSWERS[name]), 3):
        text = ANSWERS[name][:end]
        for cut in (True, False):
            whole = parsed(name, text, cut=cut)
            assert parsed(name, text, [1] * end, cut=cut) == whole
            assert all(call in (LOOK, NOW) for call in whole[2]), "half a call is none"


PIECES = [
    piece
    for text in ANSWERS.values()
    for piece in (text[:40], text[20:60], text[-30:], text[len(text) // 2 :])
]


@given(
    st.sampled_from([*FORMATS]),
    st.lists(st.sampled_from([*PIECES, "a", " ", "\n", "<", "{", '"']), max_size=6),
    st.lists(st.integers(1, 9), max_size=40),
    st.booleans(),
    st.booleans(),
)
def test_no_mixture_of_markers_depends_on_the_pieces(
    name: ParserName, parts: list[str], cuts: list[int], thinking: bool, cut: bool
) -> None:
    text = "".join(parts)
    whole = parsed(name, text, thinking=thinking, cut=cut)
    assert parsed(name, text, cuts, thinking=thinking, cut=cut) == whole
    assert parsed(name, text, [1] * len(text), thinking=thinking, cut=cut) == whole


@given(st.sampled_from([*FORMATS]), st.text(st.sampled_from("ab <{[\n\u00e9"), max_size=30))
def test_text_without_markers_stays_as_it_is(name: ParserName, text: str) -> None:
    assert parsed(name, text, [1] * len(text)) == (text, "", [])


@each_family
def test_without_tools_calls_are_text(name: ParserName) -> None:
    if name == "harmony":  # of a message with a header, only its body is text
        return
    content, reasoning, calls = parsed(name, ANSWERS[name], tools=False)
    assert (reasoning, calls) == ("Hm.", [])
    assert "look" in content


# A call that is none.


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", "<tool_call>not json</tool_call> or"),
        ("hermes", '<tool_call>{"name": "look", "arguments": [1]}'),
        ("hermes", '<tool_call>{"name": "look", "arguments": {"at": "half'),
        ("hermes", '```json\n{"name": "Ann", "arguments": {}}\n```'),
        ("hermes", '{"name": "Ann", "age": 5}'),
        ("llama3", '{"name": "Ann", "parameters": {}} is a dict'),
        ("llama3", '{"a": 1}'),
        ("llama4", "[1, 2] and [look(1)]"),
        ("llama4", "[look(at=other)]"),
        ("mistral", "[TOOL_CALLS] nothing at all"),
        ("gemma4", "<|tool_call>call:look no brace<tool_call|>"),
        ("glm", "<tool_call>look<arg_key>at</arg_key>oops</tool_call>"),
        ("phi4", 'functools["a"]'),
    ],
)
def test_what_is_no_call_is_content(name: ParserName, text: str) -> None:
    content, reasoning, calls = parsed(name, text, [1] * len(text))
    assert (reasoning, calls) == ("", [])
    assert content == text


def test_what_may_begin_a_marker_is_delivered_once_it_cannot() -> None:
    parser = OutputParser(FORMATS["hermes"], TOOLS, thinking=False)
    for piece, shown in (
        ("a <tool", "a"),
        ("_", ""),
        ("box", " <tool_box"),
        ("<", ""),
        ("b", "<b"),
    ):
        parser.push(piece)
        assert parser.take()[0] == shown
    for piece, shown in (("{", "{"), ('"', '"')):  # it is no longer the beginning
        parser.push(piece)
        assert parser.take()[0] == shown
    parser = OutputParser(FORMATS["hermes"], TOOLS, thinking=False)
    for piece, shown in (('{"na', ""), ('tion"', '{"nation"')):
        parser.push(piece)
        assert parser.take()[0] == shown


def test_a_call_is_delivered_as_soon_as_it_is_complete() -> None:
    parser = OutputParser(FORMATS["hermes"], TOOLS, thinking=False)
    parser.push('<tool_call>{"name": "now", "arguments": {}}')
    assert parser.take() == ("", "", ())
    parser.push("</tool_call>")
    assert [call.name for call in parser.take()[2]] == ["now"]


def test_a_call_that_is_too_long_is_content() -> None:
    text = '<tool_call>{"name": "look", "arguments": {"at": "' + "a" * MAX_CALL
    parser = OutputParser(FORMATS["hermes"], TOOLS, thinking=False)
    for start in range(0, len(text), 1000):
        parser.push(text[start : start + 1000])
    parser.finish(cut=False)
    assert parser.num_calls == 0
    assert parser.take()[0] == text
    assert parsed("hermes", text + '"}}</tool_call>')[2] == []


def test_arguments_that_no_json_can_hold_are_content() -> None:
    for value in ("NaN", "1e999", "[" * 5000 + "]" * 5000):
        text = '<tool_call>{"name": "look", "arguments": {"at": ' + value + "}}</tool_call>"
        assert parsed("hermes", text)[2] == []
    text = '<tool_call>{"name": "look", "arguments": {"at": "\\ud800"}}</tool_call>'
    assert parsed("hermes", text)[2] == [("look", {"at": "\ud800"})]
    parser = OutputParser(FORMATS["hermes"], TOOLS, thinking=False)
    parser.push(text)
    assert parser.take()[2][0].arguments.isascii(), "half a surrogate pair is no UTF-8"


# Reasoning.

DRAFT = '<tool_call>{"name": "look", "arguments": {"at": "x"}}</tool_call>'


def test_a_call_within_reasoning_is_none() -> None:
    text = f"Perhaps {DRAFT} or not.</think>No."
    for cuts in ([], [1] * len(text)):
        found = parsed("hermes", text, cuts, thinking=True)
        assert found == ("No.", f"Perhaps {DRAFT} or not.", [])
    text = 'Like <tool_call>{"name": "look", </think>No.'
    assert parsed("hermes", text, [1] * len(text), thinking=True)[0] == "No."


def test_a_call_that_ends_reasoning_without_its_end_is_one() -> None:
    text = f"I must look.\n{DRAFT}\n"
    for cuts in ([], [1] * len(text)):
        found = parsed("hermes", text, cuts, thinking=True)
        assert found == ("", "I must look.", [("look", {"at": "x"})])
    assert parsed("hermes", text, thinking=True, cut=True)[2] == []


def test_reasoning_only_begins_an_answer() -> None:
    text = "Write <think> to think</think>."
    assert parsed("hermes", text) == (text, "", [])


def test_thinking_is_known_while_it_lasts() -> None:
    parser = OutputParser(FORMATS["hermes"], None, thinking=False)
    states = []
    for piece in ("<thi", "nk>", "Hm", "</think", ">", "So"):
        parser.push(piece)
        states.append(parser.thinking)
    assert states == [False, True, True, True, False, False]


# Values without quotes.

MARKED = "</parameter> is\n</function> text"


@pytest.mark.parametrize(
    ("value", "schema", "read"),
    [
        ("2", {"type": "integer"}, 2),
        ("2", {"type": "string"}, "2"),
        ("2", {"anyOf": [{"type": "string"}, {"type": "null"}]}, "2"),
        ("null", {"type": ["string", "null"]}, None),
        ("True", {"type": "boolean"}, True),
        ("two", {"type": "integer"}, "two"),
        ('{"a": 1}', {"type": "object"}, {"a": 1}),
        ('{"a": 1}', {"enum": ["x"]}, '{"a": 1}'),
        ("[1]", {}, [1]),
        (" x ", {}, " x "),
        (
            "</parameter> is\n</function> text",
            {"type": "string"},
            "</parameter> is\n</function> text",
        ),
    ],
)
def test_a_value_has_the_type_that_its_schema_says(value: str, schema: Any, read: Any) -> None:
    tools = {"f": {"properties": {"v": schema}}}
    parser = OutputParser(FORMATS["qwen3-coder"], tools, thinking=False)
    parser.push(f"<function=f>\n<parameter=v>\n{value}\n</parameter>\n</function>\n")
    parser.finish(cut=False)
    (call,) = parser.take()[2]
    assert json.loads(call.arguments) == {"v": read}
