"""What the requests of both generation endpoints have in common."""

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator

from server.protocol.validation import FieldError, json_kind

MAX_STOPS = 16
MAX_SEQUENCES = 256
"""Most sequences of one request: prompts times ``n``, or times ``best_of``."""
MAX_LOGPROBS = 20


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
            return {name: value for name, value in values.items() if value is not None}
        return values

    def unknown(self) -> list[str]:
        """Names in the body that this endpoint does not know, nested ones with their path."""
        return sorted(self.model_extra or ())


class StreamOptions(Body):
    """Options of a streamed answer."""

    include_usage: bool = False


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
    return stops


def _logit_bias(value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        raise FieldError(
            "logit_bias", f"is {json_kind(value)}; it must be an object of token ids and numbers."
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


class GenerationBody(Body):
    """The parameters that completions and chat share."""

    model: str
    max_tokens: int | None = Field(None, ge=0)
    max_completion_tokens: int | None = Field(None, ge=0)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(-1, ge=-1, lt=2**31)
    min_p: float = Field(0.0, ge=0, le=1)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    stop: Annotated[list[str], PlainValidator(_stops)] = Field(default_factory=list)
    stop_token_ids: list[int] = Field(default_factory=list)
    include_stop_str_in_output: bool = False
    min_tokens: int = Field(0, ge=0)
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=MAX_SEQUENCES)
    logit_bias: Annotated[dict[int, float], PlainValidator(_logit_bias)] = Field(
        default_factory=dict
    )
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    user: str | None = Field(None, max_length=512)
    skip_special_tokens: bool = True
    priority: int = Field(0, ge=-(2**31), lt=2**31)
    cache_salt: str = Field("", max_length=512)
    metadata: dict[str, Any] = Field(default_factory=dict)
    store: bool = False
    service_tier: str = Field("auto", max_length=64)

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise FieldError(
                "max_tokens",
                f"is {self.max_tokens} and max_completion_tokens is "
                f"{self.max_completion_tokens}; they mean the same, so send one of them.",
            )
        if self.stream_options is not None and not self.stream:
            raise FieldError("stream_options", "needs stream to be true.")
        if limits and self.min_tokens > (limit := limits.pop() or 0):
            raise FieldError(
                "min_tokens", f"is {self.min_tokens}; it must be at most max_tokens, {limit}."
            )
        return self

    @property
    def token_limit(self) -> int | None:
        """The most tokens to generate, under either of its names."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def unknown(self) -> list[str]:
        """Names in the body that this endpoint does not know, nested ones with their path."""
        options = self.stream_options.unknown() if self.stream_options else []
        return super().unknown() + [f"stream_options.{name}" for name in options]

    def notes(self) -> list[str]:
        """Warnings about parameters that cannot have their effect here."""
        notes = []
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
