"""``/v1/completions``: what a request may hold, and the shapes of its answers."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator

from server.api.openai.common import MAX_LOGPROBS, MAX_SEQUENCES, GenerationBody
from server.config.validation import FieldError, json_kind
from server.run.dialect import Dialect
from server.run.output import TextPart, TokenInfo

DEFAULT_MAX_TOKENS = 16

PromptInput = str | list[int]

MAX_ITEMS = 500_000
"""Longest list of token ids; beyond any context, and looked at quickly."""
MAX_TOKEN_ID = 2**31 - 1
"""Far above any vocabulary, whose own bound the model checks; what is no id at all ends here."""
TOKEN_ID = {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID}


def prompts_of(value: Any, name: str) -> list[PromptInput]:
    """The texts or lists of token ids in a ``prompt`` or ``input``, one or several.

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
    """What :func:`prompts_of` takes, for up to ``most`` prompts of ``shortest`` characters."""
    text = {"type": "string", "minLength": shortest}
    ids = {"type": "array", "items": TOKEN_ID, "minItems": 1}
    several = {"type": "array", "minItems": 1, "maxItems": most}
    return {"anyOf": [text, several | {"items": text}, ids, several | {"items": ids}]}


def checked_ids(ids: list[int], name: str) -> list[int]:
    """The same token ids.

    Raises:
        FieldError: one of them cannot be the id of any token.
    """
    for worst in (min(ids, default=0), max(ids, default=0)):
        if not 0 <= worst <= MAX_TOKEN_ID:
            raise FieldError(name, f"holds {worst}; token ids go from 0 to the vocabulary's size.")
    return ids


def _is_ids(value: Any) -> bool:
    # A set of types sees every element without a Python step for each.
    return isinstance(value, list) and set(map(type, value)) == {int}


class CompletionBody(GenerationBody):
    """A prompt to go on with, or several."""

    prompt: Annotated[
        list[PromptInput],
        PlainValidator(lambda value: prompts_of(value, "prompt")),
        WithJsonSchema(prompts_schema(MAX_SEQUENCES)),
    ] = Field(
        description="A text, a list of texts, token ids, or a list of such lists; choices come in "
        f"their order. Prompts times choices are at most {MAX_SEQUENCES}."
    )
    suffix: str = Field(
        "",
        description="Text that follows: filled in by models that can, else appended, with a "
        "warning.",
    )
    echo: bool = Field(
        False, description="Begin with the prompt, and score it if logprobs is there."
    )
    best_of: int | None = Field(
        None,
        ge=1,
        le=MAX_SEQUENCES,
        description="Sample so many and return the n of the highest mean log probability; by "
        "default n, and not above it with stream.",
    )
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Log probabilities of the tokens, with so many alternatives beside each.",
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
        """Sequences sampled for each prompt."""
        return self.best_of or self.n


class CompletionDialect(Dialect):
    """Answers of ``/v1/completions``."""

    whole = part = "text_completion"

    def columns(self, tokens: Sequence[TokenInfo]) -> dict[str, list[Any]]:
        """The lists that log probabilities consist of, for these tokens."""
        return {
            "tokens": [token.name for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [_top(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def message(self, text: str, columns: Mapping[str, Any]) -> dict[str, Any]:
        """A choice's text and log probabilities in a whole answer."""
        return {"text": text, "logprobs": columns if self.with_logprobs else None}

    def delta(self, event: TextPart) -> dict[str, Any]:
        """A choice's text and log probabilities in a chunk."""
        return self.message(event.text, self.columns(event.tokens))

    def ending(self) -> dict[str, Any]:
        """The chunk that carries nothing but a finish reason."""
        return {"text": "", "logprobs": None}


def _top(token: TokenInfo) -> dict[str, float | None] | None:
    """The alternatives by name, with the token itself always among them."""
    if token.logprob is None:
        return None
    top: dict[str, float | None] = {}
    for other in (*token.top, token):
        top.setdefault(other.name, other.logprob)  # names may collide; the likeliest keeps it
    return top
