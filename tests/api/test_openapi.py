"""The description is the API: the same routes, the same models, and a page that shows it."""

import re
from dataclasses import fields
from typing import Any

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator
from pydantic import BaseModel

from inferneo_jax import EngineStats
from server.api.admin.keys import AdminBody, LimitsBody
from server.api.openai.generation import StreamOptions
from server.api.openapi import document
from server.app import create_app
from server.config.settings import Settings
from server.endpoints import ENDPOINTS
from server.models.sources import Loader
from tests.support.asking import error_of
from tests.support.fake_server import Rig

DOCUMENT = document(ENDPOINTS)
BODIES = sorted(
    {model for endpoint in ENDPOINTS for model in endpoint.body} | {StreamOptions, LimitsBody},
    key=lambda model: model.__name__,
)


def no_models(*_: Any) -> Any:
    raise AssertionError("nothing is loaded here")


def routes(*, websocket: bool) -> dict[str, set[str]]:
    """The methods of every path that the application serves, written as OpenAPI does."""
    loader: Loader = no_models
    app = create_app(Settings(models=("any",), log_format="json"), loader)
    found: dict[str, set[str]] = {}
    for rule in app.url_map.iter_rules():
        path = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)
        if rule.websocket == websocket:
            methods = {method.lower() for method in rule.methods or ()}
            found.setdefault(path, set()).update(methods - {"head", "options"})
    return found


def test_every_route_is_described_and_every_path_is_a_route() -> None:
    described = {path: set(methods) for path, methods in DOCUMENT["paths"].items()}
    assert described == routes(websocket=False)


def test_every_websocket_is_described_in_words() -> None:
    sockets = routes(websocket=True)
    assert len(sockets) == 2
    for path in sockets:
        assert f"`{path}`" in DOCUMENT["info"]["description"]
        assert "WebSocket" in DOCUMENT["paths"][path]["post"]["description"]


def test_the_description_is_valid_openapi() -> None:
    OpenAPIV31SpecValidator(DOCUMENT).validate()


@pytest.mark.parametrize("model", BODIES, ids=lambda model: model.__name__)
def test_every_parameter_is_described_with_its_bounds_and_default(model: type[BaseModel]) -> None:
    schema = DOCUMENT["components"]["schemas"][model.__name__]
    assert schema["properties"].keys() == model.model_fields.keys()
    assert schema["additionalProperties"] is not issubclass(model, AdminBody)
    for name, field in model.model_fields.items():
        described = schema["properties"][name]
        assert len(described["description"]) > 10, name
        required = name in schema.get("required", ())
        assert required == field.is_required()
        options = described.get("anyOf", [described])
        assert ({"type": "null"} in options) != required, name
        if not required:
            assert described["default"] == field.get_default(call_default_factory=True)
        bounds = {
            "ge": "minimum",
            "gt": "exclusiveMinimum",
            "le": "maximum",
            "lt": "exclusiveMaximum",
            "max_length": "maxLength",
        }
        for constraint in field.metadata:
            for short, long in bounds.items():
                if (bound := getattr(constraint, short, None)) is not None:
                    listed = short == "max_length" and options[0]["type"] == "array"
                    assert options[0]["maxItems" if listed else long] == bound, name


def test_every_field_of_an_answer_is_described() -> None:
    for name, schema in DOCUMENT["components"]["schemas"].items():
        assert schema["description"], name
        for field, described in schema["properties"].items():
            assert "const" in described or len(described["description"]) > 6, f"{name}.{field}"


def test_ready_tells_all_that_an_engine_counts() -> None:
    counted = {field.name for field in fields(EngineStats)}
    assert counted <= DOCUMENT["components"]["schemas"]["LanguageModelState"]["properties"].keys()


def test_every_operation_has_an_envelope_for_its_errors() -> None:
    operations = [each for path in DOCUMENT["paths"].values() for each in path.values()]
    assert len(operations) == len(ENDPOINTS)
    for operation in operations:
        assert len(operation["summary"]) > 10
        for parameter in operation["parameters"]:
            assert "$ref" in parameter or len(parameter["description"]) > 5
        responses = operation["responses"]
        assert "500" in responses
        for status, response in responses.items():
            assert "X-Request-Id" in response["headers"]
            if int(status) >= 400:
                (media,) = response["content"].values()
                name = media["schema"]["$ref"].rsplit("/", 1)[1]
                model = DOCUMENT["components"]["schemas"][name]
                assert "error" in model["required"]


def test_the_examples_are_valid_requests() -> None:
    posts = [endpoint for endpoint in ENDPOINTS if endpoint.body]
    assert posts
    for endpoint in posts:
        body = endpoint.body[0].model_validate(endpoint.example)
        assert body.unknown() == []  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/embeddings", "/v1/models", "/health", "/docs"]
)
def test_options_names_the_methods_that_are_described(rig: Rig, path: str) -> None:
    responses = [rig.client.options(path), rig.client.patch(path)]
    assert [response.status_code for response in responses] == [200, 405]
    for response in responses:
        assert response.request.method == "OPTIONS" or (
            error_of(response)["code"] == "method_not_allowed"
        )
        allowed = set(response.headers["Allow"].lower().split(", "))
        assert allowed - {"head", "options"} == DOCUMENT["paths"][path].keys()


def test_the_description_is_served(rig: Rig) -> None:
    response = rig.client.get("/openapi.json")
    assert response.headers["content-type"] == "application/json"
    assert response.json() == DOCUMENT


def test_no_other_file_is_served(rig: Rig) -> None:
    for name in ("index.html", "../__init__.py", "..%2f__init__.py", "swagger-ui.js"):
        assert rig.client.get(f"/docs/{name}").status_code == 404
