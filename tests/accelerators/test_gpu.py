"""The first minutes on a GPU, at toy sizes on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.accelerators.gpu import Report
from tests.support.paths import COMPILED, ROOT

FIGURES = {
    "check": ["cache in place, int8", "llama-tied: tokens", "attention 64, int8, 6 tokens"],
    "steps": ["bf16 prefill 32", "profile", "int8 decode 4 rows, sampled"],
    "serve": ["engine, 4 clients", "server, 4 clients", "server, engine in its own process: cores"],
}
"""Some of what each stage has to find."""


@pytest.mark.dry_run
@pytest.mark.parametrize("stage", FIGURES)
def test_a_stage_runs_to_its_end_at_toy_sizes(stage: str, tmp_path: Path) -> None:
    environment = {n: v for n, v in os.environ.items() if n != "XLA_FLAGS"}
    environment |= {"OUT": str(tmp_path), "CACHE": str(COMPILED), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.accelerators.gpu", stage, "--dry"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=590
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    lines = (tmp_path / f"gpu-{stage}.jsonl").read_text().splitlines()
    found = {line["name"]: line for line in map(json.loads, lines)}
    assert not [name for name, line in found.items() if line["ok"] is False]
    assert set(FIGURES[stage]) <= set(found)


def test_a_failure_ends_no_stage_and_is_counted(tmp_path: Path) -> None:
    report = Report("check", tmp_path, 60.0, dry=True)
    assert report.run("broken", lambda: 1 / 0) is None
    assert report.run("whole", lambda: 2) == 2
    late = Report("steps", tmp_path, -1.0, dry=True)
    assert late.run("not begun", lambda: 2) is None
    assert (report.failed, late.failed) == (1, 1)
    (line,) = (tmp_path / "gpu-check.jsonl").read_text().splitlines()
    assert json.loads(line)["error"] == "ZeroDivisionError: division by zero"
