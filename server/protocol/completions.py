"""``/v1/completions``: what a request may hold, and the shapes of its answers."""

from typing import Annotated, Any, Self

from pydantic import Field, PlainValidator, model_validator

from server.choice import ChoiceEvent, TokenInfo
from server.protocol.common import MAX_LOGPROBS, MAX_SEQUENCES, GenerationBody
from server.protocol.shape import Shape
from server.protocol.validation import FieldError, json_kind

DEFAULT_MAX_TOKENS = 16

PromptInput = str | list[int]


def prompts_of(value: Any, name: str) -> list[PromptInput]:
    """The texts or lists of token ids in a ``prompt`` or ``input``, one or several.

    Raises:
        FieldError: it is neither, or holds nothing.
    """
    if isinstance(value, str) or _is_ids(value):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value) or all(map(_is_ids, value)):
            return list(value)
        if [] in value:
            raise FieldError(name, "holds an empty list; each needs at least one token id.")
    what = "an empty list" if value == [] else json_kind(value)
    what = "a list of mixed or wrong values" if what == "a list" else what
    raise FieldError(
        name,
        f"is {what}; it must be a string, a list of strings, a list of token ids "
        "or a list of such lists.",
    )


def _is_ids(value: Any) -> bool:
    # A set of types sees every element without a Python step for each.
    return isinstance(value, list) and set(map(type, value)) == {int}


class CompletionBody(GenerationBody):
    """The body of a request."""

    prompt: Annotated[list[PromptInput], PlainValidator(lambda value: prompts_of(value, "prompt"))]
    suffix: str = ""
    echo: bool = False
    best_of: int | None = Field(None, ge=1, le=MAX_SEQUENCES)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

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
        """Sequences sampled for each prompt."""
        return self.best_of or self.n


class CompletionShape(Shape):
    """Answers of ``/v1/completions``."""

    whole = part = "text_completion"

    def message(self, text: str, tokens: list[TokenInfo]) -> dict[str, Any]:
        """The text of a choice in a whole answer."""
        return {"text": text, "logprobs": self._logprobs(tokens)}

    def delta(self, event: ChoiceEvent) -> dict[str, Any]:
        """The text of a choice in a chunk."""
        return {"text": event.text, "logprobs": self._logprobs(event.tokens)}

    def ending(self) -> dict[str, Any]:
        """The chunk that carries nothing but a finish reason."""
        return {"text": "", "logprobs": None}

    def _logprobs(self, tokens: list[TokenInfo]) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        return {
            "tokens": [token.name for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [_top(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }


def _top(token: TokenInfo) -> dict[str, float | None] | None:
    """The alternatives by name, with the token itself always among them."""
    if token.logprob is None:
        return None
    top: dict[str, float | None] = {}
    for other in (*token.top, token):
        top.setdefault(other.name, other.logprob)  # names may collide; the likeliest keeps it
    return top
