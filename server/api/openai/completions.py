"""``/v1/completions``: the request body, the wire format of answers, and the endpoint."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator
from quart import Response
from typing_extensions import TypedDict

from server.api.body import validate
from server.api.endpoint import Endpoint
from server.api.examples import CHAT_MODEL
from server.api.openai.constraints import constrains
from server.api.openai.generation import (
    LOGPROBS,
    MAX_LOGPROBS,
    MAX_SEQUENCES,
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
from server.http.schema import Count
from server.prompt.prompts import PromptInput, completion_prompt, infill_tokens
from server.run.context import Context
from server.run.dialect import Choice
from server.run.generation import Answer
from server.run.output import FinishReason, TextPart, TokenInfo
from server.services import Services

if TYPE_CHECKING:
    from server.models.registry import Registry

MAX_ITEMS = 500_000
"""Maximum length of a list of token ids: longer than any context, yet quick to check."""
MAX_TOKEN_ID = 2**31 - 1
"""Far above the size of any vocabulary; the model checks its own bound."""
TOKEN_ID = {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID}


def prompts_of(value: Any, name: str) -> list[PromptInput]:
    """Return the strings or lists of token ids in a ``prompt`` or ``input``.

    Raises:
        FieldError: it is neither, or holds nothing.
    """
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and len(value) > MAX_ITEMS:
        raise FieldError(name, f"holds {len(value)} items; it may hold at most {MAX_ITEMS}.")
    if _is_ids(value):
        return [checked_ids(value, name)]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return list(value)
        if all(map(_is_ids, value)):
            return [checked_ids(ids, name) for ids in value]
        if [] in value:
            raise FieldError(name, "holds an empty list; each needs at least one token id.")
    what = "an empty list" if value == [] else json_kind(value)
    what = "a list of mixed or wrong values" if what == "a list" else what
    raise FieldError(
        name,
        f"is {what}; it must be a string, a list of strings, a list of token ids "
        "or a list of such lists.",
    )


def prompts_schema(most: int, *, shortest: int = 0) -> dict[str, Any]:
    """Return the JSON schema of :func:`prompts_of`.

    It allows up to ``most`` prompts, of at least ``shortest`` characters if they are strings.
    """
    text = {"type": "string", "minLength": shortest}
    ids = {"type": "array", "items": TOKEN_ID, "minItems": 1}
    several = {"type": "array", "minItems": 1, "maxItems": most}
    return {"anyOf": [text, several | {"items": text}, ids, several | {"items": ids}]}


def checked_ids(ids: list[int], name: str) -> list[int]:
    """Return ``ids`` unchanged.

    Raises:
        FieldError: a value is out of the range of token ids.
    """
    for worst in (min(ids, default=0), max(ids, default=0)):
        if not 0 <= worst <= MAX_TOKEN_ID:
            raise FieldError(name, f"holds {worst}; token ids go from 0 to the vocabulary's size.")
    return ids


def _is_ids(value: Any) -> bool:
    # A set of types sees every element without a Python step for each.
    return isinstance(value, list) and set(map(type, value)) == {int}


class CompletionBody(GenerationBody):
    """A request to complete one or more prompts."""

    prompt: Annotated[
        list[PromptInput],
        PlainValidator(lambda value: prompts_of(value, "prompt")),
        WithJsonSchema(prompts_schema(MAX_SEQUENCES)),
    ] = Field(
        description="A string, a list of strings, a list of token ids, or a list of such "
        "lists; choices are in the order of the prompts. The number of prompts times "
        f"the choices of each is at most {MAX_SEQUENCES}."
    )
    suffix: str = Field(
        "",
        description="The text that follows the completion. Models that support infilling "
        "complete the gap before it; for other models it is appended to the answer, "
        "with a warning.",
    )
    echo: bool = Field(
        False,
        description="Begin each choice with its prompt, and include the prompt's log "
        "probabilities if logprobs is given.",
    )
    best_of: int | None = Field(
        None,
        ge=1,
        le=MAX_SEQUENCES,
        description="Sample this many sequences for each prompt and return the n with the "
        "highest mean log probability. The default is n; with stream, it must not "
        "exceed n.",
    )
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Return the log probabilities of the tokens, with this many "
        "alternatives for each.",
    )

    @model_validator(mode="after")
    def _check_completion(self) -> Self:
        if self.best_of is not None and self.best_of < self.n:
            raise FieldError("best_of", f"is {self.best_of}; it must be at least n, {self.n}.")
        if self.stream and self.num_sampled > self.n:
            raise FieldError(
                "best_of",
                f"is {self.best_of}, above n, {self.n}: the best can only be chosen at the "
                "end, so stream must be false.",
            )
        if len(self.prompt) * self.num_sampled > MAX_SEQUENCES:
            raise FieldError(
                "prompt",
                f"holds {len(self.prompt)} prompts, of which {self.num_sampled} "
                f"continuations each are asked for; one request may have {MAX_SEQUENCES} in all.",
            )
        if self.token_limit == 0 and not self.echo:
            raise FieldError("max_tokens", "is 0; it must be at least 1, except with echo.")
        return self

    @property
    def num_sampled(self) -> int:
        """The number of sequences sampled for each prompt."""
        return self.best_of or self.n


class CompletionLogprobs(TypedDict):
    """The log probabilities of a choice's tokens; those of a prompt's first token are null."""

    tokens: Annotated[
        list[str],
        Field(description="The tokens as text; a part of a character is written as `bytes:\\x..`."),
    ]
    token_logprobs: Annotated[
        list[float | None], Field(description="The log probability of each token.")
    ]
    top_logprobs: Annotated[
        list[dict[str, float | None] | None],
        Field(
            description="For each token, the log probabilities of the likeliest tokens at its "
            "position and of the token itself."
        ),
    ]
    text_offset: Annotated[
        list[Count],
        Field(description="The position at which each token begins in the text, in characters."),
    ]


class _CompletionText(TypedDict):
    index: Index
    text: Annotated[str, Field(description="The generated text; with echo, it follows the prompt.")]
    logprobs: Annotated[
        CompletionLogprobs | None,
        LOGPROBS,
    ]


class CompletionChoice(_CompletionText):
    """A completion of a prompt."""

    finish_reason: Finish


class Completion(Generated):
    """The completions of all prompts."""

    object: Literal["text_completion"]
    choices: Annotated[
        list[CompletionChoice], Field(description="The choices, in the order of their prompts.")
    ]
    usage: Annotated[Usage, Field(description="The number of tokens that the request used.")]


class CompletionDelta(_CompletionText):
    """The new part of a choice."""

    finish_reason: Unfinished


class CompletionChunk(GeneratedChunk):
    """A chunk of a streamed completion."""

    object: Literal["text_completion"]
    choices: Annotated[
        list[CompletionDelta],
        Field(description="The new parts of choices; empty in the final chunk with the usage."),
    ]


class CompletionDialect(OpenAIDialect[CompletionChoice, CompletionDelta]):
    """The wire format of ``/v1/completions``."""

    def answer(self, choices: list[CompletionChoice], usage: Usage) -> Completion:
        """Build a whole answer."""
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "usage": usage,
        }

    def chunk(self, choices: list[CompletionDelta]) -> CompletionChunk:
        """Build a chunk of a stream."""
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def choice(self, index: int, choice: Choice) -> CompletionChoice:
        """Build a choice of a whole answer."""
        return {
            "index": index,
            "text": choice.text,
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
        }

    def deltas(self, new: TextPart) -> list[CompletionDelta]:
        """Build the delta with new text of a choice and the log probabilities of its tokens."""
        if not (new.text or new.tokens):
            return []
        logprobs = self._logprobs(self.logprobs(new.tokens))
        return [{"index": new.index, "text": new.text, "logprobs": logprobs, "finish_reason": None}]

    def ending(self, index: int, reason: FinishReason) -> CompletionDelta:
        """Build the last delta of a choice."""
        return {"index": index, "text": "", "logprobs": None, "finish_reason": reason}

    def logprobs(self, tokens: Sequence[TokenInfo]) -> dict[str, list[Any]]:
        """Return the log probabilities of ``tokens``, for :meth:`choice` and :meth:`delta`."""
        return {
            "tokens": [token.name for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [_top(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def _logprobs(self, lists: Mapping[str, Any]) -> CompletionLogprobs | None:
        if not self.with_logprobs:
            return None
        return {
            "tokens": lists["tokens"],
            "token_logprobs": lists["token_logprobs"],
            "top_logprobs": lists["top_logprobs"],
            "text_offset": lists["text_offset"],
        }


def _top(token: TokenInfo) -> dict[str, float | None] | None:
    """Return the alternatives by name; the token itself is always among them."""
    if token.logprob is None:
        return None
    top: dict[str, float | None] = {}
    for other in (*token.top, token):
        top.setdefault(other.name, other.logprob)  # names may collide; the likeliest keeps it
    return top


def prepare_completion(registry: "Registry", context: Context, fields: dict[str, Any]) -> Answer:
    """Prepare the answer to a request to ``/v1/completions``.

    Raises:
        ApiError, RequestError: the request is invalid or cannot be served by the model.
    """
    body, warnings = validate(CompletionBody, fields, strict=context.strict)
    model = registry.language_model(body.model, context.caller)
    infill = infill_tokens(model.tokenizer) if body.suffix else None
    suffix = "" if infill else body.suffix
    if infill and body.echo and body.logprobs is not None:
        raise bad_request(
            "suffix cannot be filled in with both echo and logprobs: what the model reads is not "
            "the text that is echoed. Leave out one of the three.",
            "suffix",
        )
    if suffix:
        warnings.append("suffix was appended to the text: this model cannot fill in a middle.")

    return prepare(
        model,
        context.caller,
        body,
        CompletionDialect,
        "cmpl",
        warnings,
        [
            completion_prompt(
                model,
                prompt,
                f"prompt[{i}]" if len(body.prompt) > 1 else "prompt",
                suffix=body.suffix,
                infill=infill,
                echo=body.echo,
                max_tokens=body.token_limit,
            )
            for i, prompt in enumerate(body.prompt)
        ],
        num_choices=body.num_sampled,
        logprobs=body.logprobs,
        echo=body.echo,
        suffix=suffix,
        strict=context.strict,
    )


async def _serve_socket(services: Services) -> None:
    await serve_socket(services, prepare_completion, inline=True, blocks=constrains)


@Endpoint(
    method="POST",
    path="/v1/completions",
    access="inference",
    tag="generation",
    summary="Continue a text",
    description=SOCKET,
    body=(CompletionBody,),
    example={"model": CHAT_MODEL, "prompt": "Once upon a time", "max_tokens": 32},
    responses=streamed(Completion, CompletionChunk),
    admitted=True,
    socket=_serve_socket,
    gen_ai_operation="text_completion",
)
async def create_completion(services: Services, context: Context) -> Response:
    """Continue a text."""
    return await generate(services, context, prepare_completion, inline=True)
