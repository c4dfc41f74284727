"""The families of models by how they write calls and reasoning, and which one a template shows."""

import re
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType

from server.config.schema import ParserName
from server.parsers.calls import (
    BareKeys,
    JsonCalls,
    NamedJson,
    PythonCalls,
    Syntax,
    Tag,
    TaggedCall,
)
from server.parsers.parser import Form, Format

_QWEN_XML = TaggedCall(
    head=Tag("<function=", re.compile(r"(?P<name>[^>]*)"), (">",)),
    parameter=Tag("<parameter=", re.compile(r"(?P<name>[^>]*)"), (">",)),
    value_end="</parameter>",
    end="</function>",
    close="</tool_call>",
    trims=True,
    sloppy=(("\n<parameter=", ()), ("\n</function>", ("</tool_call>",))),
)
_QWEN_XML_BARE = TaggedCall(
    head=Tag("", re.compile(r"(?P<name>[^>]*)"), (">",)),
    parameter=_QWEN_XML.parameter,
    value_end=_QWEN_XML.value_end,
    end=_QWEN_XML.end,
    close=_QWEN_XML.close,
    trims=True,
    sloppy=_QWEN_XML.sloppy,
)
_GLM = TaggedCall(
    head=Tag("", re.compile(r"(?P<name>[^<]*)"), ("<arg_key>", "</tool_call>")),
    keeps_end=True,
    parameter=Tag(
        "<arg_key>", re.compile(r"(?P<name>.*?)</arg_key>\s*", re.DOTALL), ("<arg_value>",)
    ),
    value_end="</arg_value>",
    end="</tool_call>",
    sloppy=(("</tool_call>", ("<tool_call>",)),),
)
_KIMI_K3 = TaggedCall(
    head=Tag("", re.compile(r'.*?\btool="(?P<name>[^"]*)".*', re.DOTALL), ("<|sep|>",)),
    parameter=Tag(
        "<|open|>argument",
        re.compile(r' key="(?P<name>[^"]*)"(?: type="(?P<kind>\w*)")?.*', re.DOTALL),
        ("<|sep|>",),
    ),
    value_end="<|close|>argument<|sep|>",
    end="<|close|>call<|sep|>",
)


def _dsml(space: str) -> TaggedCall:
    """DeepSeek's markup since V3.2, with or without a space before the names of tags."""
    return TaggedCall(
        head=Tag("", re.compile(r'\s*name="(?P<name>[^"]*)"\s*/?'), (">",)),
        parameter=Tag(
            f"<｜DSML｜{space}parameter",
            re.compile(r'\s*name="(?P<name>[^"]*)"(?:\s+string="(?P<kind>true|false)")?\s*'),
            (">",),
        ),
        value_end=f"</｜DSML｜{space}parameter>",
        end=f"</｜DSML｜{space}invoke>",
    )


_DSML_SECTIONS = ("function_calls>", "tool_calls>", " calls>")
_MISTRAL = NamedJson(
    head=re.compile(r"(?P<name>[^\[\s]+)\s*(?:\[CALL_ID\][^\[]*)?(?:\[ARGS\])?\s*"),
    lists=True,
    marks=("[CALL_ID]", "[ARGS]"),
)
_KIMI_K2 = NamedJson(
    head=re.compile(
        r"(?:functions\.)?(?P<name>[^\s:]+)(?::\d+)?\s*<\|tool_call_argument_begin\|>\s*"
    ),
    tails=("<|tool_call_end|>",),
    marks=("<|tool_call_argument_begin|>",),
)
_DEEPSEEK = NamedJson(
    head=re.compile(
        r"(?:function<｜tool▁sep｜>)?(?P<name>[^\s<]+)\s*(?:<｜tool▁sep｜>|```json)\s*"
    ),
    tails=("```", "<｜tool▁call▁end｜>"),
    marks=("<｜tool▁sep｜>",),
)
_HERMES: dict[str, Syntax] = {
    "<tool_call>": JsonCalls(close="</tool_call>"),
    # What smaller models write in its place.
    "<tools>": JsonCalls(close="</tools>", known=True),
    "```json": JsonCalls(close="```", known=True),
}

FORMATS: Mapping[ParserName, Format] = MappingProxyType(
    {
        "harmony": Format(calls={}, thoughts=(), channels=True),
        "kimi-k3": Format(
            calls={"<|open|>call": _KIMI_K3},
            section=("<|open|>tools<|sep|>", "<|close|>tools<|sep|>"),
            thoughts=(
                ("<|open|>think<|sep|>", "<|close|>think<|sep|>"),
                ("<|open|>think<|sep|>", "<|open|>response<|sep|>"),
            ),
            dropped=(
                "<|open|>response<|sep|>",
                "<|close|>response<|sep|>",
                "<|close|>message<|sep|>",
            ),
        ),
        "kimi-k2": Format(
            calls={"<|tool_call_begin|>": _KIMI_K2},
            section=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
            forms=(
                (
                    "",
                    Form(
                        "<|tool_call_begin|>functions.",
                        ":0<|tool_call_argument_begin|>",
                        "<|tool_call_end|>",
                        begin="<|tool_calls_section_begin|>",
                        end="<|tool_calls_section_end|>",
                    ),
                ),
            ),
            ids="numbered",
        ),
        "deepseek-dsml": Format(
            calls={"<｜DSML｜invoke": _dsml(""), "<｜DSML｜ invoke": _dsml(" ")},
            dropped=tuple(
                f"<{slash}｜DSML｜{name}" for name in _DSML_SECTIONS for slash in ("", "/")
            ),
        ),
        "deepseek": Format(
            calls={"<｜tool▁call▁begin｜>": _DEEPSEEK},
            section=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
            forms=(
                (
                    "```json",
                    Form(
                        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
                        "\n```json\n",
                        "\n```<｜tool▁call▁end｜>",
                        separator="\n",
                        begin="<｜tool▁calls▁begin｜>",
                        end="<｜tool▁calls▁end｜>",
                    ),
                ),
                (
                    "",
                    Form(
                        "<｜tool▁call▁begin｜>",
                        "<｜tool▁sep｜>",
                        "<｜tool▁call▁end｜>",
                        begin="<｜tool▁calls▁begin｜>",
                        end="<｜tool▁calls▁end｜>",
                    ),
                ),
            ),
        ),
        "gemma4": Format(
            calls={"<|tool_call>": BareKeys(quote='<|"|>', close="<tool_call|>")},
            thoughts=(("<|channel>thought", "<channel|>"),),
        ),
        "function-gemma": Format(
            calls={
                "<start_function_call>": BareKeys(quote="<escape>", close="<end_function_call>")
            },
        ),
        "mistral": Format(
            calls={"[TOOL_CALLS]": _MISTRAL},
            forms=(
                ("[ARGS]", Form("[TOOL_CALLS]", "[ARGS]", "")),
                (
                    "",
                    Form(
                        '{"name": "',
                        '", "arguments": ',
                        "}",
                        separator=", ",
                        begin="[TOOL_CALLS] [",
                        end="]",
                    ),
                ),
            ),
            thoughts=(("[THINK]", "[/THINK]"), ("<think>", "</think>")),
            ids="short",
        ),
        "phi4": Format(
            calls={
                "<|tool_call|>": JsonCalls(close="<|/tool_call|>"),
                "functools": JsonCalls(known=True),
            },
            forms=(
                (
                    "",
                    Form(
                        '{"name": "',
                        '", "arguments": ',
                        "}",
                        separator=", ",
                        begin="<|tool_call|>[",
                        end="]<|/tool_call|>",
                    ),
                ),
            ),
        ),
        "qwen3-coder": Format(
            calls={"<tool_call>": _QWEN_XML, "<function=": _QWEN_XML_BARE},
        ),
        "glm": Format(calls={"<tool_call>": _GLM}),
        "llama4": Format(
            calls={},
            bare=PythonCalls(),
            dropped=("<|python_start|>", "<|python_end|>"),
        ),
        "llama3": Format(
            calls={"<|python_tag|>": JsonCalls(between=";")},
            bare=JsonCalls(known=True, between=";"),
            forms=(("", Form('{"name": "', '", "parameters": ', "}", separator="; ")),),
        ),
        "hermes": Format(
            calls=_HERMES,
            bare=JsonCalls(known=True, close="</tool_call>"),
            forms=(
                (
                    "",
                    Form(
                        '<tool_call>\n{"name": "',
                        '", "arguments": ',
                        "}\n</tool_call>",
                        separator="\n",
                    ),
                ),
            ),
        ),
    }
)
"""How each family writes, the ones that are easiest to tell apart first."""

_SHOWN_BY: Mapping[ParserName, tuple[str, ...]] = {
    "harmony": ("<|channel|>", "<|message|>"),
    "kimi-k3": ("<|open|>", "<|close|>"),
    "kimi-k2": ("<|tool_calls_section_begin|>",),
    "deepseek-dsml": ("｜DSML｜",),
    "deepseek": ("<｜tool▁calls▁begin｜>",),
    "gemma4": ("<|tool_call>",),
    "function-gemma": ("<start_function_call>",),
    "mistral": ("[TOOL_CALLS]",),
    "phi4": ("<|tool|>", "<|/tool|>"),
    "qwen3-coder": ("<function=",),
    "glm": ("<arg_key>",),
    "llama4": ("<|header_start|>",),
    "llama3": ("<|start_header_id|>", '"parameters"'),
    "hermes": ("<tool_call>",),
}
"""What a family's templates hold, in the order of :data:`FORMATS`."""


@lru_cache(maxsize=64)
def format_of(name: ParserName, template: str) -> Format | None:
    """Return how a model writes calls and reasoning; None if nothing is known of it.

    Args:
        name: the family's name, ``auto`` to find it by the template, or ``none``.
        template: the text of the model's chat template.
    """
    if name == "auto":
        shown = (each for each, marks in _SHOWN_BY.items() if all(m in template for m in marks))
        name = next(shown, "none")
        if name == "none" and any(mark in template for mark in ("<think>", "</think>")):
            return _ONLY_THINKS
    return FORMATS.get(name)


_ONLY_THINKS = Format(calls={})


def thinks(format: Format, template: str) -> bool:
    """Return whether a model with this template may write reasoning."""
    return format.channels or any(mark in template for pair in format.thoughts for mark in pair)


def form_of(format: Format, template: str) -> Form | None:
    """Return how a model with this template writes calls; None if no grammar is known for it."""
    return next((form for mark, form in format.forms if mark in template), None)


def begins_thinking(format: Format, prompt: str) -> bool:
    """Return whether a prompt ends where reasoning has begun."""
    end = prompt.rstrip()
    return any(end.endswith(begin) for begin, _ in format.thoughts)


def continues_thinking(format: Format, content: str) -> bool:
    """Return whether a message to be continued is in the middle of its reasoning."""
    return any(content.rfind(begin) > content.rfind(end) for begin, end in format.thoughts)
