"""How much the scores of texts change when a model is not computed in float32.

Prints, for each way to compute, the change of the mean negative log-likelihood of each text, in
nats a token, against the reference numerics:

    python tests/accelerators/quality.py
    python tests/accelerators/quality.py quantization=int8 kv_dtype=int8

Arguments are fields of EngineConfig for one more way. Texts are this project's own documents and
sources, and its licence.
"""

import os
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np

from inferneo_jax.config import EngineConfig, MeshShape
from inferneo_jax.engine.served import LanguageModel
from inferneo_jax.model import load_model
from inferneo_jax.weights.catalog import checkpoint_path, default_checkpoints_dir
from tests.support.paths import ROOT
from tests.support.tiny_model import submit

TEXTS = (
    "README.md",
    "LICENSE",
    "docs/architecture.md",
    "docs/keys.md",
    "docs/operations.md",
    "docs/performance.md",
    "inferneo_jax/scheduler/scheduler.py",
    "server/run/generation.py",
)
TOKENS = 512
MODEL = "smollm2-135m-instruct"
REFERENCE = {"dtype": "float32", "quantization": "none", "kernels": "xla"}
WAYS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "bfloat16": {"dtype": "bfloat16", "quantization": "none", "kernels": "xla"},
    "int8, per row": {"quantization": "int8"},
}


def scores(**changes: Any) -> dict[str, float]:
    """The mean negative log-likelihood of each text's first tokens."""
    config = EngineConfig(
        slots=8, max_len=TOKENS + 1, row_buckets=(8,), mesh=MeshShape(1, 1), **changes
    )
    folder = Path(os.environ.get("INFERNEO_CHECKPOINTS") or default_checkpoints_dir())
    path = checkpoint_path(folder, MODEL)
    model = load_model(path, config, name=MODEL)
    assert isinstance(model, LanguageModel)
    try:
        runs = {}
        for name in TEXTS:
            text = (ROOT / name).read_text(encoding="utf-8")
            ids = tuple(model.tokenizer.encode(text)[:TOKENS])
            runs[name] = submit(model.engine, ids, 0, prompt_logprobs=0)
        found = {}
        for name, run in runs.items():
            entries = run.wait().outputs[-1].prompt_logprobs
            assert entries
            found[name] = -float(np.mean([entry.logprob for entry in entries if entry]))
        return found
    finally:
        model.stop()


def main() -> None:
    """Print the table."""
    ways = dict(WAYS)
    if given := dict(argument.split("=", 1) for argument in sys.argv[1:]):
        ways[" ".join(sys.argv[1:])] = given
    reference = scores(**REFERENCE)
    print(f"{'float32':>16}", *(f"{value:8.4f}" for value in reference.values()), sep="  ")
    for name, changes in ways.items():
        changed = [value - reference[text] for text, value in scores(**changes).items()]
        mean, absolute = statistics.mean(changed), statistics.mean(map(abs, changed))
        print(f"{name:>16}", *(f"{value:+8.4f}" for value in changed), sep="  ", end="")
        print(f"   mean {mean:+.4f}, of absolute values {absolute:.4f}")


if __name__ == "__main__":
    main()
