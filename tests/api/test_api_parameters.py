"""A parameter that is wrong is named, with its bound."""

from typing import Any

import pytest

from inferneo_jax import RequestError
from server.api.openai.generation import MAX_LOGPROBS
from server.prompt.prompts import MAX_SCORES
from tests.support.asking import CHATS, COMPLETIONS, HI, error_of
from tests.support.fake_server import CHAT, Rig

PART = {"type": "text", "text": "a"}


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"temperature": 2.5}, "temperature", ["2.5", "at most 2"]),
        ({"temperature": -0.1}, "temperature", ["-0.1", "at least 0"]),
        ({"temperature": "hot"}, "temperature", ["'hot'", "a number"]),
        ({"temperature": True}, "temperature", ["true", "a number"]),
        ({"top_p": 0}, "top_p", ["above 0"]),
        ({"top_p": 1.01}, "top_p", ["at most 1"]),
        ({"top_k": -2}, "top_k", ["at least -1"]),
        ({"top_k": 1.5}, "top_k", ["an integer"]),
        ({"min_p": 1.5}, "min_p", ["at most 1"]),
        ({"frequency_penalty": 3}, "frequency_penalty", ["at most 2"]),
        ({"presence_penalty": -3}, "presence_penalty", ["at least -2"]),
        ({"repetition_penalty": 0}, "repetition_penalty", ["above 0"]),
        ({"max_tokens": -1}, "max_tokens", ["at least 0"]),
        ({"max_tokens": 0}, "max_tokens", ["at least 1"]),
        ({"max_tokens": "5"}, "max_tokens", ["'5'", "an integer"]),
        ({"stop": ["a", "b" * 1025]}, "stop", ["1025", "at most 1024"]),
        ({"n": 0}, "n", ["at least 1"]),
        ({"n": 1000}, "n", ["at most 256"]),
        ({"prompt": ["a"] * 200, "n": 2}, "prompt", ["200", "256"]),
        ({"best_of": 1, "n": 2}, "best_of", ["at least n"]),
        ({"best_of": 2, "stream": True}, "best_of", ["stream"]),
        ({"logprobs": 21}, "logprobs", ["at most 20"]),
        ({"logprobs": True}, "logprobs", ["true", "an integer"]),
        ({"stop": 5}, "stop", ["a string or a list"]),
        ({"stop": [""]}, "stop", ["empty string"]),
        ({"stop": ["a"] * 17}, "stop", ["17", "16"]),
        ({"stop_token_ids": ["a"]}, "stop_token_ids[0]", ["an integer"]),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens", ["at most max_tokens, 5"]),
        ({"seed": 2**64}, "seed", ["an integer"]),
        ({"seed": -(2**63) - 1}, "seed", ["an integer"]),
        ({"logit_bias": {"1": 101}}, "logit_bias", ["from -100 to 100", "101"]),
        ({"logit_bias": {"x": 1}}, "logit_bias", ["'x'", "token ids"]),
        ({"logit_bias": {"1": "2"}}, "logit_bias", ["a number"]),
        ({"logit_bias": [1]}, "logit_bias", ["an object"]),
        ({"stream": "yes"}, "stream", ["true or false"]),
        ({"stream_options": {"include_usage": True}}, "stream_options", ["stream"]),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
            ["include_usage"],
        ),
        ({"stream": True, "stream_options": []}, "stream_options", ["an object"]),
        ({"prompt": 5}, "prompt", ["an integer", "a string"]),
        ({"prompt": []}, "prompt", ["an empty list"]),
        ({"prompt": [[]]}, "prompt", ["an empty list"]),
        ({"prompt": ["a", 1]}, "prompt", ["mixed"]),
        ({"prompt": [1, True]}, "prompt", ["mixed"]),
        ({"prompt": [1.0]}, "prompt", ["mixed"]),
        ({"prompt": None}, "prompt", ["required"]),
        ({"model": None}, "model", ["required"]),
        ({"model": 5}, "model", ["a string"]),
        ({"user": 5}, "user", ["a string"]),
        ({"metadata": 5}, "metadata", ["an object"]),
        ({"service_tier": 5}, "service_tier", ["a string"]),
        ({"priority": 2**31}, "priority", ["below"]),
    ],
)
def test_a_wrong_parameter_is_named_with_its_bound(
    rig: Rig, changes: dict[str, Any], param: str, words: list[str]
) -> None:
    response = rig.post(COMPLETIONS, {"model": CHAT, "prompt": "Hi", **changes})
    error = error_of(response)
    assert response.status_code == 400
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert error["message"].startswith(param)
    for word in words:
        assert word in error["message"]


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"messages": []}, "messages", ["at least one"]),
        ({"messages": "Hi"}, "messages", ["a string", "a list"]),
        ({"messages": None}, "messages", ["required"]),
        ({"messages": ["Hi"]}, "messages[0]", ["an object"]),
        ({"messages": [{"content": "Hi"}]}, "messages[0].role", ["one of"]),
        ({"messages": [*HI, {"role": "boss", "content": ""}]}, "messages[1].role", ["'boss'"]),
        ({"messages": [{"role": "user"}]}, "messages[0].content", ["null", "a string"]),
        (
            {"messages": [{"role": "assistant", "tool_calls": "f"}]},
            "messages[0].tool_calls",
            ["a string", "a list of objects"],
        ),
        *(
            (
                {"messages": [{"role": "user", "content": [PART, {"type": kind, kind: {}}]}]},
                "messages[0].content[1]",
                [f"'{kind}'", "text only"],
            )
            for kind in ("image_url", "input_audio", "file")
        ),
        ({"logprobs": 3}, "logprobs", ["true or false"]),
        ({"top_logprobs": 3}, "top_logprobs", ["logprobs"]),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", ["at most 20"]),
        ({"max_tokens": 0}, "max_tokens", ["at least 1"]),
        ({"continue_final_message": True}, "continue_final_message", ["assistant"]),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
            ["exclude"],
        ),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", ["messages"]),
    ],
)
def test_a_wrong_chat_parameter_is_named(
    rig: Rig, changes: dict[str, Any], param: str, words: list[str]
) -> None:
    response = rig.post(CHATS, {"model": CHAT, "messages": HI, **changes})
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, param)
    for word in words:
        assert word in error["message"]


CONVERSATION = {"model": CHAT, "messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        ("/v1/completions", {"model": CHAT, "prompt": "Hi", "logprobs": 20}, "logprobs"),
        (
            "/v1/completions",
            {"model": CHAT, "prompt": "x" * 400, "logprobs": 20, "echo": True, "stream": True},
            "logprobs",
        ),
        (
            "/v1/completions",
            {"model": CHAT, "prompt": ["x" * 400] * 128, "logprobs": 20, "echo": True, "n": 2},
            "logprobs",
        ),
        (
            "/v1/completions",
            {"model": CHAT, "prompt": "Hi", "logprobs": 20, "n": 1, "best_of": 256},
            "logprobs",
        ),
        (
            "/v1/chat/completions",
            CONVERSATION | {"logprobs": True, "top_logprobs": 20},
            "top_logprobs",
        ),
    ],
)
def test_more_log_probabilities_than_memory_is_for_are_refused(
    rig: Rig, path: str, body: dict[str, Any], name: str
) -> None:
    changes = {"max_tokens": 1} if body.get("echo") else {"max_tokens": 400}
    answer = rig.post(path, {"n": 256} | body | changes)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == name
    for part in (f"{name} asks for 21", str(MAX_SCORES), f"Lower {name}, n or"):
        assert part in error["message"]
    assert not rig.engine.submitted


@pytest.mark.parametrize(
    "changes", [{"top_logprobs": 19}, {"stream": True}, {"n": 248}, {"logprobs": False}]
)
def test_as_many_as_memory_is_for_are_served(rig: Rig, changes: dict[str, Any]) -> None:
    rig.engine.refusal = RequestError("that far", "n")
    scored = {"n": 256, "max_tokens": 400, "logprobs": True, "top_logprobs": 20}
    body = CONVERSATION | scored | changes
    if not body["logprobs"]:
        del body["top_logprobs"]
    answer = rig.post("/v1/chat/completions", body)
    assert answer.json()["error"]["message"] == "That far."


def test_eight_choices_of_a_whole_context_may_be_scored() -> None:
    assert 8 * 8192 * (1 + MAX_LOGPROBS) <= MAX_SCORES
