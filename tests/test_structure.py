"""The import rules of docs/architecture.md, read from the source itself."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import inferneo_jax

ROOT = Path(__file__).parent.parent
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


def _touches(file: Path, *packages: str) -> set[str]:
    return {
        name
        for name in _imports(file)
        if any(name == package or name.startswith(f"{package}.") for package in packages)
    }


def test_the_engine_knows_no_http() -> None:
    for file in ENGINE.rglob("*.py"):
        assert not _touches(file, "quart", "hypercorn", "pydantic", "server"), file


@pytest.mark.parametrize("name", ["scheduler", "plans", "prefill", "sequence", "pages", "request"])
def test_the_hosts_side_imports_no_jax(name: str) -> None:
    assert not _touches(ENGINE / f"{name}.py", "jax", "jaxlib", "flax", "jaxtyping")


@pytest.mark.parametrize("name", ["models", "layers", "cache.py", "sampling.py", "steps.py"])
def test_the_devices_side_knows_no_requests(name: str) -> None:
    place = ENGINE / name
    for file in [place] if place.suffix else place.rglob("*.py"):
        known = ("request", "sequence", "scheduler", "engine", "runner", "rows")
        assert not _touches(file, *(f"inferneo_jax.{module}" for module in known)), file


def test_the_server_uses_public_names_only() -> None:
    allowed = ("inferneo_jax.weights.fetch", "inferneo_jax.weights.catalog")
    for file in (ROOT / "server").rglob("*.py"):
        if file.name in ("cli.py", "plan_cli.py"):
            continue  # converts, lists and plans models, which no server does
        for name in _touches(file, "inferneo_jax"):
            public = name.removeprefix("inferneo_jax.")
            assert public in inferneo_jax.__all__ or name.startswith(allowed), f"{file}: {name}"


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


def test_importing_the_app_loads_no_jax() -> None:
    code = (
        "import sys, server.app; "
        "heavy = {'jax', 'transformers', 'torch', 'orbax'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_is_two_rooms(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 320


def test_the_map_names_every_module_and_no_other() -> None:
    """Packages stand for what is in them; of their modules those are named that need a word."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    text = text.partition("## Where things are")[2].partition("\n## ")[0]
    named = set(re.findall(r"[a-z0-9_]+\.py\b", text))
    there = {file.name for file in SOURCES}
    assert not named - there, "docs/architecture.md names modules that are gone"
    top = {file.name for file in SOURCES if file.parent.parent == ROOT} - {"__init__.py"}
    folders = {f"{file.parent.name}/" for file in SOURCES if file.parent.parent.parent == ROOT}
    missing = (top - named) | {folder for folder in folders if folder not in text}
    assert not missing, "the map in docs/architecture.md lacks them"
