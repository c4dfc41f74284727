"""Checkpoints of tiny random models, on which a whole real server starts and runs quickly."""

import json
import shutil
from pathlib import Path

from inferneo_jax.weights.convert import convert
from tests.support.paths import COMPILED, FAMILIES

CHAT, EMBEDDING = "tiny-llama", "tiny-bert"
CONTEXT = 32_768


def tiny_checkpoints(folder: Path) -> dict[str, str]:
    """Make them; the settings of a server that serves both."""
    source = folder / "source"
    shutil.copytree(FAMILIES / "llama-tied", source)
    config = json.loads((source / "config.json").read_text())
    config["max_position_embeddings"] = CONTEXT
    (source / "config.json").write_text(json.dumps(config))
    paths = convert(source, folder / CHAT), convert(FAMILIES / "bert", folder / EMBEDDING)
    return {
        "INFERNEO_CHECKPOINTS": str(folder),
        "INFERNEO_COMPILATION_CACHE": str(COMPILED),
        "INFERNEO_MODELS": ",".join(map(str, paths)),
        "INFERNEO_DTYPE": "float32",
        "INFERNEO_SLOTS": "8",
        "INFERNEO_SPECULATION": "off",  # fewer programs to compile, and a token a step
        "INFERNEO_KEYS_DB": str(folder / "keys.db"),
    }
