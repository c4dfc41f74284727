"""What the endpoints that generate text share: parameters, parts of answers, and the operation."""

import secrets
import time
from abc import abstractmethod
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Generic, NotRequired, Self, TypeVar

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator
from quart import Response
from typing_extensions import TypedDict

from inferneo_jax import SamplingParams
from server.api.body import MAX_NAME, Body, read_body
from server.api.endpoint import ResponseSpec
from server.api.openai import constraints
from server.config.validation import FieldError, json_kind
from server.http import sse
from server.http.codec import long_response
from server.http.errors import ApiError
from server.http.pieces import Json
from server.http.schema import Count, Warned
from server.http.sse import Event
from server.keys.caller import Caller
from server.keys.store.store import Usage as TokenUsage
from server.parsers.grammar import Frame
from server.prompt.prompts import Prompt, check_scores
from server.run.context import Context
from server.run.dialect import Choice, Dialect, End, Part, Result, Start, Text
from server.run.generation import Answer, Generation, Plan, Prepare
from server.run.output import FinishReason, Parsing, TextOptions, TextPart
from server.services import Services

if TYPE_CHECKING:
    from inferneo_jax import LanguageModel

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
"""Bounded because every token is compared with the beginnings of all stop strings."""
MAX_SEQUENCES = 256
"""Maximum number of sequences of one request: prompts times ``n`` or ``best_of``."""
MAX_STOP_TOKENS = 1024
"""Far above any engine's own limit, which the engine checks itself."""
MAX_BIASES = 10_000
MAX_LOGPROBS = 20


class StreamOptions(Body):
    """Options for a streamed answer."""

    include_usage: bool = Field(
        False, description="End the stream with a chunk that holds the usage and no choices."
    )
    continuous_usage_stats: bool = Field(
        False, description="Include the usage so far in every chunk; requires include_usage."
    )

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        if self.continuous_usage_stats and not self.include_usage:
            raise FieldError("stream_options.continuous_usage_stats", "needs include_usage too.")
        return self


def _stops(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise FieldError(
            "stop", f"is {json_kind(value)}; it must be a string or a list of strings."
        )
    if len(stops) > MAX_STOPS:
        raise FieldError("stop", f"holds {len(stops)} strings; it may hold at most {MAX_STOPS}.")
    if "" in stops:
        raise FieldError("stop", "holds an empty string; leave it out.")
    if (longest := max(map(len, stops), default=0)) > MAX_STOP_CHARACTERS:
        raise FieldError(
            "stop",
            f"holds a string of {longest} characters; each may have at most {MAX_STOP_CHARACTERS}.",
        )
    return stops


_STOP = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS}
_STOPS = {"anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": MAX_STOPS}]}


def _logit_bias(value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        raise FieldError(
            "logit_bias", f"is {json_kind(value)}; it must be an object of token ids and numbers."
        )
    if len(value) > MAX_BIASES:
        raise FieldError(
            "logit_bias", f"holds {len(value)} entries; it may hold at most {MAX_BIASES}."
        )
    biases = {}
    for token, bias in value.items():
        if not (token.isascii() and token.isdecimal() and len(token) < 10):
            raise FieldError("logit_bias", f"has the key {token[:20]!r}; keys must be token ids.")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise FieldError(
                "logit_bias",
                f"of token {token} must be a number from -100 to 100; "
                f"it is {bias if isinstance(bias, int | float) else json_kind(bias)}.",
            )
        biases[int(token)] = float(bias)
    return biases


_LOGIT_BIAS = {
    "type": "object",
    "propertyNames": {"pattern": "^[0-9]{1,9}$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
}


class GenerationBody(Body):
    """The parameters that completions and chat completions share."""

    model: str = Field(description="The id or an alias of a model; the answer repeats it.")
    max_tokens: int | None = Field(
        None,
        ge=0,
        description="The maximum number of tokens to generate. Together with the prompt, "
        "they must fit in the model's context. The default is 16 for completions and "
        "the rest of the context for chat; 0 is allowed only for completions with echo.",
    )
    max_completion_tokens: int | None = Field(
        None, ge=0, description="The newer name of max_tokens; if both are given, this one is used."
    )
    temperature: float = Field(
        1.0,
        ge=0,
        le=2,
        description="The sampling temperature. 0 always picks the most likely token; "
        "higher values are more random.",
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Sample from the most likely tokens that together have at least this "
        "probability.",
    )
    top_k: int = Field(
        -1,
        ge=-1,
        lt=2**31,
        description="Sample from this many of the most likely tokens; -1 and 0 mean all tokens.",
    )
    min_p: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Discard tokens whose probability is below this fraction of the most "
        "likely token's probability.",
    )
    frequency_penalty: float = Field(
        0.0,
        ge=-2,
        le=2,
        description="The value subtracted from a token's logit for each time it has been "
        "generated.",
    )
    presence_penalty: float = Field(
        0.0,
        ge=-2,
        le=2,
        description="The value subtracted from a token's logit if it has been generated at all.",
    )
    repetition_penalty: float = Field(
        1.0,
        gt=0,
        le=10,
        description="Values above 1 make tokens that occur in the prompt or the answer "
        "less likely.",
    )
    stop: Annotated[list[str], PlainValidator(_stops), WithJsonSchema(_STOPS)] = Field(
        default_factory=list,
        description=f"A string, or a list of up to {MAX_STOPS} strings, of at most "
        f"{MAX_STOP_CHARACTERS} characters each. The first one to be generated ends the "
        "choice and is left out of its text.",
    )
    stop_token_ids: list[int] = Field(
        default_factory=list,
        max_length=MAX_STOP_TOKENS,
        fail_fast=True,
        description="Token ids that end a choice, in addition to the model's own end tokens.",
    )
    include_stop_str_in_output: bool = Field(
        False, description="Keep the stop string or stop token in the text of the choice."
    )
    min_tokens: int = Field(
        0,
        ge=0,
        description="The number of tokens before which nothing can stop a choice; at most "
        "max_tokens.",
    )
    ignore_eos: bool = Field(False, description="Do not stop at the model's own end tokens.")
    stream: bool = Field(False, description="Send the answer as server-sent events.")
    stream_options: StreamOptions | None = Field(
        None, description="Options for streaming; allowed only with stream."
    )
    n: int = Field(
        1, ge=1, le=MAX_SEQUENCES, description="The number of choices to return for each prompt."
    )
    logit_bias: Annotated[
        dict[int, float], PlainValidator(_logit_bias), WithJsonSchema(_LOGIT_BIAS)
    ] = Field(
        default_factory=dict,
        description="A map from token ids to the values that are added to their logits.",
    )
    seed: int | None = Field(
        None,
        ge=-(2**63),
        le=2**64 - 1,
        description="Makes sampling repeatable: the choice with index i uses seed + i. By "
        "default, the seed is random.",
    )
    user: str | None = Field(
        None,
        max_length=MAX_NAME,
        description="Your identifier for the end user; it is written to the server's log.",
    )
    skip_special_tokens: bool = Field(True, description="Leave special tokens out of the text.")
    priority: int = Field(
        0,
        ge=-(2**31),
        lt=2**31,
        description="The scheduling priority: among waiting requests, lower values run first.",
    )
    cache_salt: str = Field(
        "",
        max_length=MAX_NAME,
        description="Requests share cached prompts only if their salts are equal.",
    )
    metadata: dict[str, Any] = Field(
        default_factory=dict, description="Accepted with a warning: answers are not stored."
    )
    store: bool = Field(False, description="Accepted with a warning: answers are not stored.")
    service_tier: str = Field(
        "auto",
        max_length=64,
        description="There is one tier; values other than auto and default cause a warning.",
    )

    response_format: Annotated[
        Any,  # a Wish, whose own fields are not the API's
        PlainValidator(constraints.response_format),
        WithJsonSchema(constraints.RESPONSE_FORMAT),
    ] = Field(
        None,
        description="The form of the answer: text, any JSON object, or JSON that a schema "
        "describes. What of the schema cannot be enforced is warned of; with strict, it is an "
        "error.",
    )
    structured_outputs: Annotated[
        Any,
        PlainValidator(constraints.structured_outputs),
        WithJsonSchema(constraints.STRUCTURED_OUTPUTS),
    ] = Field(
        None,
        description="The form of the answer, as vLLM has it: a JSON schema, a regular expression, "
        "a list of texts, a grammar in GBNF or Lark, or any JSON object.",
    )
    grammar: str | None = Field(
        None, description="The form of the answer, as llama.cpp has it: a grammar in GBNF or Lark."
    )
    json_schema: dict[str, Any] | None = Field(
        None, description="The form of the answer, as llama.cpp has it: a JSON schema."
    )

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        _ = self.wish
        if self.stream_options is not None and not self.stream:
            raise FieldError("stream_options", "needs stream to be true.")
        if self.token_limit is not None and self.min_tokens > self.token_limit:
            raise FieldError(
                "min_tokens",
                f"is {self.min_tokens}; it must be at most max_tokens, {self.token_limit}.",
            )
        return self

    @property
    def token_limit(self) -> int | None:
        """The maximum number of tokens to generate; the newer name takes precedence."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wish(self) -> constraints.Wish | None:
        """The form of the answer that is asked for.

        Raises:
            FieldError: several are.
        """
        grammar, schema = self.grammar, self.json_schema
        return constraints.only(
            {
                "response_format": self.response_format,
                "structured_outputs": self.structured_outputs,
                "grammar": None
                if grammar is None
                else constraints.Wish("grammar", "grammar", grammar),
                "json_schema": None
                if schema is None
                else constraints.Wish("json_schema", "schema", schema),
            }
        )

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk of a stream holds the usage so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    def unknown(self) -> list[str]:
        """Return the names of unknown fields, including nested ones with their path."""
        options = self.stream_options.unknown() if self.stream_options else []
        nested = self.wish.unknown if self.wish else ()
        return super().unknown() + [f"stream_options.{name}" for name in options] + [*nested]

    def notes(self) -> list[str]:
        """Return warnings about parameters that have no effect on this server."""
        notes = []
        if self.token_limit is not None and self.max_tokens not in (None, self.token_limit):
            notes.append(
                f"max_tokens, {self.max_tokens}, has no effect: max_completion_tokens, "
                f"{self.token_limit}, goes before it."
            )
        if self.metadata:
            notes.append("metadata has no effect: this server stores no answers.")
        if self.store:
            notes.append("store has no effect: this server stores no answers.")
        if self.service_tier not in ("auto", "default"):
            notes.append(
                f"service_tier {self.service_tier!r} has no effect: "
                "this server has one tier, default."
            )
        return notes


class CachedTokens(TypedDict):
    """Details about the prompt tokens."""

    cached_tokens: Annotated[
        Count, Field(description="The number of prompt tokens found in the prefix cache.")
    ]


class ReasoningTokens(TypedDict):
    """Details about the sampled tokens."""

    reasoning_tokens: Annotated[
        Count, Field(description="The number of sampled tokens that are reasoning; chat only.")
    ]


class Usage(TypedDict):
    """The number of tokens that a request used, including choices that ``best_of`` discarded."""

    prompt_tokens: Annotated[
        Count, Field(description="The number of prompt tokens, cached or not.")
    ]
    completion_tokens: Annotated[Count, Field(description="The number of tokens sampled.")]
    total_tokens: Annotated[Count, Field(description="The sum of prompt and completion tokens.")]
    prompt_tokens_details: Annotated[
        CachedTokens, Field(description="A breakdown of the prompt tokens.")
    ]
    completion_tokens_details: Annotated[
        ReasoningTokens, Field(description="A breakdown of the sampled tokens.")
    ]


class Generated(Warned):
    """The fields that all generated answers share; they are equal in all chunks of a stream."""

    id: Annotated[str, Field(description="The id of the answer.")]
    created: Annotated[
        int, Field(description="When the answer was created, in seconds since 1970.")
    ]
    model: Annotated[str, Field(description="The model name as given in the request.")]


class GeneratedChunk(Generated):
    """The fields that all chunks of streams share."""

    usage: NotRequired[
        Annotated[
            Usage | None,
            Field(
                description="The usage, with stream_options.include_usage; null in all chunks but "
                "the last, unless continuous_usage_stats is set."
            ),
        ]
    ]


Index = Annotated[
    int, Field(ge=0, description="The index of the choice, counted prompt by prompt from 0.")
]
Finish = Annotated[
    FinishReason,
    Field(
        description="Why the choice ended: `stop` for an end token or a stop, `length` for "
        "max_tokens, `tool_calls` for the end of a chat message that calls tools, `abort` if it "
        "was cancelled over its WebSocket."
    ),
]
LOGPROBS = Field(
    description="The log probabilities of the tokens; null unless the request asks for them."
)
Unfinished = Annotated[
    FinishReason | None, Field(description="Why the choice ended; null until then.")
]
SOCKET = (
    "The path also accepts WebSocket connections: send this body as a text "
    "frame, and the answer is sent in frames. See the description at the top."
)
"""The WebSocket paragraph in the description of an endpoint."""


def streamed(whole: type, chunk: type) -> dict[int, ResponseSpec]:
    """Describe a response that is a whole answer or a stream of its chunks."""
    return {
        200: ResponseSpec(
            description="The whole answer or, with `stream`, its chunks as events: "
            f"`data: {{...}}`, each a {chunk.__name__}, and at the end `data: [DONE]`. An error "
            'after the first event is sent as an event `{"error": {...}}`.',
            content={"application/json": whole},
            events=chunk,
        )
    }


AnyChoice = TypeVar("AnyChoice")
"""A choice of a whole answer."""
AnyDelta = TypeVar("AnyDelta")
"""The new part of a choice."""


@dataclass(frozen=True, kw_only=True)
class OpenAIDialect(Dialect, Generic[AnyChoice, AnyDelta]):
    """The wire format that OpenAI's two generating endpoints share.

    Attributes:
        id: the id of the answer; all chunks have the same ``id``, ``created`` and ``model``.
        created: when the answer was created, in seconds since 1970.
        model: the model name as given in the request.
        with_logprobs: whether the request asks for log probabilities.
        include_usage: whether a stream ends with a chunk that holds the usage.
        continuous_usage: whether the chunks before that one hold the usage so far.
        warnings: warnings for the client; in a stream, the first chunk holds them.
    """

    done = "[DONE]"

    id: str
    created: int
    model: str
    with_logprobs: bool
    include_usage: bool
    continuous_usage: bool
    warnings: tuple[str, ...]

    @abstractmethod
    def answer(self, choices: list[AnyChoice], usage: Usage) -> Generated:
        """Build a whole answer, without warnings."""

    @abstractmethod
    def chunk(self, choices: list[AnyDelta]) -> GeneratedChunk:
        """Build a chunk of a stream, without warnings and usage."""

    @abstractmethod
    def choice(self, index: int, choice: Choice) -> AnyChoice:
        """A choice of a whole answer."""

    @abstractmethod
    def deltas(self, new: TextPart) -> list[AnyDelta]:
        """Build the deltas of what is new of a choice."""

    @abstractmethod
    def ending(self, index: int, reason: FinishReason) -> AnyDelta:
        """Build the last delta of a choice, after its text."""

    def opening(self, index: int) -> AnyDelta | None:
        """Build the first delta of a choice, before its text; None if the format has none."""
        return None

    def whole(self, result: Result) -> Generated:
        """Build the answer to a request that does not stream."""
        choices = [self.choice(index, choice) for index, choice in enumerate(result.choices)]
        answer = self.answer(choices, _usage(result.usage))
        if self.warnings:
            answer["warnings"] = list(self.warnings)
        return answer

    async def events(self, parts: AsyncGenerator[Part, None]) -> AsyncGenerator[Event | None, None]:
        """Yield the chunks of a stream, and None after a long silence."""
        warnings, usage = self.warnings, TokenUsage()

        def event(delta: AnyDelta) -> Event:
            nonlocal warnings
            chunk = self.chunk([delta])
            if warnings:
                chunk["warnings"] = list(warnings)
                warnings = ()
            if self.include_usage:
                chunk["usage"] = _usage(usage) if self.continuous_usage else None
            return None, chunk

        async with aclosing(parts):
            async for part in parts:
                match part:
                    case None:
                        yield None
                    case Start(num_choices, usage):
                        for index in range(num_choices):
                            if (opening := self.opening(index)) is not None:
                                yield event(opening)
                    case Text(new, usage):
                        for delta in self.deltas(new):
                            yield event(delta)
                        if new.finish_reason is not None:
                            yield event(self.ending(new.index, new.finish_reason))
                    case End(usage, cancelled):
                        if self.include_usage or cancelled:
                            chunk = self.chunk([])
                            chunk["usage"] = _usage(usage)
                            yield None, chunk

    def error(self, error: ApiError) -> Event:
        """Build the event that reports an error in the middle of a stream."""
        return None, error.envelope()


def _usage(usage: TokenUsage) -> Usage:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
    }


def prepare(
    model: "LanguageModel",
    caller: Caller,
    body: GenerationBody,
    dialect: type[OpenAIDialect[Any, Any]],
    prefix: str,
    warnings: list[str],
    prompts: Sequence[Prompt],
    *,
    num_choices: int,
    logprobs: int | None,
    logprobs_field: str = "logprobs",
    echo: bool = False,
    suffix: str = "",
    parsing: Parsing | None = None,
    frame: Frame | None = None,
    forced: bool = False,
    strict: bool,
) -> Answer:
    """Prepare the answer to a request to either endpoint; it only remains to be run.

    Args:
        model: the model to generate with.
        caller: the sender of the request.
        body: the request body.
        dialect: the wire format of the answer.
        prefix: the prefix of the answer's id.
        warnings: warnings about the request, for the client.
        prompts: the prompts of the request.
        num_choices: the number of sequences to sample for each prompt.
        logprobs: the number of alternatives to return with each token's log probability; None
            returns no log probabilities.
        logprobs_field: the field of the request that sets ``logprobs``, for errors.
        echo: whether the answer repeats the prompts.
        suffix: text to append to the answer.
        parsing: how reasoning and calls are found in the text.
        frame: what the text may hold beside the form that is asked for.
        forced: whether the answer must be calls.
        strict: whether all that the request asks for must have its effect.

    Raises:
        ApiError: the log probabilities would take too much memory, or the form of the answer that
            is asked for cannot be enforced.
    """
    constraint = None
    if forced and frame is not None:
        constraint = constraints.calls_constraint(frame, model, warnings, strict=strict)
    elif wish := body.wish:
        constraint = constraints.constraint_of(wish, model, warnings, strict=strict, frame=frame)
    if logprobs is not None:
        check_scores(
            prompts, num_choices, logprobs, name=logprobs_field, echo=echo, stream=body.stream
        )
    answer_id = f"{prefix}-{secrets.token_hex(12)}"
    stop_token_ids = frozenset(body.stop_token_ids)
    if not body.ignore_eos:
        stop_token_ids |= model.tokenizer.eos_token_ids
    plan = Plan(
        id=answer_id,
        prompts=tuple(prompts),
        num_choices=num_choices,
        sampling=_sampling(body),
        stop_token_ids=stop_token_ids,
        text=TextOptions(
            stops=tuple(body.stop),
            include_stop=body.include_stop_str_in_output,
            min_tokens=body.min_tokens,
            stop_token_ids=stop_token_ids,
            skip_special_tokens=body.skip_special_tokens,
            logprobs=logprobs is not None,
            echo=echo,
            suffix=suffix,
            parsing=parsing,
        ),
        logprobs=logprobs,
        ranked=num_choices > body.n,
        priority=body.priority,
        cache_salt=caller.cache_salt(body.cache_salt),
        owner=caller.id or "",
        constraint=constraint,
    )
    return Answer(
        generation=Generation(model, plan),
        dialect=dialect(
            id=answer_id,
            created=int(time.time()),
            model=body.model,
            with_logprobs=logprobs is not None,
            include_usage=body.include_usage,
            continuous_usage=body.continuous_usage,
            warnings=(*warnings, *body.notes()),
        ),
        model=body.model,
        stream=body.stream,
        num_returned=body.n,
        user=body.user,
    )


def _sampling(body: GenerationBody) -> SamplingParams:
    return SamplingParams(
        temperature=body.temperature,
        top_k=max(0, body.top_k),
        top_p=body.top_p,
        min_p=body.min_p,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        repetition_penalty=body.repetition_penalty,
        logit_bias=body.logit_bias,
        seed=secrets.randbits(64) if body.seed is None else body.seed % 2**64,
    )


async def generate(
    services: Services, context: Context, prepare: Prepare, *, inline: bool
) -> Response:
    """Answer a request whose body ``prepare`` reads, on the event loop if ``inline``."""
    work = partial(prepare, services.registry, context)
    answer = await read_body(
        services.cpu_pool, context, work, inline=inline, blocks=constraints.constrains
    )
    if not answer.stream:
        return long_response(Json(await answer.whole(context, services.admission)))
    events = answer.events(context, services.admission)
    context.cleanup.push_async_callback(events.aclose)
    # The engine is asked here, so that what fails at once has an HTTP status.
    first = await anext(events)

    def fail(error: Exception) -> Event:
        return answer.dialect.error(context.fail(error))

    return Response(sse.stream(first, events, fail, answer.dialect.done), headers=sse.HEADERS)
