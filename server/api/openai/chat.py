"""``/v1/chat/completions``: the request body, the wire format of answers, and the endpoint."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired, Self

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator
from quart import Response
from typing_extensions import TypedDict

from server.api.body import Body, validate
from server.api.endpoint import Endpoint
from server.api.examples import CHAT_MODEL
from server.api.openai.constraints import constrains
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
from server.api.openai.tools import (
    MAX_CALLS,
    MAX_TOOL_BYTES,
    MAX_TOOLS,
    TOOL_NAME,
    Tool,
    calls_of,
    shown,
    tool_choice_of,
    tools_of,
)
from server.api.websocket import serve_socket
from server.config.schema import ParserName
from server.config.validation import FieldError, json_kind
from server.http.errors import bad_request
from server.http.schema import Null
from server.parsers.families import (
    begins_thinking,
    continues_thinking,
    form_of,
    format_of,
    thinks,
)
from server.parsers.grammar import Frame
from server.prompt.prompts import Prompt, conversation_text, fit
from server.run.context import Context
from server.run.dialect import Choice
from server.run.generation import Answer
from server.run.output import (
    FinishReason,
    NamedToken,
    Parsing,
    TextPart,
    TokenInfo,
    ToolCall,
)
from server.services import Services

if TYPE_CHECKING:
    from inferneo_jax import Tokenizer
    from server.models.registry import Registry

MAX_MESSAGES = 10_000
ARGUMENTS_PIECE = 1024
"""Maximum number of characters of a call's arguments in one chunk of a stream."""
_SWITCHES = ("enable_thinking", "thinking")
"""The variables by which chat templates turn reasoning on and off."""
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
    if calls is not None:
        calls = calls_of(calls, f"{name}.tool_calls")
        message = message | {"tool_calls": calls}
    for key in ("reasoning_content", "reasoning", "tool_call_id"):
        if not isinstance(given := value.get(key), str | None):
            raise FieldError(f"{name}.{key}", f"is {json_kind(given)}; it must be a string.")
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
_FUNCTION = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "arguments": {"anyOf": [{"type": "string"}, {"type": "object"}, {"type": "null"}]},
    },
    "required": ["name"],
}
_TOOL_CALL = {
    "type": "object",
    "properties": {
        "id": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "function": _FUNCTION,
    },
    "required": ["function"],
}
_TOOL_CALLS = {"type": "array", "items": _TOOL_CALL, "maxItems": MAX_CALLS}
_TEXT_OR_NULL = {"anyOf": [{"type": "string"}, {"type": "null"}]}
_OTHERS = dict.fromkeys(("reasoning_content", "reasoning", "tool_call_id"), _TEXT_OR_NULL)
_MESSAGE = {
    "anyOf": [
        {
            "type": "object",
            "properties": {
                "role": {"enum": [*ROLES]},
                "content": _CONTENT,
                "tool_calls": {"anyOf": [_TOOL_CALLS, {"type": "null"}]},
                **_OTHERS,
            },
            "required": ["role", "content"],
        },
        {
            "type": "object",
            "properties": {
                "role": {"const": "assistant"},
                "content": {"anyOf": [*_CONTENT["anyOf"], {"type": "null"}]},
                "tool_calls": _TOOL_CALLS | {"minItems": 1},
                **_OTHERS,
            },
            "required": ["role", "tool_calls"],
        },
    ]
}
_MESSAGES = {"type": "array", "items": _MESSAGE, "minItems": 1, "maxItems": MAX_MESSAGES}
_TAKEN = ("add_generation_prompt", "continue_final_message", "messages", "tools")
_TOOL = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "pattern": TOOL_NAME},
                "description": _TEXT_OR_NULL,
                "parameters": {"anyOf": [{"type": "object"}, {"type": "null"}]},
                "strict": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
            },
            "required": ["name"],
        },
    },
    "required": ["type", "function"],
}
_TOOLS = {"type": "array", "items": _TOOL, "maxItems": MAX_TOOLS}
_NAMED_CHOICE = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {"name": {"type": "string", "pattern": TOOL_NAME}},
            "required": ["name"],
        },
    },
    "required": ["type", "function"],
}
_CHOICE = {"anyOf": [{"enum": ["none", "auto", "required"]}, _NAMED_CHOICE]}
_VARIABLES = {"type": "object", "propertyNames": {"not": {"enum": [*_TAKEN]}}}


class Conversation(Body):
    """The messages of a conversation, and options for rendering them as a prompt."""

    messages: Annotated[
        list[dict[str, Any]], PlainValidator(_messages), WithJsonSchema(_MESSAGES)
    ] = Field(
        description="The conversation so far. Each message has a role (system, developer, "
        "user, assistant, tool or function; developer is treated as system) and "
        "content: a string, or a list of text parts, which are joined by newlines. A message "
        "of the assistant may have tool_calls, and reasoning_content (or reasoning)."
    )
    tools: Annotated[list[Tool], PlainValidator(tools_of), WithJsonSchema(_TOOLS)] = Field(
        default_factory=list,
        description=f"The tools that the model may call, at most {MAX_TOOLS}. Each has a name, "
        "and perhaps a description and a JSON schema of its arguments (parameters), of at most "
        f"{MAX_TOOL_BYTES} bytes together.",
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
    enable_thinking: bool | None = Field(
        None,
        description="Whether the model reasons before it answers, for chat templates that read "
        "enable_thinking or thinking.",
    )
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = Field(
        None,
        description="How much the model reasons, for chat templates that read it; for those that "
        "read enable_thinking only, none turns reasoning off and all others turn it on.",
    )

    @property
    def offered(self) -> list[Tool]:
        """The tools that the model is told of."""
        return self.tools

    def text(self, tokenizer: "Tokenizer", warnings: list[str], *, strict: bool) -> str:
        """Return the text of the conversation; see :func:`conversation_text`."""
        return conversation_text(
            tokenizer,
            self.messages,
            self._variables(tokenizer, warnings, strict=strict),
            warnings,
            tools=[shown(tool) for tool in self.offered],
            add_generation_prompt=self.add_generation_prompt is not False,
            continue_final_message=self.continue_final_message,
            strict=strict,
        )

    def _variables(
        self, tokenizer: "Tokenizer", warnings: list[str], *, strict: bool
    ) -> dict[str, Any]:
        """Return the variables for the template; those in chat_template_kwargs take precedence."""
        known, wanted = tokenizer.template_variables, dict[str, Any]()
        switch = next((name for name in _SWITCHES if name in known), None)
        effort = self.reasoning_effort
        for field, value, name in (
            ("enable_thinking", self.enable_thinking, switch),
            ("reasoning_effort", effort, "reasoning_effort" if "reasoning_effort" in known else ""),
        ):
            if value is None:
                continue
            if name:
                wanted[name] = value
            elif field == "reasoning_effort" and switch:
                wanted.setdefault(switch, effort != "none")
            elif strict:
                raise bad_request(
                    f"{field} is not read by the model's chat template. Leave it out.", field
                )
            else:
                warnings.append(f"{field} is not read by the model's chat template; ignored.")
        return wanted | self.chat_template_kwargs

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
    tool_choice: Annotated[
        str | dict[str, Any], PlainValidator(tool_choice_of), WithJsonSchema(_CHOICE)
    ] = Field(
        "auto",
        description="Whether the model calls tools: auto lets it choose, none offers it none, "
        "required makes it call at least one, and an object that names one makes it call that.",
    )
    parallel_tool_calls: bool = Field(
        True, description="Whether a message may hold several calls; false ends it with the first."
    )

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise FieldError("top_logprobs", "needs logprobs to be true.")
        if self.token_limit == 0:
            raise FieldError("max_tokens", "is 0; it must be at least 1.")
        choice = self.tool_choice
        if self.must_call and not self.tools:
            raise FieldError("tool_choice", "asks for a call, which needs tools.")
        if self.must_call and self.wish is not None:
            raise FieldError(
                self.wish.field, "excludes a tool_choice that asks for a call; send one of them."
            )
        if isinstance(choice, dict):
            name, known = choice["function"]["name"], [t["function"]["name"] for t in self.tools]
            if name not in known:
                raise FieldError(
                    "tool_choice.function.name",
                    f"is {name!r}, which is not among tools: {', '.join(known)[:200]}.",
                )
        return self

    @property
    def must_call(self) -> bool:
        """Whether the answer must call a tool."""
        return self.tool_choice not in ("none", "auto")

    @property
    def offered(self) -> list[Tool]:
        """The tools that the model is told of."""
        return [] if self.tool_choice == "none" else self.tools


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


class CalledFunction(TypedDict):
    """The tool that is called."""

    name: Annotated[str, Field(description="The name of the tool.")]
    arguments: Annotated[str, Field(description="The arguments, a JSON object as text.")]


class MessageToolCall(TypedDict):
    """A call of a tool; its result is sent as a message of the role `tool` with its id."""

    id: Annotated[str, Field(description="The id of the call.")]
    type: Literal["function"]
    function: Annotated[CalledFunction, Field(description="The tool and its arguments.")]


_REASONING = Field(description="The reasoning before the answer; absent if there is none.")


class AnswerMessage(TypedDict):
    """The message that the assistant generated."""

    role: Literal["assistant"]
    content: Annotated[
        str | None,
        Field(description="The text of the message; null if it only calls tools."),
    ]
    refusal: Null
    reasoning_content: NotRequired[Annotated[str, _REASONING]]
    reasoning: NotRequired[
        Annotated[str, Field(description="The same, by the name that newer clients read.")]
    ]
    tool_calls: NotRequired[
        Annotated[
            list[MessageToolCall],
            Field(min_length=1, description="The calls of tools; absent if there are none."),
        ]
    ]


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


class FunctionDelta(TypedDict):
    """The new part of a called tool; the name is sent once, in the first chunk of the call."""

    name: NotRequired[Annotated[str, Field(description="The name of the tool.")]]
    arguments: Annotated[str, Field(description="The text to append to the arguments.")]


class ToolCallDelta(TypedDict):
    """The new part of a call; id and type are sent once, in its first chunk."""

    index: Annotated[int, Field(ge=0, description="The index of the call in its message.")]
    id: NotRequired[Annotated[str, Field(description="The id of the call.")]]
    type: NotRequired[Literal["function"]]
    function: Annotated[FunctionDelta, Field(description="The new part of the called tool.")]


class MessageDelta(TypedDict):
    """The new part of a message; the role is sent once, in the first chunk."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[Annotated[str, Field(description="The text to append to the message.")]]
    reasoning_content: NotRequired[
        Annotated[str, Field(description="The text to append to the reasoning.")]
    ]
    reasoning: NotRequired[
        Annotated[str, Field(description="The same, by the name that newer clients read.")]
    ]
    tool_calls: NotRequired[
        Annotated[
            list[ToolCallDelta], Field(description="The new part of a call, when it is complete.")
        ]
    ]


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
        message: AnswerMessage = {
            "role": "assistant",
            "content": choice.text or (None if choice.calls else ""),
            "refusal": None,
        }
        if choice.reasoning:
            message["reasoning_content"] = message["reasoning"] = choice.reasoning
        if choice.calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in choice.calls
            ]
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
        }

    def opening(self, index: int) -> ChatDelta:
        """Build the first delta of a choice, which holds its role."""
        delta: MessageDelta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def deltas(self, new: TextPart) -> list[ChatDelta]:
        """Build the deltas of what is new of a choice; the first has the log probabilities."""
        deltas: list[MessageDelta] = []
        if new.reasoning:
            deltas.append({"reasoning_content": new.reasoning, "reasoning": new.reasoning})
        if new.text or (new.tokens and not deltas and not new.calls):
            deltas.append({"content": new.text})
        for call in new.calls:
            deltas += _call_deltas(call)
        logprobs = self._logprobs(self.logprobs(new.tokens))
        return [
            {
                "index": new.index,
                "delta": delta,
                "logprobs": None if i else logprobs,
                "finish_reason": None,
            }
            for i, delta in enumerate(deltas)
        ]

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


def _call_deltas(call: ToolCall) -> Iterator[MessageDelta]:
    """Yield the deltas of a call: its name and id, then its arguments in pieces."""
    yield {
        "tool_calls": [
            {
                "index": call.index,
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": ""},
            }
        ]
    }
    for start in range(0, len(call.arguments), ARGUMENTS_PIECE):
        piece = call.arguments[start : start + ARGUMENTS_PIECE]
        yield {"tool_calls": [{"index": call.index, "function": {"arguments": piece}}]}


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
    text = body.text(model.tokenizer, warnings, strict=context.strict)
    ids = tuple(model.tokenizer.encode(text, add_special_tokens=False))
    if not ids:
        raise bad_request("messages: the chat template made an empty prompt of them.", "messages")
    max_tokens = fit(len(ids), body.token_limit, model.max_len, model.max_len, "messages")
    parsing = _parsing(registry.output_parser, model.tokenizer, body, text, warnings)
    strict_tools = any(tool["function"].get("strict") for tool in body.tools)
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
        parsing=parsing,
        frame=_frame(model.tokenizer, body, parsing),
        forced=body.must_call,
        strict=context.strict or (body.must_call and strict_tools),
    )


def _frame(tokenizer: "Tokenizer", body: ChatBody, parsing: Parsing | None) -> Frame | None:
    """Return what the answer may hold beside the form that is asked for; None if nothing.

    Raises:
        ApiError: a call is asked for, and cannot be forced.
    """
    if parsing is None:
        if body.must_call:
            raise bad_request(
                "tool_choice asks for a call, but it is not known how this model writes them. Send "
                "auto, or name its format where the server is started: --output-parser.",
                "tool_choice",
            )
        return None
    template, tools = tokenizer.chat_template, parsing.tools or {}
    may_think = thinks(parsing.format, template)
    if not (tools or parsing.thinking or may_think):
        return None
    form = form_of(parsing.format, template)
    if form is None and body.must_call:
        raise bad_request(
            "tool_choice asks for a call, which cannot be forced in the format of this model. Send "
            "auto, and say in a message that a tool is to be called.",
            "tool_choice",
        )
    named = body.tool_choice if isinstance(body.tool_choice, dict) else None
    if named is not None:
        name = named["function"]["name"]
        tools = {name: tools[name]}
    return Frame(
        tokenizer=tokenizer,
        format=parsing.format,
        thinking=parsing.thinking,
        thinks=may_think,
        tools=tools,
        form=form,
        repeats=body.parallel_tool_calls and named is None,
    )


def _parsing(
    name: ParserName, tokenizer: "Tokenizer", body: ChatBody, prompt: str, warnings: list[str]
) -> Parsing | None:
    """Return how the answer is parsed; None if it holds nothing but text.

    Args:
        name: the family's name in the settings.
        tokenizer: the model's.
        body: the request.
        prompt: the text that the model continues.
        warnings: receives a warning if calls cannot be found.
    """
    template, tools = tokenizer.chat_template, body.offered
    format = format_of(name, template)
    if format is None:
        if tools:
            warnings.append(
                "tools: it is not known how this model writes calls, so they stay in the text."
            )
        return None
    if not tools and name == "auto" and not thinks(format, template):
        return None
    if body.continue_final_message:
        thinking = continues_thinking(format, body.messages[-1]["content"])
    else:
        thinking = begins_thinking(format, prompt)
    texts = {token: tokenizer.token_text(token) for token in tokenizer.special_ids}
    return Parsing(
        format=format,
        tools={tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
        if tools
        else None,
        thinking=thinking,
        single=not body.parallel_tool_calls,
        first_call=sum(len(message.get("tool_calls") or ()) for message in body.messages),
        keep=frozenset(
            token
            for token, text in texts.items()
            if text and any(text in literal for literal in format.literals)
        ),
    )


async def _serve_socket(services: Services) -> None:
    await serve_socket(services, prepare_chat, inline=False, blocks=constrains)


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
