"""``GET /v1/models`` and ``GET /v1/models/{id}``."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from typing_extensions import TypedDict

from server.api.endpoint import Endpoint, Parameter
from server.http.schema import Null
from server.run.context import Context
from server.services import Services

if TYPE_CHECKING:
    from inferneo_jax import Model


class ModelCard(TypedDict):
    """A model."""

    id: Annotated[str, Field(description="The model's id, as requests name it.")]
    object: Literal["model"]
    created: Annotated[
        int, Field(description="When the model's checkpoint was created, in seconds since 1970.")
    ]
    owned_by: Literal["inferneo"]


class ModelList(TypedDict):
    """The models served."""

    object: Literal["list"]
    data: Annotated[list[ModelCard], Field(description="The models that the caller's key may use.")]


class ModelDetails(ModelCard):
    """A model; ``id`` is the requested name, ``root`` the model's own id."""

    permission: Annotated[list[Any], Field(max_length=0, description="Always an empty list.")]
    root: Annotated[str, Field(description="The model's own id, also where `id` is an alias.")]
    parent: Null


@Endpoint(
    method="GET",
    path="/v1/models",
    access="any",
    tag="models",
    summary="List the models served",
    answer=ModelList,
    needs_models=True,
)
async def list_models(services: Services, context: Context) -> ModelList:
    """List the models that the caller may use."""
    caller, guard = context.caller, services.guard
    mine = [m for m in services.registry.models() if guard.allows_model(caller, m.name)]
    return {"object": "list", "data": [_card(model, model.name) for model in mine]}


@Endpoint(
    method="GET",
    path="/v1/models/<path:model_id>",
    access="any",
    tag="models",
    summary="Get a model by its id or alias",
    parameters={
        "model_id": Parameter(
            schema={"type": "string", "minLength": 1},
            description="The id or an alias of a model. Slashes in it may be written as they "
            "are or as %2F.",
        )
    },
    answer=ModelDetails,
    errors=(404,),
    needs_models=True,
)
async def get_model(services: Services, context: Context, model_id: str) -> ModelDetails:
    """Describe a model under the requested name."""
    model = services.registry.get(model_id, context.caller)
    return {**_card(model, model_id), "permission": [], "root": model.name, "parent": None}


def _card(model: "Model", name: str) -> ModelCard:
    return {"id": name, "object": "model", "created": model.created, "owned_by": "inferneo"}
