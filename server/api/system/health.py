"""``GET /health``: the process is alive. ``GET /ready``: it can serve requests, with its load."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field
from quart import Response
from typing_extensions import TypedDict

from server.api.endpoint import Endpoint, ResponseSpec
from server.http.codec import json_response
from server.http.errors import ApiError, ErrorDetails, shutting_down
from server.http.schema import Count
from server.models.registry import Progress, still_loading
from server.run.context import Context
from server.services import Services

if TYPE_CHECKING:
    from inferneo_jax import EngineStats, Model


class Health(TypedDict):
    """The process is alive."""

    status: Literal["ok"]


class LanguageModelState(TypedDict):
    """The capacity and the current load of a language model; lengths are in tokens."""

    id: Annotated[str, Field(description="The model's own id.")]
    kind: Literal["decoder"]
    max_len: Annotated[
        Count, Field(description="The maximum length of a request, including its answer.")
    ]
    kv_tokens: Annotated[Count, Field(description="The number of tokens that fit in the KV cache.")]
    ready: Annotated[bool, Field(description="Whether the model accepts requests.")]
    slots: Annotated[int, Field(description="The maximum number of sequences that run at once.")]
    slots_used: Annotated[int, Field(description="The number of slots in use.")]
    pages: Annotated[int, Field(description="The number of pages in the KV cache.")]
    pages_used: Annotated[int, Field(description="The number of pages that sequences use.")]
    pages_cached: Annotated[
        int,
        Field(
            description="The number of pages that no sequence uses, kept for prompts with the "
            "same prefix."
        ),
    ]
    page_len: Annotated[int, Field(description="The number of tokens in a page.")]
    running: Annotated[int, Field(description="The number of sequences that hold a slot.")]
    waiting: Annotated[int, Field(description="The number of sequences that wait for a slot.")]
    itl_budget: Annotated[
        float, Field(description="The seconds by which prefill may delay the tokens of a stream.")
    ]
    prefill_allowance: Annotated[
        int,
        Field(
            description="The most prompt tokens that a step computes now while streams wait for "
            "its tokens."
        ),
    ]
    steps: Annotated[
        int,
        Field(
            description="The number of engine steps since the engine started; the counters "
            "below also count from then."
        ),
    ]
    compiles_after_ready: Annotated[
        int,
        Field(
            description="The number of programs compiled since the server became ready; should "
            "be 0."
        ),
    ]
    preemptions: Annotated[
        int,
        Field(description="How often a sequence lost its pages to another one and was recomputed."),
    ]
    prompt_tokens: Annotated[int, Field(description="The number of prompt tokens computed.")]
    cached_tokens: Annotated[
        int, Field(description="The number of prompt tokens found in the prefix cache.")
    ]
    output_tokens: Annotated[int, Field(description="The number of tokens sampled.")]
    drafted_tokens: Annotated[
        int, Field(description="The number of tokens drafted by speculative decoding.")
    ]
    accepted_tokens: Annotated[
        int, Field(description="The number of drafted tokens that were accepted.")
    ]
    model_drafted_tokens: Annotated[
        int, Field(description="The part of `drafted_tokens` that the draft model drafted.")
    ]
    model_accepted_tokens: Annotated[
        int, Field(description="The part of `accepted_tokens` that the draft model drafted.")
    ]


class EmbeddingModelState(TypedDict):
    """The limits of an embedding model."""

    id: Annotated[str, Field(description="The model's own id.")]
    kind: Literal["encoder"]
    max_tokens: Annotated[Count, Field(description="The maximum length of a text, in tokens.")]
    dimensions: Annotated[Count, Field(description="The number of components of a vector.")]


ModelState = LanguageModelState | EmbeddingModelState


class Ready(TypedDict):
    """Every model is loaded and compiled."""

    status: Literal["ready"]
    compiles_after_ready: Annotated[
        Count, Field(description="The maximum over all models; any value but 0 is a fault.")
    ]
    models: Annotated[
        list[ModelState], Field(description="The capacity and the load of each model.")
    ]


class Unready(TypedDict):
    """Models are loading, the server is shutting down, or an engine has failed."""

    error: Annotated[
        ErrorDetails, Field(description="The error that requests get in the meantime.")
    ]
    status: Annotated[
        Literal["loading", "draining", "failed"], Field(description="Why the server is not ready.")
    ]
    models: Annotated[
        list[Progress] | list[ModelState],
        Field(description="The loading progress, or the load, of each model."),
    ]


@Endpoint(
    method="GET",
    path="/health",
    access="public",
    tag="server",
    summary="Check that the process is alive",
    answer=Health,
    traced=False,
    logged=False,
)
async def health(services: Services, context: Context) -> Health:
    """Report that the process is alive."""
    return {"status": "ok"}


@Endpoint(
    method="GET",
    path="/ready",
    access="public",
    tag="server",
    summary="Check whether requests can be served, and the load of the server",
    answer=Ready,
    responses={
        503: ResponseSpec(
            description="The server cannot serve requests yet, or no longer.",
            content={"application/json": Unready},
        )
    },
    traced=False,
    logged=False,
)
async def ready(services: Services, context: Context) -> Ready | Response:
    """Report the loading progress or the load of the models."""
    registry = services.registry
    if not registry.loaded:
        return _unready("loading", still_loading(), registry.progress())
    models = [_state(model) for model in registry.models()]
    if reason := registry.job_lost():
        return _failed(f"{reason[:1].upper()}{reason[1:]}.", models)
    if services.permits.closed.is_set():
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
    """Return the capacity and the load of a model."""
    from inferneo_jax import EmbeddingModel

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
        "itl_budget": stats.itl_budget,
        "prefill_allowance": stats.prefill_allowance,
        "steps": stats.steps,
        "compiles_after_ready": stats.compiles_after_ready,
        "preemptions": stats.preemptions,
        "prompt_tokens": stats.prompt_tokens,
        "cached_tokens": stats.cached_tokens,
        "output_tokens": stats.output_tokens,
        "drafted_tokens": stats.drafted_tokens,
        "accepted_tokens": stats.accepted_tokens,
        "model_drafted_tokens": stats.model_drafted_tokens,
        "model_accepted_tokens": stats.model_accepted_tokens,
    }
