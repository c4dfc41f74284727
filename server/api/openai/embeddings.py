"""``/v1/embeddings``: what a request may hold, and the shape of its answer."""

import base64
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator

from server.api.openai.common import MAX_NAME, Body
from server.api.openai.completions import MAX_TOKEN_ID, PromptInput, prompts_of, prompts_schema
from server.config.validation import FieldError
from server.http.pieces import JsonList

if TYPE_CHECKING:
    import numpy as np

MAX_INPUTS = 2048


def _inputs(value: Any) -> list[PromptInput]:
    inputs = prompts_of(value, "input")
    if len(inputs) > MAX_INPUTS:
        raise FieldError("input", f"holds {len(inputs)} texts; it may hold at most {MAX_INPUTS}.")
    if "" in inputs:
        raise FieldError("input", "holds an empty string; there is nothing to embed in it.")
    return inputs


class EmbeddingBody(Body):
    """A text to embed, or several."""

    model: str = Field(description="The id or an alias of a model; the answer repeats it.")
    input: Annotated[
        list[PromptInput],
        PlainValidator(_inputs),
        WithJsonSchema(prompts_schema(MAX_INPUTS, shortest=1)),
    ] = Field(
        description="A text, a list of texts, token ids, or a list of such lists: at most "
        f"{MAX_INPUTS}, none empty, none longer than the model reads."
    )
    encoding_format: Literal["float", "base64"] = Field(
        "float",
        description="Numbers, or the base64 of little-endian 32-bit floats.",
    )
    dimensions: int | None = Field(
        None,
        ge=1,
        description="Keep the first so many, scaled to length one again; by default the model's.",
    )
    truncate_prompt_tokens: int | None = Field(
        None,
        ge=-1,
        le=MAX_TOKEN_ID,
        description="Cut each input to its first so many tokens, those that the model adds to a "
        "text included; -1 is the most that the model reads. By default what is longer is refused.",
    )
    user: str | None = Field(
        None,
        max_length=MAX_NAME,
        description="Your name for whom you serve; it appears in the server's log.",
    )

    @model_validator(mode="after")
    def _check_truncation(self) -> Self:
        if self.truncate_prompt_tokens == 0:
            raise FieldError(
                "truncate_prompt_tokens", "is 0; it must be at least 1, or -1 for the model's most."
            )
        return self


def embedding_answer(
    model: str,
    vectors: "np.ndarray[Any, np.dtype[np.float32]]",
    encoding: Literal["float", "base64"],
    num_tokens: int,
    warnings: list[str],
) -> dict[str, Any]:
    """The answer: ``vectors`` is ``[inputs, dimensions]``; base64 is of little-endian float32."""
    data = JsonList()
    for index, vector in enumerate(vectors):
        embedding = vector
        if encoding == "base64":
            embedding = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        data.extend([{"object": "embedding", "embedding": embedding, "index": index}])
    answer: dict[str, Any] = {
        "object": "list",
        "data": data,
        "model": model,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
    return answer | {"warnings": warnings} if warnings else answer
