"""The examples of managing keys over HTTP, taken from the manual and run as one script."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from inferneo_jax import Tokenizer
from tests.support.keyed_server import key_rig
from tests.support.paths import ROOT

PRINTED = "http://127.0.0.1:8000"


def blocks() -> list[str]:
    """The shell blocks of the manual's section."""
    manual = (ROOT / "docs" / "keys.md").read_text(encoding="utf-8")
    section = manual.partition("### Over HTTP\n")[2].partition("\n## ")[0]
    return re.findall(r"^```bash\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)


def test_the_examples_of_managing_keys_run(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name in ("curl", "jq"):
        if shutil.which(name) is None:
            assert not os.environ.get("REQUIRE_CLIENTS"), f"{name} is to be installed"
            pytest.skip(f"{name} is not installed")
    location = str(tmp_path / "keys.db")
    command = tmp_path / "inferneo"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m server.cli "$@"\n')
    command.chmod(0o700)
    with key_rig(tokenizer, location) as rig:
        script = "".join(blocks())
        assert script.count("curl") == script.count(PRINTED) == 8
        # Each answer on a line of its own, and an error status as a failure.
        quiet = "curl() { command curl -sS --fail-with-body -w '\\n' \"$@\"; }\n"
        environment = os.environ | {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "INFERNEO_KEYS_DB": location,
        }
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", quiet + script.replace(PRINTED, rig.url)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
    made, found, changed, rotated, used, every, ended = map(
        orjson.loads, result.stdout.splitlines()
    )
    key_id = made["id"]
    assert made["limits"]["requests"] == changed["limits"]["requests"] == 10
    assert (made["limits"]["tokens"], changed["limits"]["tokens"]) == (None, 50_000)
    assert made["expires"] is not None
    assert changed["expires"] is None
    assert found["id"] == used["key"]["id"] == key_id
    assert made["key"] != rotated["key"]
    assert every["object"] == "usage"
    assert (ended["id"], ended["state"]) == (key_id, "revoked")
