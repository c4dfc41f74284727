"""``POST /tokenize`` and ``POST /detokenize``, at vLLM's paths and in its words."""

from typing import TYPE_CHECKING, Any

from quart import Blueprint, Response

from server.connection import current_request
from server.conversation import conversation_ids
from server.errors import bad_request
from server.http import json_response, read_object, wants_strict
from server.prepare import validate
from server.protocol.text import DetokenizeBody, TokenizeChatBody, TokenizeTextBody
from server.services import Services

if TYPE_CHECKING:
    from inferneo_jax import Tokenizer
    from server.sources import Model

Tokenized = tuple["Model", list[int], bool, list[str]]
"""The model, the token ids, whether to spell them, and warnings."""


def add_routes(blueprint: Blueprint, services: Services) -> None:
    """Both routes."""

    @blueprint.post("/tokenize")
    async def tokenize() -> Response:
        fields = await read_object(services.text)
        read = _read_text if fields.get("messages") is None else _read_chat
        model, tokens, strings, warnings = await read(services, fields)

        def write() -> Response:
            spell = model.tokenizer.token_piece
            answer = {
                "count": len(tokens),
                "max_model_len": model.max_tokens if model.kind == "encoder" else model.max_len,
                "tokens": tokens,
                "token_strs": [spell(token) for token in tokens] if strings else None,
            }
            return _respond(answer, warnings)

        return await services.text.run(len(tokens), write)

    @blueprint.post("/detokenize")
    async def detokenize() -> Response:
        fields = await read_object(services.text)
        body, warnings = validate(DetokenizeBody, fields, strict=wants_strict())
        tokenizer = _model(services, body.model).tokenizer
        _check(body.tokens, tokenizer)
        text = await services.text.run(
            len(body.tokens), lambda: tokenizer.decode(body.tokens, skip_special_tokens=False)
        )
        return _respond({"prompt": text}, warnings)


async def _read_text(services: Services, fields: dict[str, Any]) -> Tokenized:
    body, warnings = validate(TokenizeTextBody, fields, strict=wants_strict())
    model = _model(services, body.model)

    def encode() -> list[int]:
        return model.tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens)

    tokens = await services.text.run(len(body.prompt), encode)
    return model, tokens, body.return_token_strs, warnings


async def _read_chat(services: Services, fields: dict[str, Any]) -> Tokenized:
    if fields.get("prompt") is not None:
        raise bad_request("prompt and messages exclude each other; send one of them.", "prompt")
    strict = wants_strict()
    body, warnings = validate(TokenizeChatBody, fields, strict=strict)
    model = _model(services, body.model)
    tokens = await conversation_ids(
        model.tokenizer,
        services.text,
        body,
        warnings,
        strict=strict,
        add_special_tokens=body.add_special_tokens,
    )
    return model, tokens, body.return_token_strs, warnings


def _model(services: Services, name: str | None) -> "Model":
    """The model of this name, or the first one."""
    model = services.registry.get(services.registry.models()[0].name if name is None else name)
    current_request().record.note(model=name or model.name)
    return model


def _check(tokens: list[int], tokenizer: "Tokenizer") -> None:
    if tokens and (highest := max(tokens)) >= tokenizer.vocab_size:
        raise bad_request(
            f"tokens holds {highest}; this model's token ids go from 0 to "
            f"{tokenizer.vocab_size - 1}.",
            "tokens",
        )


def _respond(answer: dict[str, Any], warnings: list[str]) -> Response:
    return json_response(answer | {"warnings": warnings} if warnings else answer)
