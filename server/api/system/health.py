"""``GET /health``: the process answers. ``GET /ready``: it can serve, and with what."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from quart import Blueprint, Response

from server.http.codec import json_response
from server.http.errors import ApiError, shutting_down
from server.models.registry import still_loading
from server.services import Services

if TYPE_CHECKING:
    from server.models.sources import Model


def blueprint(services: Services) -> Blueprint:
    """Both routes; they never need a key."""
    routes = Blueprint("health", __name__)

    @routes.get("/health")
    async def health() -> Response:
        return json_response({"status": "ok"})

    @routes.get("/ready")
    async def ready() -> Response:
        registry = services.registry
        if not registry.loaded:
            error = still_loading()
            state = {"status": "loading", "models": registry.progress(), **error.envelope()}
            return json_response(state, 503, error.headers)
        models = [_state(model) for model in registry.models()]
        if reason := registry.job_lost():
            return _failed(f"{reason[:1].upper()}{reason[1:]}.", models)
        if services.admission.closed.is_set():
            error = shutting_down()
            state = {"status": "draining", "models": models, **error.envelope()}
            return json_response(state, 503, error.headers)
        if not registry.ready:
            return _failed("An engine has stopped, failed or does not answer.", models)
        compiles = max(model.get("compiles_after_ready", 0) for model in models)
        state = {"status": "ready", "compiles_after_ready": compiles, "models": models}
        return json_response(state)

    return routes


def _failed(message: str, models: list[dict[str, Any]]) -> Response:
    error = ApiError(503, message, kind="server_error", code="engine_failed")
    return json_response({"status": "failed", "models": models, **error.envelope()}, 503)


def _state(model: "Model") -> dict[str, Any]:
    """What a model can hold, and what it holds now; lengths and the KV cache are in tokens."""
    state: dict[str, Any] = {"id": model.name, "kind": model.kind}
    if model.kind == "encoder":
        return state | {"max_tokens": model.max_tokens, "dimensions": model.embedder.hidden_size}
    stats = model.engine.stats()
    return state | {
        "max_len": model.max_len,
        "kv_tokens": stats.pages * stats.page_len,
        **asdict(stats),
    }
