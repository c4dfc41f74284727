"""``/v1/chat/completions``: the request body, the wire format of answers, and the endpoint."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired, Self

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator
from quart import Response
from typing_extensions import TypedDict

from server.api.body import Body, validate
from server.api.endpoint import Endpoint
from server.api.examples import CHAT_MODEL
from server.api.openai.generation import (
    LOGPROBS,
    MAX_LOGPROBS,
    SOCKET,
    Finish,
    Generated,
    GeneratedChunk,
    GenerationBody,
    Index,
    OpenAIDialect,
    Unfinished,
    Usage,
    generate,
    prepare,
    streamed,
)
from server.api.websocket import serve_socket
from server.config.validation import FieldError, json_kind
from server.http.errors import bad_request
from server.http.schema import Null
from server.prompt.prompts import Prompt, conversation_ids, fit
from server.run.context import Context
from server.run.dialect import Choice
from server.run.generation import Answer
from server.run.output import FinishReason, NamedToken, TokenInfo
from server.services import Services

if TYPE_CHECKING:
    from inferneo_jax import Tokenizer
    from server.models.registry import Registry

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
    """Return a message as templates expect it, with ``content`` as one string."""
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
    """The messages of a conversation, and options for rendering them as a prompt."""

    messages: Annotated[
        list[dict[str, Any]], PlainValidator(_messages), WithJsonSchema(_MESSAGES)
    ] = Field(
        description="The conversation so far. Each message has a role (system, developer, "
        "user, assistant, tool or function; developer is treated as system) and "
        "content: a string, or a list of text parts, which are joined by newlines."
    )
    chat_template_kwargs: Annotated[dict[str, Any], WithJsonSchema(_VARIABLES)] = Field(
        default_factory=dict, description="Additional variables for the model's chat template."
    )
    continue_final_message: bool = Field(
        False, description="Continue the last message, which must be from the assistant."
    )
    add_generation_prompt: bool | None = Field(
        None,
        description="Whether to open a new assistant message; by default true, unless "
        "continue_final_message is true.",
    )

    def token_ids(
        self,
        tokenizer: "Tokenizer",
        warnings: list[str],
        *,
        strict: bool,
        add_special_tokens: bool = False,
    ) -> list[int]:
        """Return the token ids of the conversation; see :func:`conversation_ids`."""
        return conversation_ids(
            tokenizer,
            self.messages,
            self.chat_template_kwargs,
            warnings,
            add_generation_prompt=self.add_generation_prompt is not False,
            continue_final_message=self.continue_final_message,
            strict=strict,
            add_special_tokens=add_special_tokens,
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
    """A request to continue a conversation."""

    logprobs: bool = Field(
        False, description="Return the log probabilities of the generated tokens."
    )
    top_logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="The number of likely alternatives to return for each token; requires "
        "logprobs.",
    )

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise FieldError("top_logprobs", "needs logprobs to be true.")
        if self.token_limit == 0:
            raise FieldError("max_tokens", "is 0; it must be at least 1.")
        return self


class Alternative(TypedDict):
    """A token and its log probability at one position."""

    token: Annotated[
        str,
        Field(description="The token as text; a part of a character is written as `bytes:\\x..`."),
    ]
    logprob: Annotated[
        float, Field(description="The log probability of the token, before temperature is applied.")
    ]
    bytes: Annotated[
        list[Annotated[int, Field(ge=0, le=255)]],
        Field(description="The text of the token as UTF-8 bytes."),
    ]


class ChatToken(Alternative):
    """A generated token, with its most likely alternatives."""

    top_logprobs: Annotated[
        list[Alternative],
        Field(
            description="The most likely tokens at this position, as many as the request asks for."
        ),
    ]


class ChatLogprobs(TypedDict):
    """The log probabilities of the tokens of a message."""

    content: Annotated[list[ChatToken], Field(description="One entry for each token, in order.")]
    refusal: Null


class AnswerMessage(TypedDict):
    """The message that the assistant generated."""

    role: Literal["assistant"]
    content: Annotated[str, Field(description="The text of the message.")]
    refusal: Null


class ChatChoice(TypedDict):
    """One of the generated messages."""

    index: Index
    message: Annotated[AnswerMessage, Field(description="The generated message.")]
    logprobs: Annotated[
        ChatLogprobs | None,
        LOGPROBS,
    ]
    finish_reason: Finish


class ChatCompletion(Generated):
    """The messages generated for a conversation."""

    object: Literal["chat.completion"]
    choices: Annotated[list[ChatChoice], Field(description="The choices, as many as `n` asks for.")]
    usage: Annotated[Usage, Field(description="The number of tokens that the request used.")]


class MessageDelta(TypedDict):
    """The new part of a message; the role is sent once, in the first chunk."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[Annotated[str, Field(description="The text to append to the message.")]]


class ChatDelta(TypedDict):
    """The new part of a choice."""

    index: Index
    delta: Annotated[
        MessageDelta,
        Field(description="The new part of the message; empty in the last chunk of the choice."),
    ]
    logprobs: Annotated[
        ChatLogprobs | None,
        LOGPROBS,
    ]
    finish_reason: Unfinished


class ChatCompletionChunk(GeneratedChunk):
    """A chunk of a streamed chat completion."""

    object: Literal["chat.completion.chunk"]
    choices: Annotated[
        list[ChatDelta],
        Field(description="The new parts of choices; empty in the final chunk with the usage."),
    ]


class ChatDialect(OpenAIDialect[ChatChoice, ChatDelta]):
    """The wire format of ``/v1/chat/completions``."""

    def answer(self, choices: list[ChatChoice], usage: Usage) -> ChatCompletion:
        """Build a whole answer."""
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "usage": usage,
        }

    def chunk(self, choices: list[ChatDelta]) -> ChatCompletionChunk:
        """Build a chunk of a stream."""
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def choice(self, index: int, choice: Choice) -> ChatChoice:
        """Build a choice of a whole answer."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
        }

    def opening(self, index: int) -> ChatDelta:
        """Build the first delta of a choice, which holds its role."""
        delta: MessageDelta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(self, index: int, text: str, logprobs: Mapping[str, Any]) -> ChatDelta:
        """Build a delta with new text of a choice and the log probabilities of its tokens."""
        return {
            "index": index,
            "delta": {"content": text},
            "logprobs": self._logprobs(logprobs),
            "finish_reason": None,
        }

    def ending(self, index: int, reason: FinishReason) -> ChatDelta:
        """Build the last delta of a choice."""
        return {"index": index, "delta": {}, "logprobs": None, "finish_reason": reason}

    def logprobs(self, tokens: Sequence[TokenInfo]) -> dict[str, list[Any]]:
        """Return the log probabilities of ``tokens``, for :meth:`choice` and :meth:`delta`."""
        content: list[ChatToken] = [
            {**_entry(token), "top_logprobs": [_entry(other) for other in token.top]}
            for token in tokens
        ]
        return {"content": content}

    def _logprobs(self, lists: Mapping[str, Any]) -> ChatLogprobs | None:
        return {"content": lists["content"], "refusal": None} if self.with_logprobs else None


def _entry(token: NamedToken) -> Alternative:
    assert token.logprob is not None, "only the first token of a prompt has none"
    return {"token": token.name, "logprob": token.logprob, "bytes": list(token.bytes)}


def prepare_chat(registry: "Registry", context: Context, fields: dict[str, Any]) -> Answer:
    """Prepare the answer to a request to ``/v1/chat/completions``.

    Raises:
        ApiError, RequestError: the request is invalid or cannot be served by the model.
    """
    body, warnings = validate(ChatBody, fields, strict=context.strict)
    model = registry.language_model(body.model, context.caller)
    ids = tuple(body.token_ids(model.tokenizer, warnings, strict=context.strict))
    if not ids:
        raise bad_request("messages: the chat template made an empty prompt of them.", "messages")
    max_tokens = fit(len(ids), body.token_limit, model.max_len, model.max_len, "messages")
    return prepare(
        model,
        context.caller,
        body,
        ChatDialect,
        "chatcmpl",
        warnings,
        [Prompt(ids=ids, max_tokens=max_tokens)],
        num_choices=body.n,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        logprobs_field="top_logprobs" if body.top_logprobs else "logprobs",
    )


async def _serve_socket(services: Services) -> None:
    await serve_socket(services, prepare_chat, inline=False)


@Endpoint(
    method="POST",
    path="/v1/chat/completions",
    access="inference",
    tag="generation",
    summary="Continue a conversation",
    description=SOCKET,
    body=(ChatBody,),
    example={
        "model": CHAT_MODEL,
        "messages": [{"role": "user", "content": "Hello!"}],
        "max_tokens": 64,
    },
    responses=streamed(ChatCompletion, ChatCompletionChunk),
    admitted=True,
    socket=_serve_socket,
    gen_ai_operation="chat",
)
async def create_chat_completion(services: Services, context: Context) -> Response:
    """Continue a conversation; the chat template is rendered off the event loop."""
    return await generate(services, context, prepare_chat, inline=False)
