"""``/tokenize`` and ``/detokenize`` undo each other; ``/version`` says the version."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis.strategies import characters, text

from inferneo_jax import Tokenizer, __version__
from tests.support.fake_server import CHAT, EMBED, TEMPLATE, Rig

HI = [{"role": "user", "content": "Hi"}]


@given(text(characters(exclude_categories=["Cs"])))
def test_detokenizing_undoes_tokenizing(shared_rig: Rig, written: str) -> None:
    answer = shared_rig.post("/tokenize", {"prompt": written, "add_special_tokens": False}).json()
    assert answer["count"] == len(answer["tokens"])
    back = shared_rig.post("/detokenize", {"model": CHAT, "tokens": answer["tokens"]})
    assert back.json() == {"prompt": written}


def test_tokens_are_the_ones_that_generation_reads(rig: Rig) -> None:
    body = {"model": CHAT, "prompt": "the END"}
    tokens = rig.post("/tokenize", body).json()
    rig.post("/v1/completions", body)
    assert tokens["tokens"] == list(rig.engine.submitted[0].prompt)
    assert tokens["max_model_len"] == rig.engine.max_len
    body = {"model": CHAT, "messages": HI}
    tokens = rig.post("/tokenize", body).json()
    rig.post("/v1/chat/completions", body)
    assert tokens["tokens"] == list(rig.engine.submitted[1].prompt)


def test_tokens_are_spelled_as_the_vocabulary_does(rig: Rig) -> None:
    body = {"prompt": "the \u00e9<|end|>", "add_special_tokens": False}
    assert rig.post("/tokenize", body).json()["token_strs"] is None
    answer = rig.post("/tokenize", body | {"return_token_strs": True}).json()
    assert answer["token_strs"] == ["the", "\u0120", "\u00c3", "\u00a9", "<|end|>"]


def test_a_long_text_has_all_its_tokens(rig: Rig) -> None:
    body = {"prompt": "the" * 5000, "add_special_tokens": False, "return_token_strs": True}
    answer = rig.post("/tokenize", body).json()
    assert answer["count"] == len(answer["tokens"]) == 5000
    assert set(answer["token_strs"]) == {"the"}


def test_special_tokens_are_written_out(rig: Rig, tokenizer: Tokenizer) -> None:
    (end,) = tokenizer.eos_token_ids
    assert rig.post("/detokenize", {"tokens": [end]}).json() == {"prompt": "<|end|>"}
    assert rig.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}


def test_an_embedding_model_has_tokens_too(rig: Rig) -> None:
    answer = rig.post("/tokenize", {"model": EMBED, "prompt": "the"}).json()
    assert (answer["count"], answer["max_model_len"]) == (1, 32)


@pytest.mark.parametrize(
    ("changes", "ending"),
    [
        ({}, "<|start|>assistant\n"),
        ({"add_generation_prompt": False}, "<|end|>\n"),
        ({"continue_final_message": True}, "Hi"),
    ],
)
def test_a_conversation_is_written_by_the_template(
    rig: Rig, changes: dict[str, Any], ending: str
) -> None:
    assert "<|start|>" in TEMPLATE
    messages = [{"role": "assistant", "content": "Hi"}]
    tokens = rig.post("/tokenize", {"messages": messages, **changes}).json()["tokens"]
    written = rig.post("/detokenize", {"tokens": tokens}).json()["prompt"]
    assert written.startswith("<|start|>assistant\nHi")
    assert written.endswith(ending)


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HI}, 400, "prompt"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"prompt": "a", "model": "none"}, 404, "model"),
        ("/tokenize", {"prompt": "a", "return_token_strs": 1}, 400, "return_token_strs"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": "a"}, 400, "tokens"),
        ("/detokenize", {"tokens": [1, True]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": [2**31]}, 400, "tokens"),
        ("/detokenize", {"tokens": [5000]}, 400, "tokens"),
        ("/v1/completions", {"model": CHAT, "prompt": [-1], "echo": True}, 400, "prompt"),
        ("/v1/embeddings", {"model": EMBED, "input": [[2**40]]}, 400, "input"),
    ],
)
def test_what_is_wrong_is_named(
    rig: Rig, path: str, body: dict[str, Any], status: int, param: str
) -> None:
    response = rig.post(path, body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


def test_an_unknown_parameter_is_named_in_a_warning(rig: Rig) -> None:
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        answer = rig.post(path, body | {"content": "a"})
        assert answer.json()["warnings"] == [
            "content is not a parameter of this endpoint; ignored."
        ]
        strict = rig.post(path, body | {"content": "a"}, headers={"X-Inferneo-Strict": "true"})
        assert strict.status_code == 400
    kwargs = {"messages": HI, "chat_template_kwargs": {"none": 1}}
    (warning,) = rig.post("/tokenize", kwargs).json()["warnings"]
    assert warning.startswith("chat_template_kwargs.none is not a variable")


def test_the_version_is_the_packages(rig: Rig) -> None:
    assert rig.client.get("/version").json() == {"version": __version__}


@pytest.mark.parametrize("path", ["/v1//models", "/v1/models//", "//v1//models/x"])
def test_a_path_with_doubled_slashes_is_not_found(rig: Rig, path: str) -> None:
    response = rig.client.get(rig.url + path)
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "invalid_request_error"
