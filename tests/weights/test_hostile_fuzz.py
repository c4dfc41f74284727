"""Thousands of broken model files, each in a process of its own under the kernel's limits."""

import json
import os
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from inferneo_jax.errors import CheckpointError, InferneoError
from tests.support.paths import ROOT
from tests.weights.fuzz import BYTES, SECONDS

FILES = int(os.environ.get("FUZZ_FILES", "300"))
"""How many broken files are loaded in all; the first so many of an endless, fixed sequence."""
SHARES = {"gguf": 0.4, "safetensors": 0.2, "tokenizer": 0.2, "config": 0.2}


def fuzzed(kind: str, count: int) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.weights.fuzz", kind, "0", str(count)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("kind", SHARES)
def test_a_broken_file_is_one_clear_error_within_its_limits(kind: str) -> None:
    count = round(FILES * SHARES[kind])
    reports = fuzzed(kind, count)
    assert len(reports) == count
    outcomes = Counter(report["outcome"] for report in reports)
    ours = {each.__name__ for each in InferneoError.__subclasses__()}
    ours |= {each.__name__ for each in CheckpointError.__subclasses__()}
    for report in reports:
        assert report["outcome"] in ours | {"loaded"}, report
        assert report["seconds"] < SECONDS, report
        assert report["mb"] < BYTES / 2**20, report
        message = report["message"]
        if report["outcome"] not in ("loaded", "RequestError"):
            assert "/" in message, report
        assert message.isprintable(), report
        assert len(message) < 1500, report
    # Most are broken, and not all at the first look.
    assert outcomes["loaded"] < count / 2
    assert len(outcomes) > 1
