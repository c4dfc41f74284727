"""``/v1/embeddings``: the request body, the answer, and the endpoint."""

import asyncio
import base64
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator
from quart import Response
from typing_extensions import TypedDict

from server.api.body import MAX_NAME, Body, read_body, validate
from server.api.endpoint import Endpoint
from server.api.examples import EMBEDDING_MODEL
from server.api.openai.completions import MAX_TOKEN_ID, prompts_of, prompts_schema
from server.config.validation import FieldError
from server.http.codec import long_response
from server.http.errors import bad_request
from server.http.pieces import Json, JsonList
from server.http.schema import Count, Warned
from server.keys.store.store import Usage
from server.prompt.prompts import CONTEXT_IS, PromptInput
from server.run.context import Context
from server.services import Services

if TYPE_CHECKING:
    import numpy as np

    from inferneo_jax import EmbeddingModel
    from server.models.registry import Registry

    Vectors = np.ndarray[Any, np.dtype[np.float32]]
    Vector = np.ndarray[tuple[int], np.dtype[np.float32]]
else:
    Vector = list[float]  # as it is written

MAX_INPUTS = 2048


def _inputs(value: Any) -> list[PromptInput]:
    inputs = prompts_of(value, "input")
    if len(inputs) > MAX_INPUTS:
        raise FieldError("input", f"holds {len(inputs)} texts; it may hold at most {MAX_INPUTS}.")
    if "" in inputs:
        raise FieldError("input", "holds an empty string; there is nothing to embed in it.")
    return inputs


class EmbeddingBody(Body):
    """A request to embed one or more texts."""

    model: str = Field(description="The id or an alias of a model; the answer repeats it.")
    input: Annotated[
        list[PromptInput],
        PlainValidator(_inputs),
        WithJsonSchema(prompts_schema(MAX_INPUTS, shortest=1)),
    ] = Field(
        description="A string, a list of strings, a list of token ids, or a list of such "
        f"lists: at most {MAX_INPUTS} inputs, none of them empty or longer than the "
        "model's maximum length."
    )
    encoding_format: Literal["float", "base64"] = Field(
        "float",
        description="The format of the vectors: numbers, or base64 of little-endian 32-bit floats.",
    )
    dimensions: int | None = Field(
        None,
        ge=1,
        description="Keep only this many leading components of each vector, rescaled to "
        "unit length. By default, all components are kept.",
    )
    truncate_prompt_tokens: int | None = Field(
        None,
        ge=-1,
        le=MAX_TOKEN_ID,
        description="Truncate each input to its first tokens, at most this many, including "
        "the special tokens that the model adds to a text; -1 stands for the model's "
        "maximum length. By default, inputs that are too long are rejected.",
    )
    user: str | None = Field(
        None,
        max_length=MAX_NAME,
        description="Your identifier for the end user; it is written to the server's log.",
    )

    @model_validator(mode="after")
    def _check_truncation(self) -> Self:
        if self.truncate_prompt_tokens == 0:
            raise FieldError(
                "truncate_prompt_tokens", "is 0; it must be at least 1, or -1 for the model's most."
            )
        return self


class Embedding(TypedDict):
    """The embedding of one input."""

    object: Literal["embedding"]
    embedding: Annotated[
        Vector | str,
        Field(description="The vector, as numbers or as base64 of little-endian 32-bit floats."),
    ]
    index: Annotated[Count, Field(description="The index of the input, from 0.")]


class EmbeddingUsage(TypedDict):
    """The number of tokens that a request used."""

    prompt_tokens: Annotated[Count, Field(description="The number of tokens embedded.")]
    total_tokens: Annotated[Count, Field(description="The same number as prompt_tokens.")]


class EmbeddingList(Warned):
    """The embeddings, in the order of the inputs."""

    object: Literal["list"]
    data: Annotated[JsonList[Embedding], Field(description="One embedding for each input.")]
    model: Annotated[str, Field(description="The model name as given in the request.")]
    usage: Annotated[
        EmbeddingUsage, Field(description="The number of tokens that the request used.")
    ]


@Endpoint(
    method="POST",
    path="/v1/embeddings",
    access="embeddings",
    tag="embeddings",
    summary="Embed texts",
    body=(EmbeddingBody,),
    example={"model": EMBEDDING_MODEL, "input": ["Hello!"]},
    answer=EmbeddingList,
    admitted=True,
    gen_ai_operation="embeddings",
)
async def create_embeddings(services: Services, context: Context) -> Response:
    """Embed the texts of a request."""
    work = partial(_read, services.registry, context)
    body, model, ids, warnings = await read_body(services.cpu_pool, context, work)
    owner, deadline = context.caller.id, context.deadline
    assert deadline is not None
    usage = Usage(prompt=sum(map(len, ids)))
    context.log_entry.add(model=body.model, user=body.user, prompt_tokens=usage.prompt)
    async with services.admission.admitted(context, model.name, usage.prompt, 0) as admitted:
        try:
            # Should the client leave, this is cancelled, and the future with it.
            async with asyncio.timeout_at(deadline.at):
                vectors = await asyncio.wrap_future(model.embedder.embed(ids, owner or ""))
        except TimeoutError:
            admitted.usage = usage
            raise deadline.missed() from None
        except asyncio.CancelledError:
            admitted.usage = usage
            raise
        admitted.embedded(usage.prompt)

        def write() -> Json:
            shortened = _shorten(vectors, body.dimensions)
            encoding = body.encoding_format
            return Json(embedding_answer(body.model, shortened, encoding, usage.prompt, warnings))

        written = await services.cpu_pool.run(vectors.nbytes, write, owner=owner, deadline=deadline)
        admitted.usage = usage
    return long_response(written)


def _read(
    registry: "Registry", context: Context, fields: dict[str, Any]
) -> tuple[EmbeddingBody, "EmbeddingModel", list[list[int]], list[str]]:
    """Return the request body, its model, the token ids of its inputs, and warnings."""
    body, warnings = validate(EmbeddingBody, fields, strict=context.strict)
    model = registry.embedding_model(body.model, context.caller)
    hidden_size = model.embedder.hidden_size
    if body.dimensions is not None and body.dimensions > hidden_size:
        raise bad_request(
            f"dimensions is {body.dimensions}; it must be from 1 to {hidden_size}.", "dimensions"
        )
    keep = _longest(model, body.truncate_prompt_tokens)
    return body, model, _tokenize(model, body.input, keep), warnings


def _longest(model: "EmbeddingModel", truncate: int | None) -> int | None:
    """Return the length to which inputs are truncated, in tokens; None means no truncation.

    Raises:
        ApiError: the length exceeds the model's maximum.
    """
    if truncate is not None and truncate > model.max_len:
        raise bad_request(
            f"truncate_prompt_tokens is {truncate}; it must be from 1 to {model.max_len}, which "
            "this model reads at most, or -1 for just that.",
            "truncate_prompt_tokens",
        )
    return model.max_len if truncate == -1 else truncate


def _tokenize(
    model: "EmbeddingModel", inputs: Sequence[PromptInput], keep: int | None
) -> list[list[int]]:
    """Return the token ids of each input, none longer than the model's maximum length.

    The tokenizer adds its special tokens to texts; token ids are used unchanged.
    """
    texts = iter(
        model.tokenizer.encode_batch(
            [text for text in inputs if isinstance(text, str)], max_tokens=keep
        )
    )
    ids = [next(texts) if isinstance(item, str) else item[:keep] for item in inputs]
    for i, each in enumerate(ids):
        if len(each) > model.max_len:
            name = f"input[{i}]" if len(ids) > 1 else "input"
            raise bad_request(
                f"{name} has {len(each)} tokens. {CONTEXT_IS} {model.max_len} tokens. "
                "Shorten it, cut it into several, or set truncate_prompt_tokens to -1.",
                name,
                "context_length_exceeded",
            )
    return ids


def _shorten(vectors: "Vectors", dimensions: int | None) -> "Vectors":
    """Truncate every vector to ``dimensions`` components and rescale it to unit length."""
    if dimensions is None or dimensions == vectors.shape[1]:
        return vectors
    cut = vectors[:, :dimensions]
    norms = (cut * cut).sum(axis=1, keepdims=True) ** 0.5
    return cut / norms.clip(1e-12)


def embedding_answer(
    model: str,
    vectors: "Vectors",
    encoding: Literal["float", "base64"],
    num_tokens: int,
    warnings: list[str],
) -> EmbeddingList:
    """Build an answer of ``vectors`` ``[inputs, dimensions]``; base64 is little-endian float32."""
    data = JsonList[Embedding]()
    for index, vector in enumerate(vectors):
        embedding = vector
        if encoding == "base64":
            embedding = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        data.extend([{"object": "embedding", "embedding": embedding, "index": index}])
    answer: EmbeddingList = {
        "object": "list",
        "data": data,
        "model": model,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
    if warnings:
        answer["warnings"] = warnings
    return answer
