"""Two servers, of which one computes the prompts of the other."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.server_process import Process, check_empty, free_address, process, stats_of
from tests.support.tiny_checkpoints import CHAT, tiny_checkpoints
from tests.support.waiting import until

PROMPT = [5, 70, 3, 18] * 40
BODY: dict[str, Any] = {"model": CHAT, "prompt": PROMPT, "max_tokens": 30, "seed": 7, "logprobs": 2}


def ask(server: Process, **changes: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json=BODY | changes, timeout=60)


def fails(server: Process) -> None:
    with pytest.raises(httpx.TransportError):
        ask(server, prompt=PROMPT[3:])


def test_two_servers_answer_as_one_and_one_outlives_the_other(tmp_path: Path) -> None:
    settings = tiny_checkpoints(tmp_path / "checkpoints")
    settings |= {"INFERNEO_MODELS": str(tmp_path / "checkpoints" / CHAT)}
    settings |= {"INFERNEO_PREFILL_TOKEN": 32 * "t"}
    address = free_address()
    with (
        process(
            tmp_path / "prefill", settings | {"INFERNEO_PREFILL_LISTEN": address}, workers=0
        ) as prefill,
        process(
            tmp_path / "decode", settings | {"INFERNEO_PREFILL_SERVERS": address}, workers=0
        ) as decode,
    ):
        prefill.wait_ready()
        decode.wait_ready()
        found, expected = ask(decode).json(), ask(prefill).json()
        assert found["choices"][0]["text"] == expected["choices"][0]["text"]
        assert found["usage"]["prompt_tokens_details"]["cached_tokens"] == len(PROMPT) - 16
        assert stats_of(decode.address, CHAT)["prompt_tokens"] == 16
        assert stats_of(decode.address, CHAT)["compiles_after_ready"] == 0

        os.kill(prefill.popen.pid, signal.SIGSTOP)
        answers: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: answers.append(ask(decode, prompt=PROMPT[::-1])))
        asking.start()
        until(lambda: stats_of(decode.address, CHAT)["waiting"] == 1)
        prefill.popen.kill()
        asking.join(30)
        assert answers[0].status_code == 500
        assert answers[0].json()["error"]["code"] == "engine_failed"
        until(lambda: httpx.get(decode.url + "/ready").status_code == 503)
        assert httpx.get(decode.url + "/health").status_code == 200
        assert ask(decode, prompt=PROMPT[1:]).status_code == 503
        check_empty(decode.address, CHAT)
        again = settings | {"INFERNEO_PREFILL_LISTEN": address}
        with process(tmp_path / "again", again, workers=0) as other:
            other.wait_ready()
            decode.wait_ready(20)
            text = ask(decode, prompt=PROMPT[2:]).json()["choices"][0]["text"]
            assert text == ask(other, prompt=PROMPT[2:]).json()["choices"][0]["text"]
            # Streams that take all slots, and a prompt that waits there when its server is killed.
            streams = BODY | {"n": 8, "stream": True, "max_tokens": 20_000, "ignore_eos": True}
            with httpx.stream("POST", f"{other.url}/v1/completions", json=streams) as stream:
                lines = stream.iter_lines()  # kept: without it the response is closed
                next(lines)
                until(lambda: stats_of(other.address, CHAT)["slots_used"] == 8)
                asking = threading.Thread(target=fails, args=[decode])
                asking.start()
                until(lambda: stats_of(other.address, CHAT)["waiting"] == 1)
                decode.popen.kill()
                until(lambda: stats_of(other.address, CHAT)["waiting"] == 0)
                asking.join(30)
            until(lambda: stats_of(other.address, CHAT)["slots_used"] == 0)
            check_empty(other.address, CHAT)
            assert ask(other).status_code == 200
