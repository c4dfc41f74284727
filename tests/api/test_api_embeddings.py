"""``POST /v1/embeddings``."""

import base64
import threading
from concurrent.futures import Future
from typing import Any

import httpx
import numpy as np
import pytest

from inferneo_jax import Tokenizer
from tests.support.fake_server import EMBED, Rig

PATH = "/v1/embeddings"


def answer(rig: Rig, **changes: Any) -> Any:
    response = rig.post(PATH, {"model": EMBED, "input": "text", **changes})
    assert response.status_code == 200, response.text
    return response.json()


def vectors(got: Any) -> np.ndarray:
    return np.array([item["embedding"] for item in got["data"]], np.float32)


def test_answer_has_the_shape_of_the_page(rig: Rig) -> None:
    got = answer(rig, model="text-embedding-ada-002")
    assert (got["object"], got["model"]) == ("list", "text-embedding-ada-002")
    assert [(item["object"], item["index"]) for item in got["data"]] == [("embedding", 0)]
    assert got["usage"] == {"prompt_tokens": 4, "total_tokens": 4}


def test_inputs_of_every_form_give_the_same_vectors(rig: Rig, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("text")
    expected = vectors(answer(rig))
    for value in (["text"], ids, [ids]):
        assert np.array_equal(vectors(answer(rig, input=value)), expected)
    both = answer(rig, input=["text", "other"])
    assert [item["index"] for item in both["data"]] == [0, 1]
    assert both["usage"]["prompt_tokens"] == 4 + len(tokenizer.encode("other"))


def test_base64_holds_the_same_floats(rig: Rig) -> None:
    expected = vectors(answer(rig))[0]
    encoded = answer(rig, encoding_format="base64")["data"][0]["embedding"]
    assert np.array_equal(np.frombuffer(base64.b64decode(encoded), "<f4"), expected)


def test_fewer_dimensions_are_the_first_ones_of_length_one(rig: Rig) -> None:
    whole, cut = vectors(answer(rig))[0], vectors(answer(rig, dimensions=3))[0]
    assert cut.shape == (3,)
    assert np.linalg.norm(cut) == pytest.approx(1, abs=1e-6)
    assert cut == pytest.approx(whole[:3] / np.linalg.norm(whole[:3]), abs=1e-6)


def test_a_batch_of_2048_is_served_in_order(rig: Rig) -> None:
    texts = [f"t{i}" for i in range(2048)]
    got = answer(rig, input=texts)
    assert [item["index"] for item in got["data"]] == list(range(2048))
    some = [0, 1, 2047]
    alone = np.concatenate([vectors(answer(rig, input=texts[i])) for i in some])
    assert np.array_equal(vectors(got)[some], alone)


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"input": ""}, "input", "empty"),
        ({"input": []}, "input", "empty list"),
        ({"input": ["a", ""]}, "input", "empty"),
        ({"input": ["a", 1]}, "input", "mixed"),
        ({"input": [[1], []]}, "input", "empty list"),
        ({"input": None}, "input", "required"),
        ({"input": ["a"] * 2049}, "input", "2048"),
        ({"input": [0, 999999]}, "input", "999999"),
        ({"input": [-1]}, "input", "-1"),
        ({"dimensions": 9}, "dimensions", "from 1 to 8"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "at least 1"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "at least -1"),
        ({"truncate_prompt_tokens": 33}, "truncate_prompt_tokens", "from 1 to 32"),
        ({"truncate_prompt_tokens": True}, "truncate_prompt_tokens", "an integer"),
        ({"dimensions": 0}, "dimensions", "at least 1"),
        ({"encoding_format": "hex"}, "encoding_format", "'float' or 'base64'"),
        ({"model": "org/tiny-chat"}, "model", "/v1/chat/completions"),
    ],
)
def test_what_cannot_be_embedded_is_refused(
    rig: Rig, changes: dict[str, Any], param: str, words: str
) -> None:
    response = rig.post(PATH, {"model": EMBED, "input": "text", **changes})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert words in error["message"]


def test_a_long_input_is_refused_with_both_numbers(rig: Rig) -> None:
    response = rig.post(PATH, {"model": EMBED, "input": ["ok", "x" * 33]})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert error["param"] == "input[1]"
    assert "33 tokens" in error["message"]
    assert "32" in error["message"]


def test_a_long_input_is_cut_to_its_first_tokens_when_asked(rig: Rig, tokenizer: Tokenizer) -> None:
    text = "a long text that goes on " * 4
    ids = tokenizer.encode(text)
    for cut, kept in ((5, 5), (32, 32), (-1, 32)):
        for value in (text, ids):
            got = answer(rig, input=value, truncate_prompt_tokens=cut)
            assert got["usage"]["prompt_tokens"] == kept
            assert np.array_equal(vectors(got), vectors(answer(rig, input=ids[:kept])))
            assert "warnings" not in got


def test_a_client_that_leaves_cancels_its_embedding(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, cancelled = threading.Event(), threading.Event()

    def embed(texts: Any, owner: str = "") -> Future[np.ndarray]:
        future: Future[np.ndarray] = Future()
        future.add_done_callback(lambda f: f.cancelled() and cancelled.set())
        asked.set()
        return future

    monkeypatch.setattr(rig.embedder, "embed", embed)
    with httpx.Client(base_url=rig.url, timeout=httpx.Timeout(5, read=0.2)) as client:
        with pytest.raises(httpx.ReadTimeout):
            client.post(PATH, json={"model": EMBED, "input": "text"})
        assert asked.is_set()
    assert cancelled.wait(5)
