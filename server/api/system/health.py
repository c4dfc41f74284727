"""``GET /health``: the process answers. ``GET /ready``: it can serve, and with what."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field
from quart import Response
from typing_extensions import TypedDict

from server.api.endpoint import Endpoint, ResponseSpec
from server.http.codec import json_response
from server.http.errors import ApiError, ErrorDetails, shutting_down
from server.http.schema import Count
from server.models.registry import Progress, still_loading
from server.services import Services

if TYPE_CHECKING:
    from inferneo_jax import EngineStats, Model


class Health(TypedDict):
    """The process answers."""

    status: Literal["ok"]


class LanguageModelState(TypedDict):
    """What a language model can hold, and what it holds now; lengths are in tokens."""

    id: Annotated[str, Field(description="The model's own id.")]
    kind: Literal["decoder"]
    max_len: Annotated[
        Count, Field(description="Tokens of the longest request, its answer included.")
    ]
    kv_tokens: Annotated[Count, Field(description="Tokens that the KV cache holds.")]
    ready: Annotated[bool, Field(description="Whether it takes requests.")]
    slots: Annotated[int, Field(description="Sequences that can run at once.")]
    slots_used: Annotated[int, Field(description="Those that are taken.")]
    pages: Annotated[int, Field(description="Pages of the KV cache.")]
    pages_used: Annotated[int, Field(description="Those that sequences hold.")]
    pages_cached: Annotated[
        int, Field(description="Those that none holds, kept for prompts that begin alike.")
    ]
    page_len: Annotated[int, Field(description="Tokens of a page.")]
    running: Annotated[int, Field(description="Sequences that hold a slot.")]
    waiting: Annotated[int, Field(description="Sequences that wait for one.")]
    steps: Annotated[int, Field(description="Steps of the engine, from here on since its start.")]
    compiles_after_ready: Annotated[
        int, Field(description="Programs that were compiled while requests waited.")
    ]
    preemptions: Annotated[
        int, Field(description="Times that a sequence gave up its pages to another.")
    ]
    prompt_tokens: Annotated[int, Field(description="Prompt tokens that were computed.")]
    cached_tokens: Annotated[int, Field(description="Prompt tokens that were found in the cache.")]
    output_tokens: Annotated[int, Field(description="Tokens that were sampled.")]
    drafted_tokens: Annotated[int, Field(description="Tokens that were drafted.")]
    accepted_tokens: Annotated[int, Field(description="Drafted tokens that were sampled, too.")]


class EmbeddingModelState(TypedDict):
    """What an embedding model reads, in tokens, and gives."""

    id: Annotated[str, Field(description="The model's own id.")]
    kind: Literal["encoder"]
    max_tokens: Annotated[Count, Field(description="Tokens of the longest text.")]
    dimensions: Annotated[Count, Field(description="Numbers of a vector.")]


ModelState = LanguageModelState | EmbeddingModelState


class Ready(TypedDict):
    """Every model is loaded and compiled."""

    status: Literal["ready"]
    compiles_after_ready: Annotated[Count, Field(description="Stays 0, or something is wrong.")]
    models: Annotated[
        list[ModelState], Field(description="What each can hold, and what it holds now.")
    ]


class Unready(TypedDict):
    """Models are being loaded, the server shuts down, or an engine has failed."""

    error: Annotated[ErrorDetails, Field(description="What clients are told meanwhile.")]
    status: Annotated[
        Literal["loading", "draining", "failed"], Field(description="Why it is not ready.")
    ]
    models: Annotated[list[Progress] | list[ModelState], Field(description="How far each is.")]


@Endpoint(
    method="GET",
    path="/health",
    access="public",
    tag="server",
    summary="Ask whether the process answers",
    answer=Health,
    traced=False,
    logged=False,
)
async def health(services: Services) -> Health:
    """Answer, and nothing else."""
    return {"status": "ok"}


@Endpoint(
    method="GET",
    path="/ready",
    access="public",
    tag="server",
    summary="Ask whether requests can be served, and how full the server is",
    answer=Ready,
    responses={
        503: ResponseSpec(
            description="Not yet, or not any more.", content={"application/json": Unready}
        )
    },
    traced=False,
    logged=False,
)
async def ready(services: Services) -> Ready | Response:
    """Say how far loading is, or what the models hold."""
    registry = services.registry
    if not registry.loaded:
        return _unready("loading", still_loading(), registry.progress())
    models = [_state(model) for model in registry.models()]
    if reason := registry.job_lost():
        return _failed(f"{reason[:1].upper()}{reason[1:]}.", models)
    if services.admission.closed.is_set():
        return _unready("draining", shutting_down(), models)
    if not registry.ready:
        return _failed("An engine has stopped, failed or does not answer.", models)
    found = [stats for model in registry.models() if (stats := model.stats())]
    compiles = max((stats.compiles_after_ready for stats in found), default=0)
    return {"status": "ready", "compiles_after_ready": compiles, "models": models}


def _unready(
    status: Literal["loading", "draining", "failed"],
    error: ApiError,
    models: list[Progress] | list[ModelState],
) -> Response:
    unready: Unready = {"status": status, "models": models, "error": error.envelope()["error"]}
    return json_response(unready, 503, error.headers)


def _failed(message: str, models: list[ModelState]) -> Response:
    error = ApiError(503, message, kind="server_error", code="engine_failed")
    return _unready("failed", error, models)


def _state(model: "Model") -> ModelState:
    """What a model can hold, and what it holds now."""
    from inferneo_jax import EmbeddingModel  # with jax, which a loaded model has loaded

    if isinstance(model, EmbeddingModel):
        return {
            "id": model.name,
            "kind": "encoder",
            "max_tokens": model.max_len,
            "dimensions": model.embedder.hidden_size,
        }
    stats = model.stats()
    assert stats, "it generates"
    return _generating(model, stats)


def _generating(model: "Model", stats: "EngineStats") -> LanguageModelState:
    return {
        "id": model.name,
        "kind": "decoder",
        "max_len": model.max_len,
        "kv_tokens": stats.pages * stats.page_len,
        "ready": stats.ready,
        "slots": stats.slots,
        "slots_used": stats.slots_used,
        "pages": stats.pages,
        "pages_used": stats.pages_used,
        "pages_cached": stats.pages_cached,
        "page_len": stats.page_len,
        "running": stats.running,
        "waiting": stats.waiting,
        "steps": stats.steps,
        "compiles_after_ready": stats.compiles_after_ready,
        "preemptions": stats.preemptions,
        "prompt_tokens": stats.prompt_tokens,
        "cached_tokens": stats.cached_tokens,
        "output_tokens": stats.output_tokens,
        "drafted_tokens": stats.drafted_tokens,
        "accepted_tokens": stats.accepted_tokens,
    }
