"""Loads broken model files, each in a process of its own with limits that the kernel enforces.

::

    python -m tests.weights.fuzz KIND START COUNT      one line of JSON for each file

The processes are forks of one that has everything imported and a whole model loaded, so that what
they take is what the file takes. One that exceeds its memory fails to allocate, one that exceeds
its time is killed, and a panic or an abort of a library is seen as what it is.
"""

import json
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gguf.constants import GGMLQuantizationType

from inferneo_jax.errors import InferneoError
from inferneo_jax.text.tokenizer import Tokenizer
from inferneo_jax.weights.convert import read_model
from tests.support import model_files as made
from tests.weights.mutations import Folder, Gguf, broken_gguf, sentencepiece

SECONDS = 1.0
BYTES = 200 * 2**20
FORMS = GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0
TEXTS = ["a", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "the 12 é ﬁ\n\n  ▁ </s>"]


def use(path: Path) -> None:
    """Everything that a conversion does but writing, and a few texts."""
    model = read_model(path)
    for name in model.weights:
        model.weights[name][...]
    source = model.source
    config = {**source.tokenizer_config, "chat_template": None}  # tests/text has hostile templates
    tokenizer = Tokenizer.from_text(source.tokenizer_json, config)
    for text in TEXTS:
        tokenizer.decode(tokenizer.encode(text))
    json.dumps([source.config, source.tokenizer_config, source.origin], allow_nan=False)


def makers(folder: Path) -> dict[str, Callable[[random.Random], Path]]:
    """For each kind of file, what breaks one."""
    tensors = made.random_tensors(made.LLAMA)
    file = folder / "model.gguf"
    ggufs = [Gguf(made.write_gguf(file, made.LLAMA, tensors, form).read_bytes()) for form in FORMS]
    ggufs.append(sentencepiece(ggufs[0]))
    encoder = made.BERT | {"vocab_size": len(made.WORDS)}
    made.write_encoder_gguf(file, encoder, made.random_tensors(encoder))
    ggufs.append(Gguf(file.read_bytes()))
    llama, bert = Folder(folder / "llama", made.LLAMA), Folder(folder / "bert", made.BERT)

    def gguf(rng: random.Random) -> Path:
        file.write_bytes(broken_gguf(rng, rng.choice(ggufs)))
        return file

    def in_folder(name: str | None) -> Callable[[random.Random], Path]:
        return lambda rng: rng.choice([llama, bert]).broken(rng, name)

    for whole in (file, llama.folder, bert.folder):
        use(whole)
    for base in ggufs:
        file.write_bytes(base.data)
        use(file)
    return {
        "gguf": gguf,
        "safetensors": in_folder("model.safetensors"),
        "tokenizer": in_folder("tokenizer.json"),
        "config": in_folder(None),
    }


def status_kb(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise KeyError(name)


def child(path: Path, out: int) -> None:
    """Loads one file under the limits and reports on it; never returns."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before, most = status_kb("VmRSS"), status_kb("VmSize") * 1024 + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (5, 5))
    found: dict[str, Any] = {"outcome": "loaded", "message": ""}
    start = time.process_time()
    try:
        use(path)
    except InferneoError as error:
        found = {"outcome": type(error).__name__, "message": str(error)}
    except BaseException as error:  # noqa: BLE001  (panics are such)
        found = {"outcome": f"bare {type(error).__name__}", "message": str(error)[:500]}
    found["seconds"] = time.process_time() - start
    found["mb"] = (status_kb("VmHWM") - before) / 1024
    os.write(out, json.dumps(found).encode())
    os._exit(0)


def run(kind: str, start: int, count: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a fork has none of the threads
    with tempfile.TemporaryDirectory() as folder:
        make = makers(Path(folder))[kind]
        for number in range(start, start + count):
            path = make(random.Random(f"{kind} {number}"))
            reading, writing = os.pipe()
            pid = os.fork()
            if not pid:
                child(path, writing)
            os.close(writing)
            with os.fdopen(reading, "rb") as pipe:
                report = pipe.read()
            _, status = os.waitpid(pid, 0)
            found = json.loads(report or b"{}")
            if status or not found:
                found = {"outcome": f"died of {status}", "message": "", "seconds": 0.0, "mb": 0.0}
            print(json.dumps({"kind": kind, "number": number, **found}), flush=True)


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
