"""The import rules of docs/architecture.md, read from the source itself."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
    named = set(re.findall(r"[a-z_]+\.py\b", text.split("```")[1]))
    there = {file.name for file in SOURCES}
    assert not named - there, "docs/architecture.md names modules that are gone"
    top = {file.name for file in SOURCES if file.parent.parent == ROOT} - {"__init__.py"}
    folders = {f"{file.parent.name}/" for file in SOURCES if file.parent.parent.parent == ROOT}
    missing = (top - named) | {folder for folder in folders if folder not in text}
    assert not missing, "the map in docs/architecture.md lacks them"
