"""``POST /tokenize`` and ``POST /detokenize``, at vLLM's paths and in its words."""

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from quart import Blueprint, Response

from server.api.vllm.tokenize import DetokenizeBody, TokenizeChatBody, TokenizeTextBody
from server.http.codec import long_response, wants_strict
from server.http.connection import current_request
from server.http.errors import bad_request
from server.http.pieces import Json, JsonList
from server.keys.caller import Caller
from server.keys.store.store import Usage
from server.prompt.body import read_body
from server.prompt.templates import conversation_ids
from server.run.prepare import validate
from server.services import Services

if TYPE_CHECKING:
    from inferneo_jax import Tokenizer
    from server.models.registry import Registry
    from server.models.sources import Model

_SLICE = 10_000


class _Written(NamedTuple):
    """An answer, and the model that it is about."""

    model: str
    text: Json


def add_routes(blueprint: Blueprint, services: Services) -> None:
    """Both routes."""

    @blueprint.post("/tokenize")
    async def tokenize() -> Response:
        work = partial(
            _tokenize, services.registry, current_request().caller, strict=wants_strict()
        )
        return _respond(await read_body(services.cpu_pool, work, inline=False))

    @blueprint.post("/detokenize")
    async def detokenize() -> Response:
        work = partial(
            _detokenize, services.registry, current_request().caller, strict=wants_strict()
        )
        return _respond(await read_body(services.cpu_pool, work))


def _respond(written: _Written) -> Response:
    current = current_request()
    current.log_entry.add(model=written.model)
    assert current.charge is not None
    current.charge.settle(Usage())  # before the client knows, who may send its next request
    return long_response(written.text)


def _tokenize(
    registry: "Registry", caller: Caller, fields: dict[str, Any], *, strict: bool
) -> _Written:
    if fields.get("messages") is None:
        text, warnings = validate(TokenizeTextBody, fields, strict=strict)
        model, spelled = _model(registry, caller, text.model), text.return_token_strs
        tokens = model.tokenizer.encode(text.prompt, add_special_tokens=text.add_special_tokens)
    else:
        if fields.get("prompt") is not None:
            message = "prompt and messages exclude each other; send one of them."
            raise bad_request(message, "prompt")
        chat, warnings = validate(TokenizeChatBody, fields, strict=strict)
        model, spelled = _model(registry, caller, chat.model), chat.return_token_strs
        tokens = conversation_ids(
            model.tokenizer,
            chat,
            warnings,
            strict=strict,
            add_special_tokens=chat.add_special_tokens,
        )
    ids, pieces = JsonList(), JsonList()
    spell = model.tokenizer.token_piece
    for start in range(0, len(tokens), _SLICE):
        part = tokens[start : start + _SLICE]
        ids.extend(part)
        if spelled:
            pieces.extend([spell(token) for token in part])
    answer = {
        "count": len(tokens),
        "max_model_len": model.max_tokens if model.kind == "encoder" else model.max_len,
        "tokens": ids,
        "token_strs": pieces if spelled else None,
    }
    return _write(fields.get("model") or model.name, answer, warnings)


def _detokenize(
    registry: "Registry", caller: Caller, fields: dict[str, Any], *, strict: bool
) -> _Written:
    body, warnings = validate(DetokenizeBody, fields, strict=strict)
    model = _model(registry, caller, body.model)
    _check(body.tokens, model.tokenizer)
    text = model.tokenizer.decode(body.tokens, skip_special_tokens=False)
    return _write(body.model or model.name, {"prompt": text}, warnings)


def _model(registry: "Registry", caller: Caller, name: str | None) -> "Model":
    """The model of this name, or the first one."""
    return registry.get(registry.models()[0].name if name is None else name, caller)


def _check(tokens: list[int], tokenizer: "Tokenizer") -> None:
    if tokens and (highest := max(tokens)) >= tokenizer.vocab_size:
        raise bad_request(
            f"tokens holds {highest}; this model's token ids go from 0 to "
            f"{tokenizer.vocab_size - 1}.",
            "tokens",
        )


def _write(model: str, answer: dict[str, Any], warnings: list[str]) -> _Written:
    return _Written(model, Json(answer | {"warnings": warnings} if warnings else answer))
