"""What is imported is declared, and importing the packages costs nothing."""

import ast
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import inferneo_jax
from tests.support.paths import ROOT

ENGINE = ROOT / "inferneo_jax"
SOURCES = sorted([*ENGINE.rglob("*.py"), *(ROOT / "server").rglob("*.py")])


def _imports(file: Path) -> set[str]:
    """Dotted names of all that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _brought_by(requirements: list[str]) -> set[str]:
    """Distributions that are installed with these, and with what they need."""
    found: set[str] = set()
    left = [Requirement(text) for text in requirements]
    while left:
        name = canonicalize_name(left.pop().name)
        if name not in found:
            found.add(name)
            try:
                needed = [Requirement(text) for text in requires(name) or ()]
            except PackageNotFoundError:  # of an extra that is not installed
                continue
            left += [each for each in needed if not each.marker or each.marker.evaluate()]
    return found


def test_what_is_imported_is_installed_without_the_tests() -> None:
    """Nothing may be there by luck, because a library for tests brings it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    extra = [text for name in extras if name != "test" for text in extras[name]]
    brought = _brought_by([*project["dependencies"], *extra])
    owners = packages_distributions()
    for file in SOURCES:
        for name in {name.partition(".")[0] for name in _imports(file)} & owners.keys():
            if name not in ("inferneo_jax", "server"):
                owned = {canonicalize_name(owner) for owner in owners[name]}
                assert owned & brought, f"{file} imports {name}: nothing in pyproject.toml needs it"


def test_every_public_name_exists() -> None:
    for name in inferneo_jax.__all__:
        assert getattr(inferneo_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = inferneo_jax.nothing


def test_importing_the_command_line_loads_no_server_and_the_app_no_jax() -> None:
    code = """if True:
        import sys
        heavy = {"jax", "jaxlib", "transformers", "torch", "orbax"}
        import server.cli.main
        found = (heavy | {"numpy", "tokenizers", "quart", "hypercorn"}) & set(sys.modules)
        assert not found, found
        import server.app
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)
