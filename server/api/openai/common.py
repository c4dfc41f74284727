"""What the requests of several endpoints have in common."""

from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from server.config.validation import FieldError, json_kind

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
"""Every token is compared with the beginnings of all stop strings, on the event loop."""
MAX_SEQUENCES = 256
"""Most sequences of one request: prompts times ``n``, or times ``best_of``."""
MAX_STOP_TOKENS = 1024
"""Far more than an engine takes, which knows its own bound."""
MAX_BIASES = 10_000
MAX_LOGPROBS = 20
MAX_NAME = 512
"""Most characters of ``user`` and ``cache_salt``."""


_ANNOTATIONS: tuple[str, ...] = ("description", "default", "examples")


class Body(BaseModel):
    """A request body.

    Values have the JSON type they should have: no string passes for a number. ``null`` counts as
    absent. Names that are not known are kept, for a warning.
    """

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: Any) -> Any:
        if isinstance(values, dict):
            known = cls.model_fields
            return {k: value for k, value in values.items() if value is not None or k not in known}
        return values

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """The schema, with what ``_drop_nulls`` means for it."""
        reference = handler(core_schema)
        schema = handler.resolve_ref_schema(reference)
        required = schema.get("required", ())
        for name, field in schema["properties"].items():
            factory = cls.model_fields[name].default_factory
            if factory is not None:
                field["default"] = factory()  # type: ignore[call-arg]  # none takes other fields
            if name not in required:
                schema["properties"][name] = _or_null(field)
        return reference

    def unknown(self) -> list[str]:
        """Names in the body that this endpoint does not know, nested ones with their path."""
        return sorted(self.model_extra or ())


def _or_null(schema: JsonSchemaValue) -> JsonSchemaValue:
    """A schema that null passes too; what annotates it stays outside."""
    if {"type": "null"} in schema.get("anyOf", ()):
        return schema
    outside = {key: schema[key] for key in _ANNOTATIONS if key in schema}
    inside = {key: value for key, value in schema.items() if key not in outside}
    options = inside["anyOf"] if inside.keys() == {"anyOf"} else [inside]
    return {"anyOf": [*options, {"type": "null"}], **outside}


class StreamOptions(Body):
    """Options of a streamed answer."""

    include_usage: bool = Field(
        False, description="End the stream with a chunk that holds the usage and no choices."
    )
    continuous_usage_stats: bool = Field(
        False, description="Every chunk holds the usage so far; needs include_usage."
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
    """The parameters that completions and chat share."""

    model: str = Field(description="The id or an alias of a model; the answer repeats it.")
    max_tokens: int | None = Field(
        None,
        ge=0,
        description="Most tokens to generate. Together with the prompt they must fit the model's "
        "context. Completions default to 16, chat to what is left of the context; 0 is for "
        "completions that echo their prompt.",
    )
    max_completion_tokens: int | None = Field(
        None, ge=0, description="The newer name of max_tokens; of both, this one counts."
    )
    temperature: float = Field(
        1.0, ge=0, le=2, description="0 always takes the likeliest token; higher is more random."
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Sample among the likeliest tokens that together have this probability.",
    )
    top_k: int = Field(
        -1,
        ge=-1,
        lt=2**31,
        description="Sample among this many of the likeliest tokens; -1 and 0 keep them all.",
    )
    min_p: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Drop tokens whose probability is below this share of the likeliest one's.",
    )
    frequency_penalty: float = Field(
        0.0,
        ge=-2,
        le=2,
        description="Subtracted from a token's logit for each time it has been generated.",
    )
    presence_penalty: float = Field(
        0.0,
        ge=-2,
        le=2,
        description="Subtracted from a token's logit if it has been generated at all.",
    )
    repetition_penalty: float = Field(
        1.0,
        gt=0,
        le=10,
        description="Makes tokens of the prompt and of the answer less likely, if above 1.",
    )
    stop: Annotated[list[str], PlainValidator(_stops), WithJsonSchema(_STOPS)] = Field(
        default_factory=list,
        description=f"A string, or up to {MAX_STOPS}, of at most {MAX_STOP_CHARACTERS} characters "
        "each: the first to be complete ends the choice and is left out of its text.",
    )
    stop_token_ids: list[int] = Field(
        default_factory=list,
        max_length=MAX_STOP_TOKENS,
        fail_fast=True,
        description="Token ids that end a choice, besides the model's own.",
    )
    include_stop_str_in_output: bool = Field(
        False, description="Keep what stopped a choice in its text."
    )
    min_tokens: int = Field(
        0, ge=0, description="Before so many tokens nothing stops a choice; at most max_tokens."
    )
    ignore_eos: bool = Field(False, description="The model's own end token does not stop it.")
    stream: bool = Field(False, description="Answer in server-sent events.")
    stream_options: StreamOptions | None = Field(
        None, description="Options of the stream; only with stream."
    )
    n: int = Field(1, ge=1, le=MAX_SEQUENCES, description="Choices for each prompt.")
    logit_bias: Annotated[
        dict[int, float], PlainValidator(_logit_bias), WithJsonSchema(_LOGIT_BIAS)
    ] = Field(
        default_factory=dict,
        description="Added to the logits of tokens, by their ids.",
    )
    seed: int | None = Field(
        None,
        ge=-(2**63),
        le=2**64 - 1,
        description="Makes sampling repeatable: the choice with index i uses seed + i. By default "
        "a random one.",
    )
    user: str | None = Field(
        None,
        max_length=MAX_NAME,
        description="Your name for whom you serve; it appears in the server's log.",
    )
    skip_special_tokens: bool = Field(True, description="Leave control tokens out of the text.")
    priority: int = Field(
        0, ge=-(2**31), lt=2**31, description="Of requests that wait, lower ones run first."
    )
    cache_salt: str = Field(
        "",
        max_length=MAX_NAME,
        description="Requests share cached prompts only if theirs are equal.",
    )
    metadata: dict[str, Any] = Field(
        default_factory=dict, description="Accepted with a warning: answers are not stored."
    )
    store: bool = Field(False, description="Accepted with a warning: answers are not stored.")
    service_tier: str = Field(
        "auto", max_length=64, description="There is one tier; others than auto and default warn."
    )

    @model_validator(mode="after")
    def _check_together(self) -> Self:
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
        """The most tokens to generate; of its two names the newer one goes first."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk of a stream holds the usage so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    def unknown(self) -> list[str]:
        """Names in the body that this endpoint does not know, nested ones with their path."""
        options = self.stream_options.unknown() if self.stream_options else []
        return super().unknown() + [f"stream_options.{name}" for name in options]

    def notes(self) -> list[str]:
        """Warnings about parameters that cannot have their effect here."""
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
