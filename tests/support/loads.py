"""Conversions and loading that can be killed at any time."""

import dataclasses
import json
from pathlib import Path

import gguf.quants  # noqa: F401 - so that no fork spends its time on these
import tensorstore  # noqa: F401

from inferneo_jax.engine.served import LanguageModel
from inferneo_jax.model import load_model
from inferneo_jax.platform.atomic import write_whole
from inferneo_jax.weights.convert import convert, describe
from tests.support.tiny_model import TINY_ENGINE, submit


def converted(source: str, destination: str, quantization: str) -> None:
    """Convert a model, unless it is there."""
    if not Path(destination).exists():
        convert(Path(source), Path(destination), quantization=quantization or None)


def described(source: str, checkpoints: str) -> None:
    """Describe a model where it is."""
    describe(Path(source), Path(checkpoints))


def answered(folder: str, cache: str, answer: str) -> None:
    """Load a model and write down what it answers."""
    config = dataclasses.replace(TINY_ENGINE, compilation_cache=cache)
    model = load_model(Path(folder), config, name="tiny")
    assert isinstance(model, LanguageModel)
    tokens = submit(model.engine, (5, 70, 3, 18, 9)).tokens
    write_whole(Path(answer), [json.dumps(tokens).encode()])
    model.stop()
