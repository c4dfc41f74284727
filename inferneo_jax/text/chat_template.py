"""Chat templates: Jinja programs, shipped with a model, that render a conversation as one text.

Templates come from model repositories, so they run in separate processes whose memory and time the
kernel limits (see ``template_worker.py``). They see the same variables as in transformers.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from inferneo_jax.errors import TemplateError, TokenizerError
from inferneo_jax.text import template_protocol as protocol
from inferneo_jax.text.template_pool import POOL, Answer, WorkerEndedError

Message = Mapping[str, Any]
"""One message of a conversation: ``role``, ``content`` and whatever else the template reads."""

MAX_SECONDS = 5.0
"""Maximum CPU time of a rendering."""

_TAIL = "\ue0c5continue\ue0c5 "  # private-use characters around a word; the final space is needed
_REASONING = ("reasoning_content", "thinking", "reasoning")
_ADVICE = "; send shorter messages, or tools and variables that are less deeply nested"


class ChatTemplate:
    """A compiled chat template, which can render in several threads at once.

    Attributes:
        text: the Jinja text.
        variables: the names that the template reads but that not every rendering provides.
    """

    def __init__(self, source: str, named_tokens: Mapping[str, str]) -> None:
        """Compile a template.

        Args:
            source: the Jinja text.
            named_tokens: variables such as ``bos_token``, provided to every rendering.

        Raises:
            TokenizerError: the text is not a template, or exceeds the limits when compiled.
            EngineError: the process that compiles templates cannot be started.
        """
        self._named_tokens = dict(named_tokens)
        self.text = source
        self._source = source.encode("utf-8", "surrogatepass")
        POOL.start()
        try:
            answer = POOL.ask(self._source, b"", MAX_SECONDS)
        except WorkerEndedError as error:
            raise TokenizerError(f"the chat template does not compile: {error}") from error
        if answer.kind != protocol.TEXT:
            raise TokenizerError(f"the chat template does not compile: {_reason(answer)}")
        given = {"messages", "add_generation_prompt", *named_tokens}
        self.variables = frozenset(answer.text.split()) - given

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """Render ``messages`` as one text; see ``Tokenizer.render_chat``.

        Raises:
            TemplateError: the template rejected the messages, failed, or exceeded its limits.
            EngineError: the process that renders templates cannot be started.
        """
        if not messages:
            raise TemplateError("messages is empty; send at least one", "messages")
        if "messages" in variables:
            raise TemplateError("the template variable 'messages' is taken", "chat_template_kwargs")
        shown = _with_tail(messages) if continue_final_message else messages
        context = {
            "tools": None,
            "documents": None,
            **self._named_tokens,
            **variables,
            "messages": [_as_transformers_shows(message) for message in shown],
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        }
        text = self._rendered(_as_json(context))
        if not continue_final_message:
            return text
        return _cut_at_tail(text, messages[-1]["content"])

    def _rendered(self, context: bytes) -> str:
        try:
            answer = POOL.ask(self._source, context, MAX_SECONDS)
        except WorkerEndedError as error:
            raise TemplateError(
                f"the chat template cannot write these messages: {error}{_ADVICE}", "messages"
            ) from error
        if answer.kind == protocol.TEXT and len(answer.text) <= protocol.MAX_CHARACTERS:
            return answer.text
        if answer.kind == protocol.REFUSED:
            raise TemplateError(f"the chat template refused: {answer.text}", "messages")
        advice = "" if answer.kind == protocol.FAILED else _ADVICE
        raise TemplateError(
            f"the chat template cannot write these messages: {_reason(answer)}{advice}", "messages"
        )


def _reason(answer: Answer) -> str:
    """Describe why a template could not be compiled or rendered."""
    match answer.kind:
        case protocol.MEMORY:
            return f"it needs more than {protocol.MEMORY_BYTES >> 20} MB of memory"
        case protocol.TOO_DEEP:
            return "it recurses too deeply"
        case protocol.TOO_LONG:
            return f"it writes more than {protocol.MAX_CHARACTERS} characters"
    return answer.text[: protocol.MAX_ERROR_CHARACTERS]


def _as_json(context: Mapping[str, Any]) -> bytes:
    """Serialize the context for a worker.

    Raises:
        TemplateError: the context cannot be JSON, is nested too deeply, or is too long.
    """
    try:
        written = json.dumps(context).encode()
    except RecursionError:
        raise TemplateError(
            "messages or template variables are nested too deeply; nest them less", "messages"
        ) from None
    except (TypeError, ValueError) as error:
        raise TemplateError(
            f"messages and template variables must be JSON: {error}", "messages"
        ) from error
    if len(written) > protocol.MAX_REQUEST_BYTES:
        raise TemplateError(
            f"messages and template variables take {len(written)} bytes as JSON, more than "
            f"{protocol.MAX_REQUEST_BYTES}; send shorter messages",
            "messages",
        )
    return written


def _as_transformers_shows(message: Message) -> dict[str, Any]:
    """A message without null values, and with its reasoning under the names that templates use."""
    shown = {key: value for key, value in message.items() if value is not None}
    reasoning = next((shown[key] for key in _REASONING if key in shown), None)
    if reasoning is None:
        return shown
    return {"thinking": reasoning, **shown, "reasoning_content": reasoning}


def _with_tail(messages: Sequence[Message]) -> list[Message]:
    if not messages or not isinstance(messages[-1].get("content"), str):
        raise TemplateError(
            "continue_final_message needs a last message whose content is a text", "messages"
        )
    last = {**messages[-1], "content": messages[-1]["content"] + _TAIL}
    return [*messages[:-1], last]


def _cut_at_tail(text: str, content: str) -> str:
    """Cut ``text`` where the last message's content ends.

    If the template trimmed the content, it also removed the space at the end of the tail; without
    the tail, it would have removed the space at the end of the content, so that is cut as well.
    """
    cut = text.rfind(_TAIL.rstrip())
    if cut < 0 or content.strip() not in text:
        raise TemplateError(
            "continue_final_message: this chat template does not write the last message as it is",
            "continue_final_message",
        )
    return text[:cut] if text.startswith(_TAIL, cut) else text[:cut].rstrip()
