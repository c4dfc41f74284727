"""Which family a chat template shows, and where a prompt leaves the answer."""

from typing import get_args

import pytest

from server.config.schema import ParserName
from server.parsers.families import (
    FORMATS,
    begins_thinking,
    continues_thinking,
    format_of,
    thinks,
)

TEMPLATES: dict[str, str] = {
    "hermes": "<tools>{{ tools }}</tools> <tool_call>\n{'name': ...}</tool_call>",
    "qwen3-coder": "<tool_call>\n<function=example>\n<parameter=a>",
    "glm": "<tool_call>{name}\n<arg_key>{key}</arg_key>",
    "llama3": "<|start_header_id|>{{ role }} <|python_tag|> {'name': n, \"parameters\": p}",
    "llama4": "<|header_start|>{{ role }} <|python_start|>",
    "mistral": "[INST] [TOOL_CALLS] [AVAILABLE_TOOLS]",
    "gemma4": "<|turn>model <|tool_call>call:",
    "function-gemma": "<start_function_call>call:",
    "harmony": "<|start|>assistant<|channel|>final<|message|>",
    "kimi-k2": "<|im_middle|><|tool_calls_section_begin|>",
    "kimi-k3": '<|open|>message role="user"<|sep|><|close|>message<|sep|>',
    "deepseek": "<｜Assistant｜><｜tool▁calls▁begin｜>",
    "deepseek-dsml": "<｜DSML｜function_calls>",
    "phi4": "<|system|>{{ system }}<|tool|>{{ tools }}<|/tool|>",
}


def test_the_settings_name_every_family() -> None:
    assert set(get_args(ParserName)) == {"auto", "none", *FORMATS}
    assert TEMPLATES.keys() == FORMATS.keys()


@pytest.mark.parametrize("name", FORMATS)
def test_a_template_shows_its_family(name: ParserName) -> None:
    assert format_of("auto", TEMPLATES[name]) is FORMATS[name]
    assert format_of(name, "anything") is FORMATS[name]
    assert format_of("none", TEMPLATES[name]) is None


def test_a_template_without_calls_may_show_reasoning() -> None:
    plain = "{{ messages }}"
    assert format_of("auto", plain) is None
    format = format_of("auto", plain + "<think>")
    assert format is not None
    assert thinks(format, "<think>")
    assert not thinks(FORMATS["hermes"], TEMPLATES["hermes"])


def test_a_prompt_may_begin_the_reasoning() -> None:
    format = FORMATS["hermes"]
    for prompt, begun in (("<think>\n", True), ("<think>\n\n</think>\n\n", False), ("hi", False)):
        assert begins_thinking(format, prompt) is begun
        assert continues_thinking(format, prompt + "so") is begun
