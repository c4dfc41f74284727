"""docs/compatibility.md lists every parameter of OpenAI's client, and is true of each."""

import re
from typing import Any

import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params

from server.api.openapi import document
from server.endpoints import ENDPOINTS
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "compatibility.md"
SECTIONS = {
    "Chat completions": ("/v1/chat/completions", chat_create_params.CompletionCreateParamsBase),
    "Completions": ("/v1/completions", completion_create_params.CompletionCreateParamsBase),
    "Embeddings": ("/v1/embeddings", embedding_create_params.EmbeddingCreateParams),
}

each_endpoint = pytest.mark.parametrize("heading", SECTIONS)


def section(heading: str) -> str:
    text = PAGE.read_text(encoding="utf-8")
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def answers(heading: str) -> dict[str, str]:
    """Each parameter of the table, and what becomes of it."""
    return dict(re.findall(r"^\| `(\w+)` \| ([\w ]+?) \|", section(heading), flags=re.M))


def known(path: str) -> dict[str, Any]:
    """The properties of an endpoint's body, by the API's description."""
    described = document(ENDPOINTS)
    body = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    name = body["schema"]["$ref"].rpartition("/")[2]
    properties: dict[str, Any] = described["components"]["schemas"][name]["properties"]
    return properties


@each_endpoint
def test_every_parameter_of_the_client_is_listed(heading: str) -> None:
    _, params = SECTIONS[heading]
    assert answers(heading).keys() - {"stream"} == params.__annotations__.keys()


@each_endpoint
def test_what_is_said_of_a_parameter_is_true(heading: str) -> None:
    properties = known(SECTIONS[heading][0])
    for name, answer in answers(heading).items():
        words = properties.get(name, {}).get("description", "")
        expected = "ignored" if name not in properties else "supported"
        if "Accepted with a warning" in words or "There is one tier" in words:
            expected = "no effect"
        assert answer == expected, name


@each_endpoint
def test_every_parameter_beyond_the_clients_is_listed(heading: str) -> None:
    beyond = section(heading).partition("Beyond OpenAI's:")[2]
    listed = set(re.findall(r"`(\w+)`", beyond)) | answers(heading).keys()
    if heading == "Completions":
        chat = section("Chat completions").partition("Beyond OpenAI's:")[2]
        listed |= set(re.findall(r"`(\w+)`", chat)[:-4])
    ours = set(known(SECTIONS[heading][0]))
    of_both = {"max_completion_tokens", "metadata", "store", "service_tier"}  # OpenAI's for chat
    assert ours - listed - of_both == set()
