"""``/v1/chat/completions``: what a request may hold, and the shapes of its answers."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator

from server.api.openai.common import MAX_LOGPROBS, Body, GenerationBody
from server.config.validation import FieldError, json_kind
from server.run.dialect import Dialect
from server.run.output import NamedToken, TextPart, TokenInfo

MAX_MESSAGES = 10_000
ROLES = ("system", "developer", "user", "assistant", "tool", "function")


def _messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise FieldError("messages", f"is {json_kind(value)}; it must be a list of messages.")
    if not value:
        raise FieldError("messages", "is an empty list; it needs at least one message.")
    if len(value) > MAX_MESSAGES:
        raise FieldError(
            "messages", f"holds {len(value)} messages; it may hold at most {MAX_MESSAGES}."
        )
    return [_message(message, f"messages[{i}]") for i, message in enumerate(value)]


def _message(value: Any, name: str) -> dict[str, Any]:
    """A message as templates take it: ``content`` is one text."""
    if not isinstance(value, dict):
        raise FieldError(name, f"is {json_kind(value)}; it must be an object.")
    role = value.get("role")
    if role not in ROLES:
        shown = repr(role) if isinstance(role, str) else json_kind(role)
        raise FieldError(f"{name}.role", f"is {shown[:60]}; it must be one of {', '.join(ROLES)}.")
    # Templates know the name that "developer" replaced.
    message = value | {"role": "system" if role == "developer" else role}
    content, calls = value.get("content"), value.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and set(map(type, calls)) <= {dict}):
        raise FieldError(
            f"{name}.tool_calls", f"is {json_kind(calls)}; it must be a list of objects."
        )
    if content is None and role == "assistant" and calls:
        return message
    return message | {"content": _text(content, f"{name}.content")}


def _text(content: Any, name: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise FieldError(
            name, f"is {json_kind(content)}; it must be a string or a list of text parts."
        )
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            shown = f"of type {kind[:40]!r}" if isinstance(kind, str) else json_kind(part)
            raise FieldError(
                f"{name}[{i}]",
                f"is {shown}; this server reads text only, in parts such as "
                '{"type": "text", "text": "..."}.',
            )
        texts.append(part["text"])
    return "\n".join(texts)


_TEXT_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART, "minItems": 1}]}
_TOOL_CALLS = {"type": "array", "items": {"type": "object"}}
_MESSAGE = {
    "anyOf": [
        {
            "type": "object",
            "properties": {
                "role": {"enum": [*ROLES]},
                "content": _CONTENT,
                "tool_calls": {"anyOf": [_TOOL_CALLS, {"type": "null"}]},
            },
            "required": ["role", "content"],
        },
        {
            "type": "object",
            "properties": {
                "role": {"const": "assistant"},
                "content": {"anyOf": [*_CONTENT["anyOf"], {"type": "null"}]},
                "tool_calls": _TOOL_CALLS | {"minItems": 1},
            },
            "required": ["role", "tool_calls"],
        },
    ]
}
_MESSAGES = {"type": "array", "items": _MESSAGE, "minItems": 1, "maxItems": MAX_MESSAGES}
_TAKEN = ("add_generation_prompt", "continue_final_message", "messages")
_VARIABLES = {"type": "object", "propertyNames": {"not": {"enum": [*_TAKEN]}}}


class Conversation(Body):
    """Messages, and how the model's chat template makes a prompt of them."""

    messages: Annotated[
        list[dict[str, Any]], PlainValidator(_messages), WithJsonSchema(_MESSAGES)
    ] = Field(
        description="The conversation so far. A message has a role, system, developer (which means "
        "system), user, assistant, tool or function, and a content: a text, or a list of text "
        "parts, which are joined by newlines."
    )
    chat_template_kwargs: Annotated[dict[str, Any], WithJsonSchema(_VARIABLES)] = Field(
        default_factory=dict, description="Further variables of the model's chat template."
    )
    continue_final_message: bool = Field(
        False, description="Go on with the last message, which must be the assistant's."
    )
    add_generation_prompt: bool | None = Field(
        None,
        description="Open the assistant's message; by default true, unless continue_final_message "
        "is.",
    )

    @model_validator(mode="after")
    def _check_conversation(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            raise FieldError(
                "continue_final_message",
                "and add_generation_prompt exclude each other; send one of them.",
            )
        if self.continue_final_message and self.messages[-1]["role"] != "assistant":
            raise FieldError(
                "continue_final_message",
                "needs the last message to be the assistant's; "
                f"its role is {self.messages[-1]['role']}.",
            )
        if wrong := [name for name in _TAKEN if name in self.chat_template_kwargs]:
            raise FieldError(
                "chat_template_kwargs", f"may not hold {wrong[0]}; send it beside them."
            )
        return self


class ChatBody(Conversation, GenerationBody):
    """A conversation to go on with."""

    logprobs: bool = Field(False, description="Log probabilities of the tokens.")
    top_logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="So many alternatives beside each token; needs logprobs.",
    )

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise FieldError("top_logprobs", "needs logprobs to be true.")
        if self.token_limit == 0:
            raise FieldError("max_tokens", "is 0; it must be at least 1.")
        return self


class ChatDialect(Dialect):
    """Answers of ``/v1/chat/completions``."""

    whole = "chat.completion"
    part = "chat.completion.chunk"

    def columns(self, tokens: Sequence[TokenInfo]) -> dict[str, list[Any]]:
        """The lists that log probabilities consist of, for these tokens."""
        return {
            "content": [
                _entry(token) | {"top_logprobs": [_entry(other) for other in token.top]}
                for token in tokens
            ]
        }

    def message(self, text: str, columns: Mapping[str, Any]) -> dict[str, Any]:
        """A choice's text and log probabilities in a whole answer."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(columns)}

    def opening(self) -> dict[str, Any]:
        """What each choice begins with, before any text."""
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def delta(self, event: TextPart) -> dict[str, Any]:
        """A choice's text and log probabilities in a chunk."""
        logprobs = self._logprobs(self.columns(event.tokens))
        return {"delta": {"content": event.text}, "logprobs": logprobs}

    def ending(self) -> dict[str, Any]:
        """The chunk that carries nothing but a finish reason."""
        return {"delta": {}, "logprobs": None}

    def _logprobs(self, columns: Mapping[str, Any]) -> dict[str, Any] | None:
        return {**columns, "refusal": None} if self.with_logprobs else None


def _entry(token: NamedToken) -> dict[str, Any]:
    return {"token": token.name, "logprob": token.logprob, "bytes": list(token.bytes)}
