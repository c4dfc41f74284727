"""Conversations rendered by transformers, as a reference for our own rendering.

``python -m tests.support.template_reference FOLDER`` compares the ``*.jinja`` files of a folder.
Many models' are in llama.cpp (models/templates).
"""

import sys
from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

from transformers.utils import chat_template_utils

from inferneo_jax.errors import TemplateError, TokenizerError
from inferneo_jax.text.chat_template import ChatTemplate

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city: <°C>, wind & rain.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "A city's name"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                "days": {"type": ["integer", "null"], "minimum": 1, "default": 1},
                "hours": {"type": "array", "items": {"type": "number"}},
            },
            "required": ["city"],
        },
        "return": {"type": "object", "properties": {"temperature": {"type": "number"}}},
    },
}
CLOCK = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "The time.",
        "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}},
    },
}
DOCUMENTS = [{"title": "Rain", "text": "It rains <often>."}, {"title": "Sun", "text": "Été"}]

_SYSTEM = {"role": "system", "content": "You are terse.  "}
_USER = {"role": "user", "content": "What's the weather in Zürich & Bern? 👩‍🚀"}
_ANSWER = {"role": "assistant", "content": " It is <b>20</b> °C.\n"}
_CALL = {
    "type": "function",
    "id": "call00001",
    "function": {"name": "get_weather", "arguments": {"city": "Zürich", "days": 2, "hours": [1.5]}},
}
_CALLING = {"role": "assistant", "content": None, "tool_calls": [_CALL]}
_RESULT = {
    "role": "tool",
    "tool_call_id": "call00001",
    "name": "get_weather",
    "content": '{"temperature": 20}',
}
_CALL_AS_TEXT = {
    **_CALL,
    "function": {"name": "get_weather", "arguments": '{"city": "Zürich", "days": 2}'},
}
_PARTS = {
    "role": "user",
    "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "!"}],
}
_IMAGE = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "user": [_USER],
    "system": [_SYSTEM, _USER],
    "turns": [_SYSTEM, _USER, _ANSWER, {"role": "user", "content": "\n And now? "}],
    "answer": [_USER, _ANSWER],
    "developer": [{"role": "developer", "content": "Be brief."}, _USER],
    "calls": [_SYSTEM, _USER, _CALLING, _RESULT],
    "two calls": [_USER, {**_CALLING, "tool_calls": [_CALL, _CALL]}, _RESULT, _RESULT, _ANSWER],
    "call with words": [_USER, {**_CALLING, "content": "Let me see."}, _RESULT, _ANSWER, _USER],
    "arguments as text": [_USER, {**_CALLING, "tool_calls": [_CALL_AS_TEXT]}, _RESULT],
    "empty": [{"role": "user", "content": ""}],
    "parts": [_PARTS],
    "image": [_IMAGE],
    "no alternation": [_USER, _USER, _ANSWER, _ANSWER],
    "unknown role": [{"role": "narrator", "content": "Once"}],
    "think": [_USER, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes."}, _USER],
    **{
        f"{name} then {last[0]['role']}": [_USER, {**_ANSWER, name: "Hm, °C?"}, *last]
        for name in ("reasoning_content", "reasoning", "thinking")
        for last in ([_USER], [_ANSWER])
    },
    "reasoned call": [_USER, {**_CALLING, "reasoning_content": "I need a tool."}, _RESULT],
}

OPTIONS: list[dict[str, Any]] = [
    {"add_generation_prompt": False},
    {"add_generation_prompt": True},
    {"add_generation_prompt": True, "tools": [WEATHER]},
    {"add_generation_prompt": True, "tools": [WEATHER, WEATHER], "enable_thinking": False},
    {"add_generation_prompt": True, "tools": [CLOCK], "functions": "[]", "datetime": "Today"},
    {"add_generation_prompt": True, "documents": DOCUMENTS},
    {"add_generation_prompt": True, "enable_thinking": True, "thinking": True},
    {"continue_final_message": True},
]


def cases() -> Iterator[tuple[str, list[dict[str, Any]], dict[str, Any]]]:
    """Every conversation with every set of options."""
    for (name, messages), options in product(CONVERSATIONS.items(), OPTIONS):
        if options.get("continue_final_message") and not isinstance(messages[-1]["content"], str):
            continue
        yield f"{name}, {options}", messages, options


def by_transformers(source: str, messages: list[dict[str, Any]], **options: Any) -> str | None:
    """What ``apply_chat_template`` makes of the messages; None if it raises."""
    try:
        [text], _ = chat_template_utils.render_jinja_template(
            [chat_template_utils._normalize_chat_messages(messages)],
            chat_template=source,
            **TOKENS | options,
        )
    except Exception:  # noqa: BLE001  (whatever the template makes Python raise)
        return None
    return text


@lru_cache
def _compiled(source: str) -> ChatTemplate:
    return ChatTemplate(source, TOKENS)


def by_us(source: str, messages: list[dict[str, Any]], **options: Any) -> str | None:
    """What this package makes of the messages; None if it refuses."""
    names = ("add_generation_prompt", "continue_final_message")
    flags = {name: options.pop(name, False) for name in names}
    try:
        return _compiled(source).render(messages, **flags, variables=options)
    except (TemplateError, TokenizerError):
        return None


def main() -> None:
    unequal = False
    for file in sorted(Path(sys.argv[1]).glob("*.jinja")):
        source, texts = file.read_text(encoding="utf-8"), 0
        for name, messages, options in cases():
            theirs = by_transformers(source, messages, **options)
            ours = by_us(source, messages, **options)
            texts += theirs is not None
            if ours != theirs:
                unequal = True
                print(f"{file.name}: {name}\n  theirs: {theirs!r}\n  ours:   {ours!r}")
        print(f"{file.name}: transformers renders {texts} of the conversations")
    sys.exit(unequal)


if __name__ == "__main__":
    main()
