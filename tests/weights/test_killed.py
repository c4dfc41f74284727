"""Conversions and loading that are killed at any time leave nothing half-made.

The number of kills in each test is that of the variable INFERNEO_TEST_KILLS.
"""

import json

import gguf
import numpy as np
import pytest

from inferneo_jax.models import weight_specs
from inferneo_jax.weights.checkpoint import open_weights, read_info
from inferneo_jax.weights.convert import convert, describe
from tests.support.killed import KILLS, killed_runs
from tests.support.loads import answered, converted, described
from tests.support.paths import FAMILIES


def numbers_of(path):
    shapes = {name: spec.shape for name, spec in weight_specs(read_info(path).config).items()}
    return {name: weight[...] for name, weight in open_weights(path, shapes).items()}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


@pytest.fixture
def source(made, tmp_path):
    """A model large enough that a conversion takes time."""
    config = made.LLAMA | {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
    folder = tmp_path / "models"
    folder.mkdir()
    return made.gguf(
        folder / "m.gguf", config, made.tensors(config), gguf.GGMLQuantizationType.Q8_0
    )


@pytest.mark.parametrize("quantization", ["", "q4_0"])
def test_a_killed_conversion_leaves_nothing(source, tmp_path, quantization):
    wanted = numbers_of(convert(source, tmp_path / "whole", quantization=quantization or None))
    store = tmp_path / "store"
    store.mkdir()
    ended = 0
    for number, _ in enumerate(
        killed_runs(KILLS, None, converted, source, store / "m", quantization)
    ):
        if (store / "m").exists():
            assert_same(numbers_of(store / "m"), wanted)
            (store / "m").rename(tmp_path / f"done-{number}")
            ended += 1
    assert ended >= 2  # those that were not killed
    assert [path.name for path in store.iterdir()] == []


def test_a_killed_description_is_made_by_the_next(source, tmp_path):
    wanted = numbers_of(convert(source, tmp_path / "whole"))
    folder = source.with_name("m.gguf.inferneo")
    for number, _ in enumerate(killed_runs(KILLS, None, described, source, tmp_path / "store")):
        if folder.exists():
            assert_same(numbers_of(folder), wanted)
            folder.rename(tmp_path / f"done-{number}")
    assert describe(source, tmp_path / "store") == folder
    assert {path.name for path in source.parent.iterdir()} == {"m.gguf", folder.name}


def test_a_start_that_follows_killed_ones_answers_as_the_first(tmp_path):
    folder = convert(FAMILIES / "llama-tied", tmp_path / "tiny")
    answer, answers = tmp_path / "answer", []
    # Each has the programs and whatever else the ones before it have left.
    for _ in killed_runs(max(2, KILLS // 3), None, answered, folder, tmp_path / "cache", answer):
        if answer.exists():
            answers.append(json.loads(answer.read_text()))
            answer.unlink()
    assert len(answers) >= 2
    assert all(each == answers[0] for each in answers)
