"""A server whose engine has a process of its own answers, ends and fails as one process does."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support.server_process import Process, process
from tests.support.tiny_checkpoints import CHAT, EMBEDDING, tiny_checkpoints
from tests.support.waiting import until, until_gone

TWO = {"INFERNEO_ENGINE_PROCESS": "true"}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return tiny_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def server(settings: dict[str, str], tmp_path: Path) -> Iterator[Process]:
    with process(tmp_path / "log", settings | TWO, tracebacks=True) as started:
        started.wait_ready()
        yield started


def _engine(server: Process) -> psutil.Process:
    (found,) = [each for each in server.family() if "inferneo_jax.engine_process" in each.cmdline()]
    return found


def _answers(server: Process) -> list[Any]:
    """What a server answers, without what differs each time: ids, dates, chunks of streams."""
    body = {"model": CHAT, "prompt": [5, 70, 3, 18], "max_tokens": 20, "logprobs": 2, "seed": 7}
    found: list[Any] = []
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for path, fields in (
            ("/v1/completions", body),
            ("/v1/completions", body | {"n": 3, "temperature": 0.0}),
            ("/v1/completions", body | {"prompt": [5, 10**6]}),
            ("/v1/embeddings", {"model": EMBEDDING, "input": [[2, 5, 3], [2, 3]]}),
            ("/v1/embeddings", {"model": EMBEDDING, "input": [[2, 10**6]]}),
        ):
            response = client.post(path, json=fields)
            answer = response.json() | {"id": "", "created": 0}
            found.append((response.status_code, answer))
        text = client.post("/v1/completions", json=body | {"stream": True}).text
        events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        found.append("".join(event["choices"][0]["text"] for event in events))
    return found


def _floats(value: Any, into: list[float]) -> Any:
    """The same without its floats, which are as exact as programs of different shapes are."""
    if isinstance(value, dict):
        return {name: _floats(each, into) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_floats(each, into) for each in value]
    if isinstance(value, float):
        into.append(value)
        return 0.0
    return value


def test_two_processes_answer_as_one(
    server: Process, settings: dict[str, str], tmp_path: Path
) -> None:
    with process(tmp_path / "one", settings) as one:
        one.wait_ready()
        expected: list[float] = []
        answers = _floats(_answers(one), expected)
    found: list[float] = []
    assert _floats(_answers(server), found) == answers
    assert found == pytest.approx(expected, abs=1e-4)
    engine = _engine(server)
    http = psutil.Process(engine.ppid())
    libraries = {Path(each.path).name for each in http.memory_maps()}
    assert any(name.startswith("tokenizers") for name in libraries)
    assert [name for name in libraries if "jax" in name or "xla" in name] == []
    metrics = httpx.get(f"{server.url}/metrics").text
    assert f'inferneo_engine_steps_total{{model_name="{CHAT}"}}' in metrics
    ready = httpx.get(f"{server.url}/ready").json()
    assert [model["id"] for model in ready["models"]] == [CHAT, EMBEDDING]


def test_both_end_together_and_streams_end_first(server: Process) -> None:
    engine = _engine(server)
    body = {"model": CHAT, "prompt": [5, 70, 3], "max_tokens": 300, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        engine.send_signal(signal.SIGTERM)  # as systemd does; it waits for the other
        server.popen.terminate()
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert server.popen.wait(40) == 0
    until_gone(engine.pid)


def test_a_killed_server_takes_its_engine_along(server: Process) -> None:
    engine = _engine(server)
    os.kill(engine.ppid(), signal.SIGKILL)
    until_gone(engine.pid)
    server.kill()  # how Hypercorn's main process ends is not looked at here


def test_a_lost_engine_ends_its_streams_and_the_server(server: Process) -> None:
    engine = _engine(server)
    body = {"model": CHAT, "prompt": [5, 70, 3], "max_tokens": 30_000, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        engine.kill()
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2][6:])["error"]["code"] == "engine_failed"
    until(lambda: server.popen.poll() is not None, 20)
    assert server.popen.returncode != 0
    assert "the engine's process ended with code -9" in server.log.read_text()


def test_a_model_that_cannot_be_loaded_ends_the_server(
    settings: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "broken").mkdir()
    wrong = {"INFERNEO_MODELS": str(tmp_path / "broken")}
    with process(tmp_path / "log", settings | TWO | wrong) as server:
        assert server.popen.wait(60) != 0
    assert "loading_failed" in server.log.read_text()
    assert "broken" in server.log.read_text()
