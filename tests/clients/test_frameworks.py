"""LangChain, LlamaIndex and LiteLLM: all that their pages promise, on the fake engine."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from inferneo_jax import Tokenizer
from server.keys.key import Limits
from tests.support.fake_server import REPLY, Rig
from tests.support.keyed_server import KeyRig, key_rig
from tests.support.programs import FRAMEWORKS, framework_python, run

BEGINNING = REPLY[: REPLY.index("END")]
VECTOR = 8
LIMITS = Limits(requests=1, tokens=None, day_requests=None)


@pytest.fixture(scope="module")
def limited(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KeyRig]:
    location = str(tmp_path_factory.mktemp("keys") / "keys.db")
    with key_rig(tokenizer, location, require_key="true") as found:
        yield found


@pytest.fixture
def use(rig: Rig, limited: KeyRig) -> Callable[[str], dict[str, Any]]:
    """Run the script of a framework; what it found."""

    def run_script(name: str) -> dict[str, Any]:
        _, key = limited.key(LIMITS)
        python, script = framework_python(), FRAMEWORKS / f"use_{name}.py"
        printed = run([python, str(script), f"{rig.url}/v1", f"{limited.url}/v1", key])
        assert 3 in {request.sampling.top_k for request in rig.engine.submitted}
        return dict(json.loads(printed.splitlines()[-1]))

    return run_script


def _check_texts(found: dict[str, Any], *names: str) -> None:
    for name in ("plain", "streamed", "awaited", "extra", *names):
        assert found.pop(name) == REPLY, name
    assert found.pop("stopped") == BEGINNING
    assert set(found.pop("logprobs")) == {2}
    assert found.pop("vectors") == [VECTOR, VECTOR]
    assert found.pop("right_key") == []


def test_langchain(use: Callable[[str], dict[str, Any]]) -> None:
    found = use("langchain")
    _check_texts(found, "strict")
    assert found.pop("batch") == [REPLY] * 3
    assert found.pop("finish_reason") == "length"
    assert found.pop("vector") == VECTOR
    usage = found.pop("usage")
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"] > 0
    assert "ContextOverflowError" in found["too_long"]
    assert "BadRequestError" in found.pop("too_long")
    assert "NotFoundError" in found.pop("no_model")
    assert "AuthenticationError" in found.pop("wrong_key")
    assert "RateLimitError" in found.pop("limited")
    assert "BadRequestError" in found.pop("tools")
    assert not found


def test_llamaindex(use: Callable[[str], dict[str, Any]]) -> None:
    found = use("llamaindex")
    _check_texts(found, "bare", "bare_streamed")
    assert found.pop("usage") > 0
    assert found.pop("retrieved") == ["xyz"]
    assert "BadRequestError" in found.pop("too_long")
    assert "NotFoundError" in found.pop("no_model")
    assert "AuthenticationError" in found.pop("wrong_key")
    assert "RateLimitError" in found.pop("limited")
    assert not found


def test_litellm(use: Callable[[str], dict[str, Any]]) -> None:
    found = use("litellm")
    _check_texts(found, "bare")
    assert found.pop("usage") > 0
    assert found.pop("finish_reason") == "length"
    assert found.pop("too_long")[0] == "ContextWindowExceededError"
    assert found.pop("no_model")[0] == "NotFoundError"
    assert found.pop("wrong")[0] == "BadRequestError"
    assert found.pop("wrong_key")[0] == "AuthenticationError"
    assert found.pop("limited")[0] == "RateLimitError"
    assert not found
