"""Hooks before a commit: they run what the virtual environment has, and refuse what it refuses."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.deploy.files import SCRIPTS, check, read
from tests.support.paths import ROOT

CONFIG = ROOT / ".pre-commit-config.yaml"
HOOKS = {hook["id"]: hook for repo in read(CONFIG)["repos"] for hook in repo["hooks"]}
SMALL = ("conflicts", "image", "manifests", "dashboard")


def test_every_hook_is_a_program_of_ours() -> None:
    check(SCRIPTS / "pre-commit", "validate-config", CONFIG)
    assert [repo["repo"] for repo in read(CONFIG)["repos"]] == ["local"]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for hook in HOOKS.values():
        program, argument, *_ = [*hook["entry"].split(), ""]
        assert hook["language"] == "system"
        if program == "make":
            assert argument in targets
        else:
            assert (SCRIPTS / Path(program).name).exists()
            assert program.startswith(".venv/bin/")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository of what the quick hooks look at."""
    top = ("Dockerfile", "Makefile", ".pre-commit-config.yaml")
    for name in top:
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "docs" / "deploy", tmp_path / "docs" / "deploy")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "bin").symlink_to(SCRIPTS)
    check("git", "init", "--quiet", cwd=tmp_path)
    check("git", "add", *top, "docs", cwd=tmp_path)
    return tmp_path


def run(hook: str, folder: Path) -> int:
    command = [SCRIPTS / "pre-commit", "run", hook, "--all-files"]
    cache = os.environ | {"PRE_COMMIT_HOME": str(folder / ".cache")}
    return subprocess.run(command, cwd=folder, env=cache, check=False).returncode


@pytest.mark.parametrize("hook", SMALL)
def test_what_is_good_passes_and_what_is_not_does_not(hook: str, checkout: Path) -> None:
    assert run(hook, checkout) == 0
    spoilt = {
        "conflicts": ("docs/deploy/server.yaml", "\nmetadata:", f"\n{'<' * 7} HEAD\nmetadata:"),
        "image": ("Dockerfile", "WORKDIR /source", "WORKDIR source"),
        "manifests": ("docs/deploy/server.yaml", "terminationGrace", "terminalGrace"),
        "dashboard": ("docs/deploy/grafana/dashboards/inferneo.json", "Now", "Then"),
    }
    name, good, bad = spoilt[hook]
    text = (checkout / name).read_text()
    assert good in text
    (checkout / name).write_text(text.replace(good, bad))
    check("git", "add", name, cwd=checkout)
    assert run(hook, checkout) != 0


@pytest.mark.parametrize(
    "marker", ["<<<<<<< HEAD", "|||||||", "||||||| 1a2b", "=======", ">>>>>>> main"]
)
def test_markers_of_conflicts_are_refused_wherever_git_looks(marker: str, checkout: Path) -> None:
    make = ["make", "--no-print-directory", "conflicts"]
    page = checkout / "docs" / "page.md"
    page.write_text(f"one\n{marker}\ntwo\n")
    assert subprocess.run(make, cwd=checkout, check=False).returncode == 0, "it is not tracked"
    check("git", "add", "docs/page.md", cwd=checkout)
    found = subprocess.run(make, cwd=checkout, capture_output=True, text=True, check=False)
    assert found.returncode != 0
    assert found.stdout == f"docs/page.md:2:{marker}\n"
    page.write_text(f"one {marker}\n{marker[:7]}{marker[:2]}\n")
    assert subprocess.run(make, cwd=checkout, check=False).returncode == 0
    shutil.rmtree(checkout / ".git")
    page.write_text(f"{marker}\n")
    assert subprocess.run(make, cwd=checkout, check=False).returncode == 0, "nothing is tracked"


def test_lint_refuses_markers_of_conflicts() -> None:
    plan = ["make", "--dry-run", "--no-print-directory"]
    conflicts, lint = (
        subprocess.run([*plan, target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for target in ("conflicts", "lint")
    )
    assert conflicts in lint
