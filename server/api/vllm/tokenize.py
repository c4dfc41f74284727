"""``POST /tokenize`` and ``POST /detokenize``, compatible with vLLM's endpoints."""

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import Field, PlainValidator, WithJsonSchema
from quart import Response

from server.api.body import Body, read_body, validate
from server.api.endpoint import Endpoint
from server.api.examples import CHAT_MODEL
from server.api.openai.chat import Conversation
from server.api.openai.completions import TOKEN_ID, checked_ids
from server.config.validation import FieldError, json_kind
from server.http.codec import long_response
from server.http.errors import bad_request
from server.http.pieces import Json, JsonList
from server.http.schema import Count, Warned
from server.keys.caller import Caller
from server.keys.store.store import Usage
from server.run.context import Context
from server.services import Services

if TYPE_CHECKING:
    from inferneo_jax import Model, Tokenizer
    from server.models.registry import Registry

_SLICE = 10_000
_MODEL = "The id or an alias of a model; by default, the first one that is served."
_STRINGS = "Also return the tokens as strings, as the vocabulary spells them."


class TokenizeTextBody(Body):
    """A request to tokenize a text."""

    model: str | None = Field(None, description=_MODEL)
    prompt: str = Field(description="The text to tokenize.")
    add_special_tokens: bool = Field(
        True,
        description="Add the special tokens that the model expects around a text, such as BOS.",
    )
    return_token_strs: bool = Field(False, description=_STRINGS)


class TokenizeChatBody(Conversation):
    """A request to tokenize a conversation."""

    model: str | None = Field(None, description=_MODEL)
    add_special_tokens: bool = Field(
        False,
        description="Add the special tokens that the model expects around a text. Chat "
        "templates already write them.",
    )
    return_token_strs: bool = Field(False, description=_STRINGS)


def _tokens(value: Any) -> list[int]:
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        what = "a list of mixed or wrong values" if isinstance(value, list) else json_kind(value)
        raise FieldError("tokens", f"is {what}; it must be a list of token ids.")
    return checked_ids(value, "tokens")


class DetokenizeBody(Body):
    """A request to decode token ids."""

    model: str | None = Field(None, description=_MODEL)
    tokens: Annotated[
        list[int],
        PlainValidator(_tokens),
        WithJsonSchema({"type": "array", "items": TOKEN_ID}),
    ] = Field(description="The token ids to decode; all must be in the model's vocabulary.")


class TokenList(Warned):
    """The tokens of a text or a conversation."""

    count: Annotated[Count, Field(description="The number of tokens.")]
    max_model_len: Annotated[
        Count, Field(description="The maximum number of tokens that the model can process.")
    ]
    tokens: Annotated[JsonList[Count], Field(description="The ids of the tokens.")]
    token_strs: Annotated[
        JsonList[str] | None,
        Field(description="The tokens as strings; null unless the request asks for them."),
    ]


class Detokenized(Warned):
    """The text of the token ids."""

    prompt: Annotated[str, Field(description="The text, with special tokens written out.")]


class _Written(NamedTuple):
    """A serialized answer, and the name of its model."""

    model: str
    text: Json


@Endpoint(
    method="POST",
    path="/tokenize",
    access="inference",
    tag="tokens",
    summary="Get the token ids of a text or a conversation",
    description="Send either `prompt` or `messages`, as with vLLM.",
    body=(TokenizeTextBody, TokenizeChatBody),
    example={"model": CHAT_MODEL, "prompt": "Hello!", "return_token_strs": True},
    answer=TokenList,
    admitted=True,
)
async def tokenize(services: Services, context: Context) -> Response:
    """Encode a text, or a conversation rendered with the model's chat template."""
    work = partial(_tokenize, services.registry, context)
    return _respond(context, await read_body(services.cpu_pool, context, work, inline=False))


@Endpoint(
    method="POST",
    path="/detokenize",
    access="inference",
    tag="tokens",
    summary="Get the text of token ids",
    description="Special tokens are written out; bytes that are not valid UTF-8 become U+FFFD.",
    body=(DetokenizeBody,),
    example={"model": CHAT_MODEL, "tokens": [19556, 17]},
    answer=Detokenized,
    admitted=True,
)
async def detokenize(services: Services, context: Context) -> Response:
    """Decode token ids."""
    work = partial(_detokenize, services.registry, context)
    return _respond(context, await read_body(services.cpu_pool, context, work))


def _respond(context: Context, written: _Written) -> Response:
    context.log_entry.add(model=written.model)
    assert context.charge is not None
    context.charge.settle(Usage())  # before the client knows, who may send its next request
    return long_response(written.text)


def _tokenize(registry: "Registry", context: Context, fields: dict[str, Any]) -> _Written:
    if fields.get("messages") is None:
        text, warnings = validate(TokenizeTextBody, fields, strict=context.strict)
        model, spelled = _model(registry, context.caller, text.model), text.return_token_strs
        tokens = model.tokenizer.encode(text.prompt, add_special_tokens=text.add_special_tokens)
    else:
        if fields.get("prompt") is not None:
            message = "prompt and messages exclude each other; send one of them."
            raise bad_request(message, "prompt")
        chat, warnings = validate(TokenizeChatBody, fields, strict=context.strict)
        model, spelled = _model(registry, context.caller, chat.model), chat.return_token_strs
        written = chat.text(model.tokenizer, warnings, strict=context.strict)
        tokens = model.tokenizer.encode(written, add_special_tokens=chat.add_special_tokens)
    ids, pieces = JsonList[int](), JsonList[str]()
    spell = model.tokenizer.token_piece
    for start in range(0, len(tokens), _SLICE):
        part = tokens[start : start + _SLICE]
        ids.extend(part)
        if spelled:
            pieces.extend([spell(token) for token in part])
    answer: TokenList = {
        "count": len(tokens),
        "max_model_len": model.max_len,
        "tokens": ids,
        "token_strs": pieces if spelled else None,
    }
    if warnings:
        answer["warnings"] = warnings
    return _Written(fields.get("model") or model.name, Json(answer))


def _detokenize(registry: "Registry", context: Context, fields: dict[str, Any]) -> _Written:
    body, warnings = validate(DetokenizeBody, fields, strict=context.strict)
    model = _model(registry, context.caller, body.model)
    _check(body.tokens, model.tokenizer)
    text = model.tokenizer.decode(body.tokens, skip_special_tokens=False)
    answer: Detokenized = {"prompt": text}
    if warnings:
        answer["warnings"] = warnings
    return _Written(body.model or model.name, Json(answer))


def _model(registry: "Registry", caller: Caller, name: str | None) -> "Model":
    """Return the model of this name; by default, the first model."""
    return registry.get(registry.models()[0].name if name is None else name, caller)


def _check(tokens: list[int], tokenizer: "Tokenizer") -> None:
    if tokens and (highest := max(tokens)) >= tokenizer.vocab_size:
        raise bad_request(
            f"tokens holds {highest}; this model's token ids go from 0 to "
            f"{tokenizer.vocab_size - 1}.",
            "tokens",
        )
