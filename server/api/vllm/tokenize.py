"""``/tokenize`` and ``/detokenize``: vLLM's names for what a tokenizer does."""

from typing import Annotated, Any

from pydantic import Field, PlainValidator, WithJsonSchema

from server.api.openai.chat import Conversation
from server.api.openai.common import Body
from server.api.openai.completions import TOKEN_ID, checked_ids
from server.config.validation import FieldError, json_kind

_MODEL = "The id or an alias of a model; by default the first that is served."
_STRINGS = "Give the tokens as the vocabulary spells them, too."


class TokenizeTextBody(Body):
    """A text to tokenize."""

    model: str | None = Field(None, description=_MODEL)
    prompt: str = Field(description="The text to tokenize.")
    add_special_tokens: bool = Field(
        True, description="Add the tokens that the model expects around a text, such as BOS."
    )
    return_token_strs: bool = Field(False, description=_STRINGS)


class TokenizeChatBody(Conversation):
    """A conversation to tokenize."""

    model: str | None = Field(None, description=_MODEL)
    add_special_tokens: bool = Field(
        False,
        description="Add the tokens that the model expects around a text. Chat templates write "
        "them already.",
    )
    return_token_strs: bool = Field(False, description=_STRINGS)


def _tokens(value: Any) -> list[int]:
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        what = "a list of mixed or wrong values" if isinstance(value, list) else json_kind(value)
        raise FieldError("tokens", f"is {what}; it must be a list of token ids.")
    return checked_ids(value, "tokens")


class DetokenizeBody(Body):
    """Tokens to write out as a text."""

    model: str | None = Field(None, description=_MODEL)
    tokens: Annotated[
        list[int],
        PlainValidator(_tokens),
        WithJsonSchema({"type": "array", "items": TOKEN_ID}),
    ] = Field(description="Token ids, all of the model's vocabulary.")
