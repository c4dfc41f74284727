"""What the answers look like, for the API's description and the tests that hold answers to it.

The server builds its answers as plain dictionaries: these models are never on a request's way.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

Count = Annotated[int, Field(ge=0)]


class Part(BaseModel):
    """A JSON object with these names and no others; those with a default may be absent."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """The schema without defaults: what is absent from an answer has no value."""
        reference = handler(core_schema)
        for field in handler.resolve_ref_schema(reference)["properties"].values():
            field.pop("default", None)
        return reference


class CachedTokens(Part):
    """Where a prompt's tokens came from."""

    cached_tokens: Count = Field(description="Found in the prefix cache.")


class Usage(Part):
    """Tokens of a request, those of choices that ``best_of`` left out included."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: CachedTokens


class Answered(Part):
    """What answers have in common."""

    warnings: list[str] = Field(
        [], min_length=1, description="What of the request had no effect; absent if all had."
    )


class Generated(Answered):
    """What answers of generation have in common; in a stream it is the same in every chunk."""

    id: str
    created: int = Field(description="Seconds since 1970.")
    model: str = Field(description="The name that was asked for.")


FinishReason = Literal["stop", "length", "abort"]


class CompletionLogprobs(Part):
    """Log probabilities, token by token; those of a prompt's first token are null."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float | None] | None]
    text_offset: list[Count] = Field(description="In characters.")


class CompletionChoice(Part):
    """A continuation of a prompt."""

    index: Count
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class Completion(Generated):
    """Continuations of prompts."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class CompletionDelta(CompletionChoice):
    """What is new in a choice."""

    finish_reason: FinishReason | None  # type: ignore[assignment]  # null until the choice ends


class CompletionChunk(Generated):
    """An event of a stream."""

    object: Literal["text_completion"]
    choices: list[CompletionDelta]
    usage: Usage | None = Field(None, description="With stream_options.include_usage.")


class Alternative(Part):
    """A token that was likely at its place."""

    token: str
    logprob: float
    bytes: list[Annotated[int, Field(ge=0, le=255)]]


class ChatToken(Alternative):
    """A token of an answer."""

    top_logprobs: list[Alternative]


class ChatLogprobs(Part):
    """Log probabilities, token by token."""

    content: list[ChatToken]
    refusal: None


class AnswerMessage(Part):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Part):
    """A next message."""

    index: Count
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(Generated):
    """Next messages of a conversation."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class MessageDelta(Part):
    """What is new in a message; the role comes once, first."""

    role: Literal["assistant"] = "assistant"
    content: str = ""


class ChatDelta(Part):
    """What is new in a choice."""

    index: Count
    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(Generated):
    """An event of a stream."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatDelta]
    usage: Usage | None = Field(None, description="With stream_options.include_usage.")


class Embedding(Part):
    """The vector of an input."""

    object: Literal["embedding"]
    embedding: list[float] | str = Field(
        description="Numbers, or the base64 of little-endian 32-bit floats."
    )
    index: Count


class EmbeddingUsage(Part):
    """Tokens of a request."""

    prompt_tokens: Count
    total_tokens: Count


class EmbeddingList(Answered):
    """Vectors, in the order of the inputs."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class TokenList(Answered):
    """The tokens of a text or a conversation."""

    count: Count
    max_model_len: Count = Field(description="Most tokens that the model reads, or context.")
    tokens: list[Count]
    token_strs: list[str] | None = Field(description="Null unless they were asked for.")


class Detokenized(Answered):
    """A text."""

    prompt: str
