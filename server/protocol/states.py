"""What the server says of itself, its models and its failures, for the API's description."""

from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from inferneo_jax import EngineStats
from server.keys import Scope
from server.protocol.answers import Count, Part


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
    ]
    param: str | None = Field(description="The path of the field at fault.")
    code: str | None = Field(description="What programs may tell errors apart by.")


class Error(Part):
    """Every error has this body."""

    error: ErrorDetails


class KeyLimits(Part):
    """Of a key; null is without limit."""

    requests: int | None = Field(description="A minute.")
    tokens: int | None = Field(description="A minute.")
    day_requests: int | None = Field(description="A day of UTC.")
    concurrent: int | None = Field(description="At once.")


class KeyCard(Part):
    """The caller's key, without its secret."""

    id: str
    name: str
    limits: KeyLimits


class UsageTotal(Part):
    """What was used."""

    requests: Count
    prompt_tokens: Count
    completion_tokens: Count
    cached_tokens: Count


class UsageRow(UsageTotal):
    """What was used of a model on a day of UTC."""

    date: str
    model: str


class KeyUsage(Part):
    """What the caller's key has used."""

    object: Literal["usage"]
    key: KeyCard
    data: list[UsageRow]
    total: UsageTotal


class KeyUsageRow(UsageRow):
    """What a key has used of a model on a day of UTC."""

    key: str = Field(description="Its id.")
    name: str


class AllUsage(Part):
    """What all keys have used."""

    object: Literal["usage"]
    data: list[KeyUsageRow]
    total: UsageTotal


class KeyState(Part):
    """A key, without its secret; times are in seconds since 1970, null: never."""

    object: Literal["key"]
    id: str
    name: str
    state: Literal["active", "expired", "revoked"]
    scopes: list[Scope]
    models: list[str] = Field(description="That it may use; empty: all.")
    limits: KeyLimits
    created: int
    expires: int | None
    revoked: int | None


class KeyUse(Part):
    """What a key uses now of each of its limits, requests under way included."""

    requests: Count = Field(description="In the last sixty seconds.")
    tokens: Count = Field(description="In the last sixty seconds, those reserved included.")
    day_requests: Count = Field(description="Of this day of UTC.")
    concurrent: Count = Field(description="At once.")


class KeyStanding(KeyState):
    """A key, without its secret, and how it stands."""

    used: KeyUse


class NewKey(KeyState):
    """A key and its text, which cannot be had again."""

    key: str


class KeyList(Part):
    """All keys, oldest first."""

    object: Literal["list"]
    data: list[KeyStanding]


class SocketTicket(Part):
    """A ticket that opens one WebSocket, as `?token=`."""

    object: Literal["ws_ticket"]
    ticket: str
    expires_in: int = Field(description="In seconds.")


class ModelCard(Part):
    """A model."""

    id: str
    object: Literal["model"]
    created: int = Field(description="When its checkpoint was made, in seconds since 1970.")
    owned_by: Literal["inferneo"]


class ModelList(Part):
    """The models served."""

    object: Literal["list"]
    data: list[ModelCard]


class ModelDetails(ModelCard):
    """A model; ``id`` is the name that was asked for, ``root`` the model's own."""

    permission: Annotated[list[Any], Field(max_length=0)]
    root: str
    parent: None


class Version(Part):
    """The server's version."""

    version: str


class Health(Part):
    """The process answers."""

    status: Literal["ok"]


_STATS: dict[str, Any] = {
    field.name: (bool if field.name == "ready" else int, ...) for field in fields(EngineStats)
}


class _LanguageModelState(Part):
    """What a language model can hold, and what it holds now; lengths are in tokens."""

    id: str
    kind: Literal["decoder"]
    max_len: Count
    kv_tokens: Count = Field(description="Tokens that the KV cache holds.")


LanguageModelState = create_model(
    "LanguageModelState",
    __base__=_LanguageModelState,
    __doc__=_LanguageModelState.__doc__,
    **_STATS,
)


class EmbeddingModelState(Part):
    """What an embedding model reads, in tokens, and gives."""

    id: str
    kind: Literal["encoder"]
    max_tokens: Count
    dimensions: Count


ModelState = LanguageModelState | EmbeddingModelState


class Ready(Part):
    """Every model is loaded and compiled."""

    status: Literal["ready"]
    compiles_after_ready: Count = Field(description="Stays 0, or something is wrong.")
    models: list[ModelState]  # type: ignore[valid-type]


class Progress(Part):
    """How far a model's loading is."""

    id: str
    stage: str
    done: Count
    total: Count


class Unready(Part):
    """Models are being loaded, the server shuts down, or an engine has failed."""

    error: ErrorDetails
    status: Literal["loading", "draining", "failed"]
    models: list[Progress | ModelState]  # type: ignore[valid-type]


class Document(BaseModel):
    """This description."""

    model_config = ConfigDict(extra="allow", strict=True)

    openapi: Literal["3.1.0"]
    info: dict[str, Any]
    paths: dict[str, Any]
    components: dict[str, Any]
