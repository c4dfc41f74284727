"""``GET /v1/models`` and ``GET /v1/models/{id}``."""

from typing import TYPE_CHECKING, Any

from quart import Blueprint, Response

from server.http.codec import json_response
from server.http.connection import current_request
from server.services import Services

if TYPE_CHECKING:
    from server.models.sources import Model


def add_routes(blueprint: Blueprint, services: Services) -> None:
    """The list of models, and each by its id or alias."""

    @blueprint.get("/models")
    async def list_models() -> Response:
        caller = current_request().caller
        mine = [
            m for m in services.registry.models() if services.guard.allows_model(caller, m.name)
        ]
        models = [_card(model, model.name) for model in mine]
        return json_response({"object": "list", "data": models})

    @blueprint.get("/models/<path:model_id>")
    async def get_model(model_id: str) -> Response:
        model = services.registry.get(model_id, current_request().caller)
        card = _card(model, model_id)
        return json_response(card | {"permission": [], "root": model.name, "parent": None})


def _card(model: "Model", name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": model.created, "owned_by": "inferneo"}
