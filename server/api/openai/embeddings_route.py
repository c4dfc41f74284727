"""``POST /v1/embeddings``."""

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from quart import Blueprint, Response

from server.api.openai.completions import PromptInput
from server.api.openai.embeddings import EmbeddingBody, embedding_answer
from server.http.codec import long_response, wants_strict
from server.http.connection import current_request
from server.http.errors import bad_request
from server.http.pieces import Json
from server.keys.caller import Caller
from server.keys.store.store import Usage
from server.prompt.body import read_body
from server.prompt.prompts import CONTEXT_IS
from server.run.prepare import validate
from server.services import Services

if TYPE_CHECKING:
    import numpy as np

    from inferneo_jax import EmbeddingModel
    from server.models.registry import Registry

    Vectors = np.ndarray[Any, np.dtype[np.float32]]


def add_routes(blueprint: Blueprint, services: Services) -> None:
    """``POST /embeddings``."""

    @blueprint.post("/embeddings")
    async def create_embeddings() -> Response:
        caller: Caller = current_request().caller
        work = partial(_read, services.registry, caller, strict=wants_strict())
        body, model, ids, warnings = await read_body(services.cpu_pool, work)
        current = current_request()
        permit, charge = current.permit, current.charge
        assert permit is not None
        assert charge is not None
        num_tokens = sum(map(len, ids))
        current.log_entry.add(model=body.model, user=body.user, prompt_tokens=num_tokens)
        await charge.reserve(model.name, num_tokens, 0)
        permit.served = True
        try:
            # Should the client leave, this is cancelled, and the future with it.
            async with asyncio.timeout_at(permit.deadline.at):
                vectors = await asyncio.wrap_future(model.embedder.embed(ids, caller.id or ""))
        except TimeoutError:
            charge.settle(Usage(prompt=num_tokens))
            raise permit.deadline.missed() from None
        except asyncio.CancelledError:
            charge.settle(Usage(prompt=num_tokens))
            raise
        services.metrics.embedded(model.name, num_tokens)

        def write() -> Json:
            shortened = _shorten(vectors, body.dimensions)
            return Json(
                embedding_answer(body.model, shortened, body.encoding_format, num_tokens, warnings)
            )

        written = await services.cpu_pool.run(
            vectors.nbytes, write, owner=caller.id, deadline=permit.deadline
        )
        charge.settle(Usage(prompt=num_tokens))
        return long_response(written)


def _read(
    registry: "Registry", caller: Caller, fields: dict[str, Any], *, strict: bool
) -> tuple[EmbeddingBody, "EmbeddingModel", list[list[int]], list[str]]:
    """The request, its model, the token ids of its inputs, and warnings."""
    body, warnings = validate(EmbeddingBody, fields, strict=strict)
    model = registry.embedding_model(body.model, caller)
    hidden_size = model.embedder.hidden_size
    if body.dimensions is not None and body.dimensions > hidden_size:
        raise bad_request(
            f"dimensions is {body.dimensions}; it must be from 1 to {hidden_size}.", "dimensions"
        )
    keep = _longest(model, body.truncate_prompt_tokens)
    return body, model, _tokenize(model, body.input, keep), warnings


def _longest(model: "EmbeddingModel", truncate: int | None) -> int | None:
    """The tokens to which every input is cut; None: it is not cut.

    Raises:
        ApiError: the model does not read so many.
    """
    if truncate is not None and truncate > model.max_tokens:
        raise bad_request(
            f"truncate_prompt_tokens is {truncate}; it must be from 1 to {model.max_tokens}, which "
            "this model reads at most, or -1 for just that.",
            "truncate_prompt_tokens",
        )
    return model.max_tokens if truncate == -1 else truncate


def _tokenize(
    model: "EmbeddingModel", inputs: Sequence[PromptInput], keep: int | None
) -> list[list[int]]:
    """Token ids of each input, none longer than the model reads.

    A text gets what the tokenizer adds to it; token ids are taken as they are.
    """
    texts = iter(
        model.tokenizer.encode_batch(
            [text for text in inputs if isinstance(text, str)], max_tokens=keep
        )
    )
    ids = [next(texts) if isinstance(item, str) else item[:keep] for item in inputs]
    for i, each in enumerate(ids):
        if len(each) > model.max_tokens:
            name = f"input[{i}]" if len(ids) > 1 else "input"
            raise bad_request(
                f"{name} has {len(each)} tokens. {CONTEXT_IS} {model.max_tokens} tokens. "
                "Shorten it, cut it into several, or set truncate_prompt_tokens to -1.",
                name,
                "context_length_exceeded",
            )
    return ids


def _shorten(vectors: "Vectors", dimensions: int | None) -> "Vectors":
    """The first ``dimensions`` of every vector, of length one again."""
    if dimensions is None or dimensions == vectors.shape[1]:
        return vectors
    cut = vectors[:, :dimensions]
    norms = (cut * cut).sum(axis=1, keepdims=True) ** 0.5
    return cut / norms.clip(1e-12)
