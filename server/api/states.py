"""What the server says of itself, its models and its failures, for the API's description."""

from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from inferneo_jax import EngineStats
from server.api.answers import Count, Null, Part
from server.keys.key import Scope


class ErrorDetails(Part):
    """What went wrong, and what to do about it."""

    message: str = Field(description="A sentence that names the field, its value and its bound.")
    type: Literal[
        "invalid_request_error",
        "server_error",
        "permission_error",
        "authentication_error",
        "rate_limit_exceeded",
        "insufficient_quota",
    ] = Field(description="The kind of error.")
    param: str | None = Field(description="The path of the field at fault.")
    code: str | None = Field(description="What programs may tell errors apart by.")


class Error(Part):
    """Every error has this body."""

    error: ErrorDetails = Field(description="What it is.")


class KeyLimits(Part):
    """Of a key; null is without limit."""

    requests: int | None = Field(description="Requests a minute.")
    tokens: int | None = Field(description="Tokens a minute.")
    day_requests: int | None = Field(description="Requests a day of UTC.")
    concurrent: int | None = Field(description="Requests at once.")


class KeyCard(Part):
    """The caller's key, without its secret."""

    id: str = Field(description="The middle part of its text.")
    name: str = Field(description="What people call it.")
    limits: KeyLimits = Field(description="What it may take.")


class UsageTotal(Part):
    """What was used."""

    requests: Count = Field(description="Requests that were served.")
    prompt_tokens: Count = Field(description="Tokens of their prompts.")
    completion_tokens: Count = Field(description="Tokens that were sampled for them.")
    cached_tokens: Count = Field(description="Of the prompts' tokens, those found in the cache.")


class UsageRow(UsageTotal):
    """What was used of a model on a day of UTC."""

    date: str = Field(description="As 2026-01-31.")
    model: str = Field(description="The model's own id.")


class KeyUsage(Part):
    """What the caller's key has used."""

    object: Literal["usage"]
    key: KeyCard = Field(description="Whose it is.")
    data: list[UsageRow] = Field(description="By day and model.")
    total: UsageTotal = Field(description="Of all of these.")


class KeyUsageRow(UsageRow):
    """What a key has used of a model on a day of UTC."""

    key: str = Field(description="The key's id.")
    name: str = Field(description="The key's name.")


class AllUsage(Part):
    """What all keys have used."""

    object: Literal["usage"]
    data: list[KeyUsageRow] = Field(description="By day, key and model.")
    total: UsageTotal = Field(description="Of all of these.")


class KeyState(Part):
    """A key, without its secret; times are in seconds since 1970, null: never."""

    object: Literal["key"]
    id: str = Field(description="The middle part of its text.")
    name: str = Field(description="What people call it.")
    state: Literal["active", "expired", "revoked"] = Field(description="Only active keys count.")
    scopes: list[Scope] = Field(description="What it may be used for.")
    models: list[str] = Field(description="That it may use; empty: all.")
    limits: KeyLimits = Field(description="What it may take.")
    created: int = Field(description="When it was made.")
    expires: int | None = Field(description="When it ends by itself.")
    revoked: int | None = Field(description="When it was ended.")


class KeyUse(Part):
    """What a key uses now of each of its limits, requests under way included."""

    requests: Count = Field(description="In the last sixty seconds.")
    tokens: Count = Field(description="In the last sixty seconds, those reserved included.")
    day_requests: Count = Field(description="Of this day of UTC.")
    concurrent: Count = Field(description="At once.")


class KeyStanding(KeyState):
    """A key, without its secret, and how it stands."""

    used: KeyUse = Field(description="What it uses of its limits now.")


class NewKey(KeyState):
    """A key and its text, which cannot be had again."""

    key: str = Field(description="The text to send; it is shown this once.")


class KeyList(Part):
    """All keys, oldest first."""

    object: Literal["list"]
    data: list[KeyStanding] = Field(description="Those that have ended, too.")


class SocketTicket(Part):
    """A ticket that opens one WebSocket, as `?token=`."""

    object: Literal["ws_ticket"]
    ticket: str = Field(description="Good for one connection.")
    expires_in: int = Field(description="In seconds.")


class ModelCard(Part):
    """A model."""

    id: str = Field(description="The name to ask for it by.")
    object: Literal["model"]
    created: int = Field(description="When its checkpoint was made, in seconds since 1970.")
    owned_by: Literal["inferneo"]


class ModelList(Part):
    """The models served."""

    object: Literal["list"]
    data: list[ModelCard] = Field(description="Those that the caller's key may use.")


class ModelDetails(ModelCard):
    """A model; ``id`` is the name that was asked for, ``root`` the model's own."""

    permission: Annotated[list[Any], Field(max_length=0, description="Always empty.")]
    root: str = Field(description="Its own id, where `id` is an alias.")
    parent: Null


class Version(Part):
    """The server's version."""

    version: str = Field(description="Such as 0.1.0.")


class Health(Part):
    """The process answers."""

    status: Literal["ok"]


_MEANINGS = {
    "ready": "Whether it takes requests.",
    "slots": "Sequences that can run at once.",
    "slots_used": "Those that are taken.",
    "pages": "Pages of the KV cache.",
    "pages_used": "Those that sequences hold.",
    "pages_cached": "Those that none holds, kept for prompts that begin alike.",
    "page_len": "Tokens of a page.",
    "running": "Sequences that hold a slot.",
    "waiting": "Sequences that wait for one.",
    "steps": "Steps of the engine, from here on since its start.",
    "compiles_after_ready": "Programs that were compiled while requests waited.",
    "preemptions": "Times that a sequence gave up its pages to another.",
    "prompt_tokens": "Prompt tokens that were computed.",
    "cached_tokens": "Prompt tokens that were found in the cache.",
    "output_tokens": "Tokens that were sampled.",
    "drafted_tokens": "Tokens that were drafted.",
    "accepted_tokens": "Drafted tokens that were sampled, too.",
}
_STATS: dict[str, Any] = {
    field.name: (
        bool if field.name == "ready" else int,
        Field(description=_MEANINGS[field.name]),
    )
    for field in fields(EngineStats)
}


class _LanguageModelState(Part):
    """What a language model can hold, and what it holds now; lengths are in tokens."""

    id: str = Field(description="The model's own id.")
    kind: Literal["decoder"]
    max_len: Count = Field(description="Tokens of the longest request, its answer included.")
    kv_tokens: Count = Field(description="Tokens that the KV cache holds.")


LanguageModelState = create_model(
    "LanguageModelState",
    __base__=_LanguageModelState,
    __doc__=_LanguageModelState.__doc__,
    **_STATS,
)


class EmbeddingModelState(Part):
    """What an embedding model reads, in tokens, and gives."""

    id: str = Field(description="The model's own id.")
    kind: Literal["encoder"]
    max_tokens: Count = Field(description="Tokens of the longest text.")
    dimensions: Count = Field(description="Numbers of a vector.")


ModelState = LanguageModelState | EmbeddingModelState


class Ready(Part):
    """Every model is loaded and compiled."""

    status: Literal["ready"]
    compiles_after_ready: Count = Field(description="Stays 0, or something is wrong.")
    models: list[ModelState] = Field(  # type: ignore[valid-type]
        description="What each can hold, and what it holds now."
    )


class Progress(Part):
    """How far a model's loading is."""

    id: str = Field(description="The model's own id.")
    stage: str = Field(description="What is being done.")
    done: Count = Field(description="How much of it is.")
    total: Count = Field(description="How much there is; 0 where that is not known.")


class Unready(Part):
    """Models are being loaded, the server shuts down, or an engine has failed."""

    error: ErrorDetails = Field(description="What clients are told meanwhile.")
    status: Literal["loading", "draining", "failed"] = Field(description="Why it is not ready.")
    models: list[Progress | ModelState] = Field(  # type: ignore[valid-type]
        description="How far each is."
    )


class Document(BaseModel):
    """This description."""

    model_config = ConfigDict(extra="allow", strict=True)

    openapi: Literal["3.1.0"]
    info: dict[str, Any] = Field(description="Name, version and description of the API.")
    paths: dict[str, Any] = Field(description="Its endpoints.")
    components: dict[str, Any] = Field(description="What they share.")
