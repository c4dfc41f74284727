"""Chat templates: Jinja programs, shipped with a model, that write a conversation as one text.

They come from model repositories, so they run in a sandbox: no Python internals, no changes to the
messages, and bounds on time and size. The environment is the one that model authors write
for (Hugging Face's): the same filters, functions and block rules.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser

from inferneo_jax import sandbox
from inferneo_jax.errors import TemplateError, TokenizerError
from inferneo_jax.template_size import MAX_CHARACTERS

Message = Mapping[str, Any]
"""One message of a conversation: ``role``, ``content`` and what else the template reads."""

MAX_INDENT = 16
"""Widest indentation of ``tojson``."""

_TAIL = "\ue0c5continue\ue0c5 "  # private-use characters around a word; ends in a space on purpose


class ChatTemplate:
    """A compiled chat template; may render in several threads at once.

    Attributes:
        variables: what the template reads beyond what every rendering gives it.
    """

    def __init__(self, source: str, named_tokens: Mapping[str, str]) -> None:
        """Compile a template.

        Args:
            source: the Jinja text.
            named_tokens: variables such as ``bos_token``, which every rendering sees.

        Raises:
            TokenizerError: the text is not a template.
        """
        self._named_tokens = dict(named_tokens)
        try:
            self._template = _ENVIRONMENT.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TokenizerError(
                f"the chat template does not compile: line {error.lineno}: {error.message}"
            ) from error
        read = jinja2.meta.find_undeclared_variables(_ENVIRONMENT.parse(source))
        given = {"messages", "add_generation_prompt", *named_tokens, *_ENVIRONMENT.globals}
        self.variables = frozenset(read - given)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """Write ``messages`` as one text; see ``Tokenizer.render_chat``.

        Raises:
            TemplateError: the template refused the messages, failed, or ran beyond its bounds.
        """
        if not messages:
            raise TemplateError("messages is empty; send at least one", "messages")
        if "messages" in variables:
            raise TemplateError("the template variable 'messages' is taken", "chat_template_kwargs")
        context = {
            "tools": None,
            "documents": None,
            **self._named_tokens,
            **variables,
            "messages": _with_tail(messages) if continue_final_message else list(messages),
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
            "range": sandbox.ranges,
        }
        with sandbox.metered():
            text = self._run(context)
        if not continue_final_message:
            return text
        return _cut_at_tail(text, messages[-1]["content"])

    def _run(self, context: Mapping[str, Any]) -> str:
        parts: list[str] = []
        size = 0
        try:
            for part in self._template.generate(context):
                size += len(part)
                if size > MAX_CHARACTERS:
                    raise TemplateError(
                        f"the chat template wrote more than {MAX_CHARACTERS} characters; "
                        "send shorter messages",
                        "messages",
                    )
                parts.append(part)
        except jinja2.TemplateError as error:
            raise TemplateError(
                f"the chat template refused: {error.message}", "messages"
            ) from error
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            MemoryError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            # A template written for other messages than these, such as one that adds a text to a
            # content that is null.
            raise TemplateError(
                f"the chat template cannot write these messages: {error}", "messages"
            ) from error
        return "".join(parts)


def _with_tail(messages: Sequence[Message]) -> list[Message]:
    if not messages or not isinstance(messages[-1].get("content"), str):
        raise TemplateError(
            "continue_final_message needs a last message whose content is a text", "messages"
        )
    last = {**messages[-1], "content": messages[-1]["content"] + _TAIL}
    return [*messages[:-1], last]


def _cut_at_tail(text: str, content: str) -> str:
    """Cut ``text`` where the last message's content ends.

    A template that trims the content has taken the tail's own space with it; then the space before
    the tail would have gone too.
    """
    cut = text.rfind(_TAIL.rstrip())
    if cut < 0 or content.strip() not in text:
        raise TemplateError(
            "continue_final_message: this chat template does not write the last message as it is",
            "continue_final_message",
        )
    return text[:cut] if text.startswith(_TAIL, cut) else text[:cut].rstrip()


class _Generation(jinja2.ext.Extension):
    """``{% generation %}``, which marks the assistant's words for training: written as they are."""

    tags = {"generation"}  # noqa: RUF012  (the base class declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Keep the body, drop the mark."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """``tojson`` without Jinja's escapes for HTML."""
    if indent is not None and indent > MAX_INDENT:
        raise jinja2.TemplateError(f"it indents JSON by more than {MAX_INDENT}")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _environment() -> sandbox.Sandbox:
    environment = sandbox.Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, _Generation],
    )
    sandbox.install(environment)
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


_ENVIRONMENT = _environment()
