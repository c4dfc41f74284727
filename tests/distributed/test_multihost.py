"""A model on a mesh, of one real process and of two: what clients see, and how both end."""

import asyncio
import contextlib
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.machine_speed import Machine
from tests.support.paths import ROOT
from tests.support.raw_clients import Ending, body, plain, socketed, stream
from tests.support.server_process import Process, environment, free_address, process, stats_of
from tests.support.tiny_checkpoints import CHAT, EMBEDDING, tiny_checkpoints
from tests.support.waiting import until, until_async

READY, AT_MOST = 120.0, 10.0
TOKEN = "a token that all processes share"
LONG = 400
# How fast the programs are is no matter here, how fast they are compiled is.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


ONE_OR_TWO = [
    pytest.param({}, id="one process"),
    pytest.param({"INFERNEO_ENGINE_PROCESS": "true"}, id="an engine process"),
]
"""Of the leader; the follower serves no HTTP and ignores it."""


@dataclass
class Job:
    """The leader is a server; the follower has no address."""

    leader: Process
    follower: Process

    def wait_ready(self) -> None:
        try:
            self.leader.wait_ready(READY)
        except AssertionError as error:
            raise AssertionError(f"{error}\n--- follower:\n{self.follower.tail()}") from None

    def codes(self, seconds: float = AT_MOST) -> tuple[int, int]:
        """Exit codes of both; the leader's is that of Hypercorn's main process."""
        deadline = time.monotonic() + seconds
        return (
            self.leader.popen.wait(max(0.1, deadline - time.monotonic())),
            self.follower.popen.wait(max(0.1, deadline - time.monotonic())),
        )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Settings that leave few programs to compile."""
    folder = tmp_path_factory.mktemp("tiny")
    return tiny_checkpoints(folder) | {
        "INFERNEO_MAX_LEN": "512",
        "INFERNEO_SLOTS": "4",
        "XLA_FLAGS": QUICK,
    }


@pytest.fixture(scope="module")
def expected(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What a server on one device answers."""
    with process(tmp_path_factory.mktemp("alone") / "log", tiny) as alone:
        alone.wait_ready(READY)
        return answers(alone.address)


@contextlib.contextmanager
def job(folder: Path, settings: dict[str, str], **follower: str) -> Iterator[Job]:
    """Two processes, the second with further settings of its own. Both are gone at the end.

    Each has two devices; each group of ``data`` is a process, or each part of ``model``.
    """
    shared = settings | {
        "INFERNEO_COORDINATOR": free_address(),
        "INFERNEO_NUM_PROCESSES": "2",
        "INFERNEO_JOB_TOKEN": TOKEN,
        "INFERNEO_MESH": "data=2,model=2",
        "INFERNEO_LOG_FORMAT": "json",
        "XLA_FLAGS": f"{QUICK} --xla_force_host_platform_device_count=2",
    }
    with process(
        folder / "leader", shared | {"INFERNEO_PROCESS_ID": "0"}, tracebacks=True
    ) as leader:
        command = [sys.executable, "-m", "server.cli", "follow"]
        own = shared | {"INFERNEO_PROCESS_ID": "1"} | follower
        made = Job(leader, Process(command, own, folder / "follower"))
        try:
            yield made
        finally:
            made.follower.kill()
            leader.kill()


def wait_for(text: str, server: Process, seconds: float = 60) -> None:
    """Until it is in what the process wrote."""
    until(lambda: text in server.log.read_text(), seconds, server.tail)


def answers(address: str) -> list[Any]:
    """To several requests at once: text, log probabilities and vectors."""

    def ask(path: str, asked: dict[str, Any]) -> Any:
        answer = httpx.post(f"http://{address}{path}", json=asked, timeout=60)
        assert answer.status_code == 200, answer.text
        found = answer.json()
        if "data" in found:
            return [[round(x, 3) for x in each["embedding"]] for each in found["data"]]
        return [each["text"] for each in found["choices"]]

    sent = [
        ("/v1/completions", body(20, prompt="x" * (1 + 40 * i), temperature=0.5 * i, seed=i, n=2))
        for i in range(4)
    ]
    sent.append(("/v1/embeddings", {"model": EMBEDDING, "input": ["some text", "more"]}))
    with ThreadPoolExecutor(len(sent)) as pool:
        return list(pool.map(lambda each: ask(*each), sent))


def asking(server: Process, tokens: int) -> list[Any]:
    """Clients of each kind."""
    return [kind(server, body(tokens)) for kind in (stream, plain, socketed, stream)]


async def running(server: Process, number: int) -> None:
    async def seen() -> bool:
        found = await asyncio.to_thread(stats_of, server.address, CHAT)
        return bool(found["running"] == number)

    await until_async(seen)


def check_answers(address: str, expected: list[Any]) -> None:
    """They are those of one device, and leave nothing behind."""
    assert answers(address) == expected
    stats = stats_of(address, CHAT)
    assert (stats["slots"], stats["slots_used"], stats["pages_used"]) == (4, 0, 0)
    assert stats["compiles_after_ready"] == 0


def test_a_server_on_a_mesh_answers_as_one_on_a_device(
    tiny: dict[str, str], expected: list[Any], tmp_path: Path
) -> None:
    flags = f"{QUICK} --xla_force_host_platform_device_count=4"
    mesh = {"INFERNEO_MESH": "data=2,model=2", "XLA_FLAGS": flags}
    with process(tmp_path / "log", tiny | mesh) as server:
        server.wait_ready(READY)
        check_answers(server.address, expected)


@pytest.mark.parametrize("leader", ONE_OR_TWO)
def test_two_processes_answer_as_one_and_end_in_order(
    tiny: dict[str, str], expected: list[Any], tmp_path: Path, leader: dict[str, str]
) -> None:
    with job(tmp_path, tiny | leader) as two:
        two.wait_ready()
        check_answers(two.leader.address, expected)

        async def told_to_end() -> list[Ending]:
            tasks = [asyncio.create_task(each) for each in asking(two.leader, LONG)]
            await running(two.leader, 4)
            two.follower.popen.send_signal(signal.SIGTERM)  # it passes that on to the leader
            return await asyncio.gather(*tasks)

        for ending in asyncio.run(asyncio.wait_for(told_to_end(), 60)):
            assert (ending.complete, ending.error) == (True, None), ending
            assert ending.way != "plain" or ending.tokens == LONG  # events may hold several tokens
        assert two.codes() == (0, 0)
        for log in (two.leader.log, two.follower.log):
            assert "Traceback" not in log.read_text()


@pytest.mark.parametrize("leader", ONE_OR_TWO)
def test_a_killed_follower_ends_requests_with_an_error_and_the_leader(
    tiny: dict[str, str], tmp_path: Path, machine: Machine, leader: dict[str, str]
) -> None:
    reason = "Process 1 of the job closed the connection."
    with job(tmp_path, tiny | leader) as two:
        two.wait_ready()

        async def cut() -> tuple[list[Ending], dict[str, Any], float]:
            tasks = [asyncio.create_task(each) for each in asking(two.leader, LONG)]
            await running(two.leader, 4)
            two.follower.popen.kill()
            killed = time.monotonic()
            async with httpx.AsyncClient(timeout=5) as client:
                while True:
                    ready = await client.get(two.leader.url + "/ready")
                    if ready.status_code == 503:
                        break
                    assert time.monotonic() < killed + machine.seconds(AT_MOST)
            found = await asyncio.gather(*tasks)
            return found, ready.json(), time.monotonic() - killed

        endings, ready, seconds = asyncio.run(asyncio.wait_for(cut(), 60))
        for ending in endings:
            assert (ending.complete, ending.error) == (True, "engine_failed"), ending
        # Which of its connections is seen to end first, and how, is left to chance.
        message = ready["error"]["message"]
        assert (ready["status"], message[: len(reason) - 1]) == ("failed", reason[:-1])
        assert seconds < machine.seconds(AT_MOST)
        print(f"all clients knew {seconds:.2f} s after the follower was killed")
        ended, follower = two.codes()
        assert ended != 0
        assert follower == -signal.SIGKILL


def test_a_killed_leader_ends_the_follower(tiny: dict[str, str], tmp_path: Path) -> None:
    with job(tmp_path, tiny) as two:
        wait_for("joined a job", two.follower)
        for each in two.leader.family():
            each.kill()
        assert two.codes()[1] != 0


def test_other_settings_are_refused_on_both_sides(tiny: dict[str, str], tmp_path: Path) -> None:
    language_model = tiny["INFERNEO_MODELS"].split(",")[0]
    changed = {"INFERNEO_SLOTS": "8", "INFERNEO_MAX_LEN": "256"}
    with job(tmp_path, tiny | {"INFERNEO_MODELS": language_model}, **changed) as two:
        assert two.follower.popen.wait(60) == 1
        for each in (two.follower, two.leader):
            wait_for("max_len is 256 in process 1 and 512 in process 0; slots is 8", each)
        assert two.leader.popen.wait(AT_MOST) != 0


def test_another_source_of_the_same_version_is_refused(
    tiny: dict[str, str], tmp_path: Path
) -> None:
    package = shutil.copytree(ROOT / "inferneo_jax", tmp_path / "changed" / "inferneo_jax")
    with (package / "models" / "steps.py").open("a") as steps:
        steps.write("# as if somebody had fixed something on one host only\n")
    changed = f"{package.parent}:{environment({})['PYTHONPATH']}"
    language_model = tiny["INFERNEO_MODELS"].split(",")[0]
    settings = tiny | {"INFERNEO_MODELS": language_model}
    with job(tmp_path, settings, PYTHONPATH=changed, PYTHONSAFEPATH="1") as two:
        assert two.follower.popen.wait(60) == 1
        for process in (two.follower, two.leader):
            wait_for("source of inferneo_jax is '", process)
            wait_for("Give all of them the same version", process)
