"""Tools and reasoning in chat: what templates get, what is found in answers, what is refused."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from inferneo_jax import Tokenizer
from server.api.openai.tools import MAX_SCHEMA_DEPTH, MAX_TOOL_BYTES, MAX_TOOLS
from tests.support.asking import CHATS, HI, ask, frames, prompt_text, refused, stream
from tests.support.fake_engine import writes
from tests.support.fake_server import CHAT, Rig, as_new, make_tokenizer, running

TEMPLATE = (
    "{% for t in tools or [] %}{{ t | tojson }}<tool_call>\n{% endfor %}"
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}"
    "<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n"
    "{% if enable_thinking %}<think>\n{% endif %}{% endif %}"
)


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


LOOK = tool("look", at={"type": "string"})
TOOLS = [LOOK, tool("now")]
CALLS = (
    'So:\n<tool_call>\n{"name": "look", "arguments": {"at": "%s"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)


@pytest.fixture(scope="module")
def with_tools() -> Iterator[tuple[Rig, Tokenizer]]:
    tokenizer = make_tokenizer("<tool_call>", "</tool_call>", template=TEMPLATE)
    with running(tokenizer, context=8192) as rig:
        yield rig, tokenizer


@pytest.fixture
def rig(with_tools: tuple[Rig, Tokenizer]) -> Iterator[Rig]:
    rig, tokenizer = with_tools
    with as_new(rig.engine, tokenizer):
        yield rig


@pytest.fixture
def tokenizer(with_tools: tuple[Rig, Tokenizer]) -> Tokenizer:
    return with_tools[1]


def joined(chunks: list[Any]) -> dict[str, Any]:
    """The message that the chunks of a stream of one choice add up to."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    for chunk in chunks:
        for choice in chunk["choices"]:
            delta = choice["delta"]
            assert delta.get("reasoning") == delta.get("reasoning_content")
            for key in ("content", "reasoning_content"):
                message[key] += delta.get(key) or ""
            for part in delta.get("tool_calls", ()):
                if part["index"] == len(message["tool_calls"]):
                    assert part["id"]
                    message["tool_calls"].append([part["function"]["name"], ""])
                else:
                    assert part.keys() == {"index", "function"}, "id and name are sent once"
                message["tool_calls"][part["index"]][1] += part["function"]["arguments"]
            message["finish_reason"] = choice["finish_reason"]
    return message


def whole(answer: Any) -> dict[str, Any]:
    """The same of a whole answer."""
    (choice,) = answer["choices"]
    message = choice["message"]
    assert message.get("reasoning") == message.get("reasoning_content")
    return {
        "content": message["content"] or "",
        "reasoning_content": message.get("reasoning_content", ""),
        "tool_calls": [
            [call["function"]["name"], call["function"]["arguments"]]
            for call in message.get("tool_calls", ())
        ],
        "finish_reason": choice["finish_reason"],
    }


@pytest.mark.parametrize("long", ["x", "y" * 3000])
@pytest.mark.parametrize("batch", [1, 7])
def test_calls_are_the_same_whole_streamed_and_over_a_socket(
    rig: Rig, tokenizer: Tokenizer, long: str, batch: int
) -> None:
    rig.engine.script, rig.engine.batch = writes(tokenizer, CALLS % long), batch
    body = {"tools": TOOLS, "max_tokens": 5000}
    answer = ask(rig, CHATS, **body)
    assert whole(answer) == {
        "content": "So:",
        "reasoning_content": "",
        "tool_calls": [["look", json.dumps({"at": long})], ["now", "{}"]],
        "finish_reason": "tool_calls",
    }
    first, second = answer["choices"][0]["message"]["tool_calls"]
    assert first["id"] != second["id"]
    assert first["type"] == second["type"] == "function"
    assert joined(stream(rig, CHATS, **body)) == whole(answer)
    assert joined(frames(rig, CHATS, **body)) == whole(answer)


def test_a_message_of_calls_alone_has_no_content(rig: Rig, tokenizer: Tokenizer) -> None:
    rig.engine.script = writes(tokenizer, (CALLS % "x").removeprefix("So:\n"))
    (choice,) = ask(rig, CHATS, tools=TOOLS)["choices"]
    assert choice["message"]["content"] is None


def test_without_parallel_calls_the_first_ends_the_message(rig: Rig, tokenizer: Tokenizer) -> None:
    rig.engine.script = writes(tokenizer, CALLS % "x")
    got = ask(rig, CHATS, tools=TOOLS, parallel_tool_calls=False)
    assert [name for name, _ in whole(got)["tool_calls"]] == ["look"]
    assert got["choices"][0]["finish_reason"] == "tool_calls"
    rig.engine.wait_until(lambda engine: engine.num_running == 0)


def test_half_a_call_is_left_out(rig: Rig, tokenizer: Tokenizer) -> None:
    rig.engine.script = writes(tokenizer, CALLS % ("x" * 500))
    for got in (
        whole(ask(rig, CHATS, tools=TOOLS)),
        joined(stream(rig, CHATS, tools=TOOLS)),
    ):
        assert (got["content"], got["tool_calls"], got["finish_reason"]) == ("So:", [], "length")


def test_tokens_of_calls_have_log_probabilities(rig: Rig, tokenizer: Tokenizer) -> None:
    rig.engine.script = writes(tokenizer, CALLS % "x")
    body = {"tools": TOOLS, "logprobs": True, "max_tokens": 200}
    tokens = ask(rig, CHATS, **body)["choices"][0]["logprobs"]["content"]
    chunks = stream(rig, CHATS, **body)
    lists = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"]]
    assert [token for each in lists if each for token in each["content"]] == tokens
    assert "look" in "".join(token["token"] for token in tokens)


def test_the_template_gets_tools_and_arguments_as_objects(rig: Rig, tokenizer: Tokenizer) -> None:
    bare = {"type": "function", "function": {"name": "now", "strict": True}}
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": '{"a": 1}'}}
    messages = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
    ]
    ask(rig, CHATS, tools=[LOOK, bare], messages=messages)
    shown, _, rest = prompt_text(rig, tokenizer).partition("<tool_call>\n")
    assert json.loads(shown) == LOOK
    assert json.loads(rest.partition("<tool_call>\n")[0]) == tool("now")
    assert '{"a": 1}<|end|>' in rest
    assert "<|start|>tool\nnoon<|end|>" in rest
    tokens = rig.post("/tokenize", {"messages": messages, "tools": TOOLS}).json()["tokens"]
    ask(rig, CHATS, tools=TOOLS, messages=messages)
    assert tuple(tokens) == rig.engine.submitted[-1].prompt


def test_with_choice_none_the_model_has_no_tools(rig: Rig, tokenizer: Tokenizer) -> None:
    rig.engine.script = writes(tokenizer, CALLS % "x")
    got = ask(rig, CHATS, tools=TOOLS, tool_choice="none", max_tokens=200)
    assert "look" not in prompt_text(rig, tokenizer)
    assert '{"name": "look"' in got["choices"][0]["message"]["content"]
    assert got["choices"][0]["finish_reason"] == "stop"


# Forced calls.

NAMED = {"type": "function", "function": {"name": "now"}}


@pytest.mark.parametrize(("choice", "told"), [("required", "look"), (NAMED, "now")])
def test_a_call_that_is_asked_for_is_forced_by_a_grammar(
    rig: Rig, tokenizer: Tokenizer, choice: Any, told: str
) -> None:
    rig.engine.script = writes(tokenizer, (CALLS % "x").removeprefix("So:\n"))
    got = ask(rig, CHATS, tools=TOOLS, tool_choice=choice)
    assert got["choices"][0]["finish_reason"] == "tool_calls"
    constraint = rig.engine.submitted[-1].constraint
    assert constraint is not None
    assert told in constraint.grammar
    assert ("look" in constraint.grammar) == (choice == "required")
    ask(rig, CHATS, tools=TOOLS)
    assert rig.engine.submitted[-1].constraint is None


def test_a_form_of_the_answer_leaves_room_for_calls_and_reasoning(rig: Rig) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    ask(rig, CHATS, tools=TOOLS, response_format=form)
    constraint = rig.engine.submitted[-1].constraint
    assert constraint is not None
    assert "look" in constraint.grammar
    ask(rig, CHATS, enable_thinking=True, response_format=form)
    constraint = rig.engine.submitted[-1].constraint
    assert constraint is not None
    assert "</think>" in constraint.grammar


def test_what_of_a_tools_schema_is_not_enforced_is_said_or_refused(rig: Rig) -> None:
    odd = tool("odd", at={"type": "array", "contains": {"type": "string"}})
    answer = ask(rig, CHATS, tools=[odd], tool_choice="required")
    assert "contains" in answer["warnings"][0]
    odd["function"]["strict"] = True
    error = refused(rig, CHATS, tools=[odd], tool_choice="required")
    assert (error["param"], "contains" in error["message"]) == ("tools", True)


# Reasoning.


@pytest.mark.parametrize("options", [{"enable_thinking": True}, {"reasoning_effort": "low"}])
def test_reasoning_is_told_apart_and_counted(
    rig: Rig, tokenizer: Tokenizer, options: dict[str, Any]
) -> None:
    rig.engine.script = writes(tokenizer, "Hm, the END.\n</think>\n\nYes.")
    answer = ask(rig, CHATS, **options)
    assert prompt_text(rig, tokenizer).endswith("<think>\n")
    want = {"content": "Yes.", "reasoning_content": "Hm, the END.", "tool_calls": []}
    assert whole(answer) == want | {"finish_reason": "stop"}
    count = len(tokenizer.encode("Hm, the END.\n</think>", add_special_tokens=False))
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": count}
    assert joined(stream(rig, CHATS, **options)) == whole(answer)
    assert joined(frames(rig, CHATS, **options)) == whole(answer)


def test_reasoning_without_an_end_is_no_content(rig: Rig, tokenizer: Tokenizer) -> None:
    rig.engine.script = writes(tokenizer, "Hm" * 200)
    answer = ask(rig, CHATS, enable_thinking=True)
    assert whole(answer)["content"] == ""
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 100}


def test_reasoning_can_be_turned_off(rig: Rig, tokenizer: Tokenizer) -> None:
    for options in (
        {"enable_thinking": False},
        {"reasoning_effort": "none"},
        {"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}},
    ):
        assert "warnings" not in ask(rig, CHATS, **options)
        assert prompt_text(rig, tokenizer).endswith("assistant\n")


def test_reasoning_in_a_stream_is_sent_before_its_end(rig: Rig, tokenizer: Tokenizer) -> None:
    rig.engine.script, rig.engine.limit = writes(tokenizer, "Hm, the END.</think>Yes."), 5
    body = {"model": CHAT, "messages": HI, "enable_thinking": True, "stream": True}
    with rig.client.stream("POST", CHATS, json=body) as response:
        lines = response.iter_lines()
        assert any('"reasoning_content":"Hm' in line for line in lines)
        rig.engine.release()
        assert any('"content":"Yes."' in line for line in lines)


# What is wrong is named.

DEEP: dict[str, Any] = {"type": "object"}
for _ in range(MAX_SCHEMA_DEPTH):
    DEEP = {"items": DEEP}


def changed(**function: Any) -> list[Any]:
    return [{"type": "function", "function": {"name": "f"} | function}]


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"tools": {}}, "tools", ["an object", "a list"]),
        ({"tools": [5]}, "tools[0]", ["an integer", "an object"]),
        ({"tools": [LOOK] * (MAX_TOOLS + 1)}, "tools", [str(MAX_TOOLS)]),
        ({"tools": [LOOK, LOOK]}, "tools[1].function.name", ["'look'"]),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", ["'web_search'", "function"]),
        ({"tools": [{"type": "function"}]}, "tools[0].function", ["null"]),
        ({"tools": changed(name="a b")}, "tools[0].function.name", ["'a b'", "64"]),
        ({"tools": changed(name="a" * 65)}, "tools[0].function.name", ["64"]),
        ({"tools": changed(parameters="x")}, "tools[0].function.parameters", ["a JSON schema"]),
        ({"tools": changed(strict=1)}, "tools[0].function.strict", ["true or false"]),
        ({"tools": changed(parameters=DEEP)}, "tools[0].function", [str(MAX_SCHEMA_DEPTH)]),
        (
            {"tools": changed(description="x" * MAX_TOOL_BYTES)},
            "tools[0].function",
            [str(MAX_TOOL_BYTES)],
        ),
        ({"tool_choice": "required"}, "tool_choice", ["tools"]),
        (
            {"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
            "response_format",
            ["tool_choice"],
        ),
        (
            {"tools": TOOLS, "grammar": 'root ::= "a"'},
            "grammar",
            ["tools"],
        ),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice", ["'any'", "required"]),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "go"}}},
            "tool_choice.function.name",
            ["'go'", "look, now"],
        ),
        ({"tools": TOOLS, "parallel_tool_calls": 1}, "parallel_tool_calls", ["true or false"]),
        ({"reasoning_effort": "much"}, "reasoning_effort", ["'much'", "low"]),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs", ["tools"]),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
            "messages[0].tool_calls[0].function.name",
            ["null", "a string"],
        ),
        (
            {"messages": [{"role": "tool", "content": "x", "tool_call_id": 5}]},
            "messages[0].tool_call_id",
            ["an integer"],
        ),
    ],
)
def test_what_is_wrong_is_named(
    rig: Rig, changes: dict[str, Any], param: str, words: list[str]
) -> None:
    error = refused(rig, CHATS, **changes)
    assert error["param"] == param, error
    for word in words:
        assert word in error["message"]
