"""The programs that client tests need; tests are skipped or fail if they are missing."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import NoReturn

import pytest

from tests.support.paths import ROOT

NODE = ROOT / "tests" / "clients" / "node"
FRAMEWORKS = ROOT / "tests" / "clients" / "frameworks"
PATIENCE = 240.0


def missing(what: str) -> NoReturn:
    """Skip the test, or fail it where every client is required."""
    if os.environ.get("REQUIRE_CLIENTS"):
        pytest.fail(f"{what}, and REQUIRE_CLIENTS is set")
    pytest.skip(what)


def program(*names: str) -> str:
    """The path of the first of these programs that there is."""
    for name in names:
        if found := shutil.which(name):
            return found
    missing(f"{names[0]} is not installed")


def framework_python() -> str:
    """A Python that has LangChain, LlamaIndex and LiteLLM."""
    python = FRAMEWORKS / ".venv" / "bin" / "python"
    if not python.exists():
        missing(f"{python.relative_to(FRAMEWORKS.parents[2])} is made by `make test-clients`")
    return str(python)


def node_modules() -> Path:
    """The folder of the JavaScript tests, with what its package.json names installed."""
    npm, modules = program("npm"), NODE / "node_modules"
    done, wanted = modules / ".installed", NODE / "package.json"
    program("node")
    if not done.exists() or done.read_bytes() != wanted.read_bytes():
        flags = ["--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts"]
        result = subprocess.run(
            [npm, "install", *flags], cwd=NODE, capture_output=True, text=True, check=False
        )
        if result.returncode != 0:
            missing(f"npm could not install the JavaScript clients: {result.stderr[-300:]}")
        done.write_bytes(wanted.read_bytes())
    return NODE


def run(command: list[str], **options: object) -> str:
    """What a program printed; it must end well."""
    # LiteLLM would ask for a list of prices first, for seconds where there is no network.
    environment = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    result = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
        **options,  # type: ignore[call-overload]
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return str(result.stdout)


def run_on_page(script: str, url: str, wanted: str, profile: Path) -> str:
    """What a script logged on a page at ``url``, once that held ``wanted``."""
    browser, folder = program("chromium", "chromium-browser", "google-chrome"), node_modules()
    command = [program("node"), "page.mjs", browser, str(profile), url, wanted]
    return run(command, cwd=folder, input=script)
