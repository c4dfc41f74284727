"""What the answers look like, for the API's description and the tests that hold answers to it.

The server builds its answers as plain dictionaries: these models are never on a request's way.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

Count = Annotated[int, Field(ge=0)]
Index = Annotated[
    int, Field(ge=0, description="Its place: choices are numbered prompt by prompt, from 0.")
]
Null = Annotated[None, Field(description="Always null; other servers have something there.")]


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

    prompt_tokens: Count = Field(description="Tokens of the prompts, cached or not.")
    completion_tokens: Count = Field(description="Tokens that were sampled.")
    total_tokens: Count = Field(description="Both together.")
    prompt_tokens_details: CachedTokens = Field(description="Where those of the prompts came from.")


class Answered(Part):
    """What answers have in common."""

    warnings: list[str] = Field(
        [], min_length=1, description="What of the request had no effect; absent if all had."
    )


class Generated(Answered):
    """What answers of generation have in common; in a stream it is the same in every chunk."""

    id: str = Field(description="The answer's own id.")
    created: int = Field(description="Seconds since 1970.")
    model: str = Field(description="The name that was asked for.")


FinishReason = Literal["stop", "length", "abort"]
Finish = Annotated[
    FinishReason,
    Field(
        description="`stop`: the end token or a stop; `length`: max_tokens; `abort`: it was "
        "cancelled over its WebSocket."
    ),
]
Unfinished = Annotated[
    FinishReason | None, Field(description="Null until the choice ends; then why it did.")
]


class CompletionLogprobs(Part):
    """Log probabilities, token by token; those of a prompt's first token are null."""

    tokens: list[str] = Field(description="As text; a part of a character is `bytes:\\x..`.")
    token_logprobs: list[float | None] = Field(description="Of each of them.")
    top_logprobs: list[dict[str, float | None] | None] = Field(
        description="At each place the likeliest tokens, and the one that was chosen."
    )
    text_offset: list[Count] = Field(description="Where each begins, in characters.")


class CompletionChoice(Part):
    """A continuation of a prompt."""

    index: Index
    text: str = Field(description="What was generated; with echo the prompt before it.")
    logprobs: CompletionLogprobs | None = Field(description="Null unless they were asked for.")
    finish_reason: Finish


class Completion(Generated):
    """Continuations of prompts."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice] = Field(description="In the order of their prompts.")
    usage: Usage = Field(description="What the request took.")


class CompletionDelta(CompletionChoice):
    """What is new in a choice."""

    finish_reason: Unfinished  # type: ignore[assignment]  # null until the choice ends


class CompletionChunk(Generated):
    """An event of a stream."""

    object: Literal["text_completion"]
    choices: list[CompletionDelta] = Field(description="What is new; empty beside the usage.")
    usage: Usage | None = Field(None, description="With stream_options.include_usage.")


class Alternative(Part):
    """A token that was likely at its place."""

    token: str = Field(description="As text; a part of a character is `bytes:\\x..`.")
    logprob: float = Field(description="Its log probability, before temperature.")
    bytes: list[Annotated[int, Field(ge=0, le=255)]] = Field(description="Of its text in UTF-8.")


class ChatToken(Alternative):
    """A token of an answer."""

    top_logprobs: list[Alternative] = Field(description="So many as were asked for.")


class ChatLogprobs(Part):
    """Log probabilities, token by token."""

    content: list[ChatToken] = Field(description="In their order.")
    refusal: Null


class AnswerMessage(Part):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str = Field(description="The text.")
    refusal: Null


class ChatChoice(Part):
    """A next message."""

    index: Index
    message: AnswerMessage = Field(description="What the model says.")
    logprobs: ChatLogprobs | None = Field(description="Null unless they were asked for.")
    finish_reason: Finish


class ChatCompletion(Generated):
    """Next messages of a conversation."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice] = Field(description="So many as `n` asked for.")
    usage: Usage = Field(description="What the request took.")


class MessageDelta(Part):
    """What is new in a message; the role comes once, first."""

    role: Literal["assistant"] = "assistant"
    content: str = Field("", description="The text that follows what came before.")


class ChatDelta(Part):
    """What is new in a choice."""

    index: Index
    delta: MessageDelta = Field(description="Empty where the choice ends.")
    logprobs: ChatLogprobs | None = Field(description="Null unless they were asked for.")
    finish_reason: Unfinished


class ChatCompletionChunk(Generated):
    """An event of a stream."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatDelta] = Field(description="What is new; empty beside the usage.")
    usage: Usage | None = Field(None, description="With stream_options.include_usage.")


class Embedding(Part):
    """The vector of an input."""

    object: Literal["embedding"]
    embedding: list[float] | str = Field(
        description="Numbers, or the base64 of little-endian 32-bit floats."
    )
    index: Count = Field(description="Which input it is of, from 0.")


class EmbeddingUsage(Part):
    """Tokens of a request."""

    prompt_tokens: Count = Field(description="Tokens that were embedded.")
    total_tokens: Count = Field(description="The same number.")


class EmbeddingList(Answered):
    """Vectors, in the order of the inputs."""

    object: Literal["list"]
    data: list[Embedding] = Field(description="One for each input.")
    model: str = Field(description="The name that was asked for.")
    usage: EmbeddingUsage = Field(description="What the request took.")


class TokenList(Answered):
    """The tokens of a text or a conversation."""

    count: Count = Field(description="How many there are.")
    max_model_len: Count = Field(description="Most tokens that the model reads, or context.")
    tokens: list[Count] = Field(description="Their ids.")
    token_strs: list[str] | None = Field(description="Null unless they were asked for.")


class Detokenized(Answered):
    """A text."""

    prompt: str = Field(description="Special tokens written out.")
