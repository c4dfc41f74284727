"""``/v1/embeddings``: what a request may hold, and the shape of its answer."""

import base64
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PlainValidator

from server.protocol.common import Body
from server.protocol.completions import PromptInput, prompts_of
from server.protocol.validation import FieldError

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
    """The body of a request."""

    model: str
    input: Annotated[list[PromptInput], PlainValidator(_inputs)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    user: str | None = Field(None, max_length=512)


def embedding_answer(
    model: str,
    vectors: "np.ndarray[Any, np.dtype[np.float32]]",
    encoding: Literal["float", "base64"],
    num_tokens: int,
    warnings: list[str],
) -> dict[str, Any]:
    """The answer: ``vectors`` is ``[inputs, dimensions]``; base64 is of little-endian float32."""
    answer: dict[str, Any] = {
        "object": "list",
        "data": [
            {
                "object": "embedding",
                "embedding": vector
                if encoding == "float"
                else base64.b64encode(vector.astype("<f4").tobytes()).decode(),
                "index": index,
            }
            for index, vector in enumerate(vectors)
        ],
        "model": model,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
    return answer | {"warnings": warnings} if warnings else answer
