"""How many tokens per second the host side carries, from the scheduler to the bytes of a stream.

``python -m tests.tools.carried --streams 64,256``, from the root of the checkout. The server and
its engine are the real ones; only the device is not: it answers at once or, with ``--rate``, as one
does that generates so many tokens per second. It is measured with the engine in the server's
process and in one of its own. The client reads raw bytes, so that it takes little of the machine.
"""

import argparse
import contextlib
import json
import os
import selectors
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from inferneo_jax import (
    EngineProcess,
    GrammarCompiler,
    LanguageModel,
    Tokenizer,
    checkpoint_path,
    default_checkpoints_dir,
)
from inferneo_jax.config import EngineConfig
from inferneo_jax.engine.engine import Engine
from inferneo_jax.models.steps import Sampled
from inferneo_jax.request import RequestLimits
from inferneo_jax.runner.runner import StepResults
from inferneo_jax.scheduler.prefill import PrefillShapes, PrefillTimes, Shape
from inferneo_jax.scheduler.scheduler import SchedulerOutputs, num_decode_steps
from server.process.child import LISTENER, Child
from tests.support.fake_engine import INFO
from tests.support.server_process import environment

NAME, SLOTS = "instant", 256
FOLDER, RATE, PROCESSES = "CARRIED_FOLDER", "CARRIED_RATE", "CARRIED_PROCESSES"
DECODE_STEPS = "CARRIED_DECODE_STEPS"
"""Variables that tell the processes of a server what to do."""


@dataclass(frozen=True)
class _Step:
    """A step whose results are there at a known time."""

    scheduled: SchedulerOutputs
    seconds: float
    ends: float

    def wait(self) -> StepResults:
        time.sleep(max(0.0, self.ends - time.perf_counter()))
        steps = num_decode_steps(self.scheduled)
        shape = (SLOTS, steps) if steps > 1 else (SLOTS,)
        ids: Any = np.random.default_rng().integers(32, 127, shape).astype(np.int32)
        decodes = any(rank.decode for rank in self.scheduled)
        prefills = any(rank.prefill for rank in self.scheduled)
        return StepResults(
            Sampled(ids, None, None) if decodes else None,
            Sampled(ids, None, None) if prefills else None,
            decode_seconds=0.0 if prefills else self.seconds,
            mixed_seconds=self.seconds + 1e-5 if decodes and prefills else 0.0,
        )


class InstantRunner:
    """What the engine needs of a runner; ``rate`` is in tokens per second, 0: at once."""

    slots, num_pages, page_len, max_len, dp_size = SLOTS, 60_000, 16, 8192, 1
    step_seconds, speculation, decode_seconds = 60.0, None, 1e-5
    shapes = PrefillShapes.of((256, 2048), slots=SLOTS, overhead=32, padding=1.0)
    prefill_times = PrefillTimes([(cost, 1e-5) for cost in (18.0, 32.0, 256.0, 2048.0)])
    config = EngineConfig()

    def __init__(self, vocab_size: int, rate: float, decode_steps: int) -> None:
        self.decode_steps = decode_steps
        self.limits = RequestLimits(
            vocab_size=vocab_size,
            max_len=self.max_len,
            max_logprobs=0,
            max_logit_bias=0,
            max_stop_ids=16,
        )
        self._rate, self._free = rate, 0.0

    def has_prefill(self, shape: Shape) -> bool:
        return shape in self.shapes.shapes

    def run(self, scheduled: SchedulerOutputs) -> _Step:
        tokens = sum(row.num_steps for rank in scheduled for row in rank.decode)
        began = max(self._free, time.perf_counter())
        seconds = tokens / self._rate if self._rate else 0.0
        self._free = began + seconds
        return _Step(scheduled, max(seconds, 1e-5), self._free)


def load(*_: Any, **__: Any) -> LanguageModel:
    """A model on such a runner, whatever is asked for."""
    tokenizer = Tokenizer.from_directory(Path(os.environ[FOLDER]))
    rate, decode_steps = float(os.environ[RATE]), int(os.environ[DECODE_STEPS])
    runner: Any = InstantRunner(tokenizer.vocab_size, rate, decode_steps)
    return LanguageModel(
        name=NAME,
        created=0,
        tokenizer=tokenizer,
        max_len=runner.max_len,
        info=INFO,
        engine=Engine(runner),
        grammars=GrammarCompiler.of(tokenizer),
    )


def make_app() -> Any:
    """The application of the server under test, called in its process."""
    from server.application import create_app
    from server.config.settings import Settings

    settings = Settings(models=(NAME,), slots=SLOTS, log_format="json")
    if os.environ[PROCESSES] == "1":
        return create_app(settings, load)
    command = "from inferneo_jax.engine_process import main; from tests.tools.carried import load"
    process = EngineProcess((sys.executable, "-c", f"{command}; main(load)"))
    folder = Path(os.environ[FOLDER])
    return create_app(settings, lambda *_: process.load(folder, EngineConfig(), name=NAME))


@dataclass(frozen=True)
class Carried:
    """What was measured.

    Attributes:
        tokens: per second.
        events: per token; 1 if every token was sent on its own.
        cpu: CPU time of HTTP and of the engine per token, in microseconds.
        gap: 99th percentile of the time between two reads of a stream, in milliseconds.
    """

    tokens: float
    events: float
    cpu: list[float]
    gap: float


@contextlib.contextmanager
def served(
    processes: int, rate: float, tokenizer: Path, keys: Path, decode_steps: int = 1
) -> Iterator[Child]:
    """A server that is ready; ``tokenizer`` is a model's folder."""
    variables = environment(
        {
            FOLDER: str(tokenizer),
            RATE: str(rate),
            PROCESSES: str(processes),
            DECODE_STEPS: str(decode_steps),
            "INFERNEO_KEYS_DB": str(keys / "keys.db"),
        }
    )
    app = "tests.tools.carried:make_app()"
    child = Child([sys.executable, "-m", "hypercorn", "-b", LISTENER, app], variables)
    try:
        failure = child.wait("/ready", 120)
        assert failure is None, child.tail
        yield child
    finally:
        child.end()


def measure(child: Child, streams: int, tokens: int) -> Carried:
    """Ask for so many streams of so many tokens at once."""
    body = json.dumps(
        {
            "model": NAME,
            "prompt": "Tell me a story of a fox.",
            "max_tokens": tokens,
            "stream": True,
            "ignore_eos": True,
        }
    ).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    port = int(child.url.rpartition(":")[2])
    family = psutil.Process(child.process.pid).children(recursive=True)
    before = [sum(each.cpu_times()[:2]) for each in family]
    selector = selectors.DefaultSelector()
    tails: dict[socket.socket, bytes] = {}
    last: dict[socket.socket, float] = {}
    gaps, events = [], 0
    started = time.perf_counter()
    for _ in range(streams):
        stream = socket.create_connection(("127.0.0.1", port))
        stream.sendall(head.encode() + body)
        selector.register(stream, selectors.EVENT_READ)
        tails[stream] = b""
    while tails:
        for key, _ in selector.select():
            stream: Any = key.fileobj
            read, now = stream.recv(1 << 18), time.perf_counter()
            text = tails[stream] + read
            assert stream in last or read.startswith(b"HTTP/1.1 200"), read
            events += text.count(b"data: {") - tails[stream].count(b"data: {")
            if stream in last:
                gaps.append(now - last[stream])
            last[stream], tails[stream] = now, text[-16:]
            if not read or b"[DONE]" in text[-32:]:
                selector.unregister(stream)
                stream.close()
                del tails[stream]
        time.sleep(0.002)  # it reads what has come meanwhile at once
    seconds, total = time.perf_counter() - started, streams * tokens
    after = [sum(each.cpu_times()[:2]) for each in family]
    return Carried(
        total / seconds,
        events / total,
        [1e6 * (b - a) / total for a, b in zip(before, after, strict=True) if b - a > 0.02],
        1e3 * float(np.percentile(gaps, 99)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a model's folder, whose tokenizer is used")
    parser.add_argument("--streams", default="64,256")
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--rate", type=float, default=0.0, help="tokens per second of the device")
    parser.add_argument("--decode-steps", type=int, default=1, help="dispatched together, at most")
    arguments = parser.parse_args()
    model = arguments.model or checkpoint_path(default_checkpoints_dir(), "smollm2-135m-instruct")
    print("processes  streams    tok/s  events/token  CPU us/token  gap p99 ms")
    with tempfile.TemporaryDirectory() as folder:
        for processes in (1, 2):
            steps = arguments.decode_steps
            with served(processes, arguments.rate, model, Path(folder), steps) as child:
                for streams in map(int, arguments.streams.split(",")):
                    found = measure(child, streams, arguments.tokens)
                    cpu = " + ".join(f"{each:.0f}" for each in found.cpu)
                    print(
                        f"{processes:9} {streams:8} {found.tokens:8.0f} {found.events:13.2f} "
                        f"{cpu:>13} {found.gap:11.1f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
