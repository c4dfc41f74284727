"""``/v1/models``, ``/health`` and ``/ready``, before the models are loaded and after."""

import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog

from inferneo_jax import ConfigError, Tokenizer
from server.config.settings import Settings
from server.models.registry import Registry
from server.models.sources import Source, load_from_disk
from tests.support.fake_engine import TIMEOUT, FakeEmbedder, FakeEngine, writes
from tests.support.fake_hub import FakeHub, hub
from tests.support.fake_server import CHAT, EMBED, Rig, Server, models_of, wait_ready

__all__ = ["hub"]


def test_the_list_has_every_model(rig: Rig) -> None:
    cards = [
        {"id": CHAT, "object": "model", "created": 1700000000, "owned_by": "inferneo"},
        {"id": EMBED, "object": "model", "created": 1700000001, "owned_by": "inferneo"},
    ]
    assert rig.client.get("/v1/models").json() == {"object": "list", "data": cards}


def test_a_model_is_found_by_id_and_by_alias(rig: Rig) -> None:
    assert "/" in CHAT
    card, escaped = (
        rig.client.get(f"/v1/models/{name}").json() for name in (CHAT, CHAT.replace("/", "%2F"))
    )
    assert (
        card
        == escaped
        == {
            "id": CHAT,
            "object": "model",
            "created": 1700000000,
            "owned_by": "inferneo",
            "permission": [],
            "root": CHAT,
            "parent": None,
        }
    )
    assert rig.client.get("/v1/models/gpt-4o").json() == card | {"id": "gpt-4o"}


@pytest.mark.parametrize("name", ["none", "org/none", "org/tiny-chat/more"])
def test_an_unknown_model_is_not_found(rig: Rig, name: str) -> None:
    response = rig.client.get(f"/v1/models/{name}")
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (
        404,
        "model_not_found",
        "model",
    )


def test_ready_tells_what_a_model_can_hold(rig: Rig) -> None:
    state = rig.client.get("/ready").json()
    assert state["status"] == "ready"
    assert state["compiles_after_ready"] == 0
    chat, embed = state["models"]
    assert (chat["id"], chat["slots"], chat["slots_used"]) == (CHAT, 4, 0)
    assert (chat["pages"], chat["kv_tokens"], chat["max_len"]) == (64, 1024, 512)
    assert embed == {"id": EMBED, "kind": "encoder", "max_tokens": 32, "dimensions": 8}
    assert rig.client.get("/health").json() == {"status": "ok"}


def test_while_models_load_the_server_says_so(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(writes(tokenizer, "x"))
    models = models_of(engine, FakeEmbedder(), tokenizer)
    go_on, compiling = threading.Event(), threading.Barrier(3)  # both models' threads, and this

    def loader(source: Any, settings: Any, progress: Any) -> Any:
        progress("compile", 3, 20)
        compiling.wait(TIMEOUT)
        assert go_on.wait(TIMEOUT)
        return models[source.id]()

    with Server(loader) as server, httpx.Client(base_url=server.url) as client:
        compiling.wait(TIMEOUT)
        assert client.get("/health").status_code == 200
        response = client.get("/ready")
        assert (response.status_code, response.json()["status"]) == (503, "loading")
        assert int(response.headers["Retry-After"]) > 0
        assert response.json()["models"] == [
            {"id": CHAT, "stage": "compile", "done": 3, "total": 20},
            {"id": EMBED, "stage": "compile", "done": 3, "total": 20},
        ]
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions")):
            response = client.request(method, path, json={})
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "model_loading"
            assert "Retry-After" in response.headers
        assert client.get("/v1/none").status_code == 404
        go_on.set()
        wait_ready(client)


def test_stopping_while_models_load_does_not_wait_for_them(tokenizer: Tokenizer) -> None:
    entered, ended = threading.Event(), threading.Event()

    def loader(source: Any, settings: Any, progress: Any) -> Any:
        entered.set()
        try:
            while True:
                progress("compile", 0, 0)
        finally:
            ended.set()

    with Server(loader):
        assert entered.wait(TIMEOUT)
    assert ended.is_set()


@pytest.mark.parametrize("converted", [True, False])
def test_what_was_converted_is_loaded_and_the_rest_pulled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, converted: bool
) -> None:
    pulled: list[str] = []

    def pull(name: str, checkpoints: Path, progress: Any, announce: Any) -> Path:
        pulled.append(name)
        return checkpoints / name

    monkeypatch.setattr("inferneo_jax.pull", pull)
    monkeypatch.setattr("inferneo_jax.load_model", lambda path, config, **_: path)
    if converted:
        (tmp_path / "mine").mkdir()
    settings = Settings(checkpoints=tmp_path)
    loaded: Any = load_from_disk(Source("mine"), settings, lambda *_: None)
    assert loaded == tmp_path / "mine"
    assert pulled == ([] if converted else ["mine"])


def test_the_draft_model_is_had_like_the_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inferneo_jax.pull", lambda name, folder, *_, **__: folder / name)
    monkeypatch.setattr("inferneo_jax.load_model", lambda path, config, **given: given["draft"])
    settings = Settings(checkpoints=tmp_path, draft_model="org/small")
    loaded: Any = load_from_disk(Source("mine"), settings, lambda *_: None)
    assert loaded == tmp_path / "org" / "small"
    alone: Any = load_from_disk(Source("mine"), Settings(checkpoints=tmp_path), lambda *_: None)
    assert alone is None
    missing = Settings.load({"draft_model": "./none.gguf"})
    with pytest.raises(ConfigError, match=r"--draft-model names ./none.gguf, where there is no"):
        Registry(missing)


def test_a_quantization_of_the_hub_that_is_missing_is_pulled_and_logged(
    made: Any, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file: Path = made.gguf(tmp_path / "m.gguf", made.LLAMA, made.tensors(made.LLAMA))
    hub.add("org/g", {"m-Q4_K_M.gguf": file.read_bytes()})
    monkeypatch.setattr("inferneo_jax.load_model", lambda path, config, **_: path)
    settings = Settings(checkpoints=tmp_path / "store")
    with structlog.testing.capture_logs() as logs:
        loaded: Any = load_from_disk(Source("org/g:Q4_K_M"), settings, lambda *_: None)
    assert loaded == tmp_path / "store" / "org" / "g:Q4_K_M"
    (event,) = (each for each in logs if each["event"] == "pulling")
    assert event["what"].startswith("m-Q4_K_M.gguf, 0 MB, licence: apache-2.0")
    assert event["bytes"] == file.stat().st_size


def test_an_engine_that_failed_is_not_ready(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(writes(tokenizer, "x"))
    models = models_of(engine, FakeEmbedder(), tokenizer)
    with (
        Server(lambda source, *_: models[source.id]()) as server,
        httpx.Client(base_url=server.url) as client,
    ):
        wait_ready(client)
        engine.stop()
        response = client.get("/ready")
        assert (response.status_code, response.json()["status"]) == (503, "failed")
