"""The notebooks, run from top to bottom as their readers do."""

import importlib.util
import os
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.paths import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs(
    file: Path, real_checkpoints: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in list(os.environ):
        if name.startswith("INFERNEO_") or name == "XLA_FLAGS":
            monkeypatch.delenv(name)
    monkeypatch.setenv("INFERNEO_CHECKPOINTS", str(real_checkpoints))
    if file.stem == "quickstart":  # as tpu_vm on one device, which then finds its programs compiled
        monkeypatch.setenv("INFERNEO_MESH", "data=1,model=1")
    monkeypatch.setenv("PYTHONPATH", str(file.parents[1]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(file, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear its outputs first"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())
    )
    assert {"quickstart": "Tokyo", "tpu_vm": "tokens in", "plan": "all-reduce"}[file.stem] in said


@pytest.mark.parametrize(
    ("file", "command", "notebook", "extra"),
    [
        ("vfio/0", None, "quickstart", "[tpu]"),
        ("vfio/3", None, "tpu_vm", "[tpu]"),
        ("accel0", None, "tpu_vm", "[tpu]"),
        ("vfio/vfio", "/usr/bin/nvidia-smi", "quickstart", "[cuda12]"),
        ("null", None, "quickstart", ""),
        ("null", None, "tpu_vm", ""),
    ],
)
def test_what_is_installed_is_for_the_machine_that_colab_lends(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    file: str,
    command: str | None,
    notebook: str,
    extra: str,
) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(shutil, "which", lambda _: command)
    cells = nbformat.read(ROOT / "notebooks" / f"{notebook}.ipynb", as_version=4).cells
    code = next(cell.source for cell in cells if cell.cell_type == "code")
    code = code.replace('"/dev"', repr(str(tmp_path)))
    found: dict[str, str] = {}
    exec(code.replace('%pip install --quiet "inferneo-jax{extra}" openai', "asked = extra"), found)
    assert found["asked"] == extra
