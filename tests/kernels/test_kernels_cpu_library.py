"""The library of the CPU's kernels is compiled once, whole, or not at all and with a word."""

import errno
import logging
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from inferneo_jax.kernels.cpu import build
from inferneo_jax.kernels.cpu.build import library

pytestmark = pytest.mark.skipif(library() is None, reason="needs a C++ compiler")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder with nothing in it, and kernels that compile in no time."""
    monkeypatch.setattr(build, "_MADE", {})
    monkeypatch.setattr(build, "_NATIVE", tmp_path / "native")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "native").mkdir()
    (tmp_path / "native" / "bindings.cc").write_text('extern "C" int two() { return 2; }')
    return tmp_path / "inferneo" / "kernels"


def test_without_a_compiler_there_is_no_library_and_one_warning(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.WARNING, build.__name__):
        assert library() is None
        assert library() is None
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "no C++ compiler was found"
    ]
    assert "apt-get install g++" in caplog.text
    assert not fresh.exists()


def test_a_compiler_that_fails_is_told_of(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "false")
    assert library() is None
    assert "false cannot compile the kernels" in caplog.text


def test_a_library_that_was_cut_short_is_made_again(fresh: Path) -> None:
    made = library("portable")
    assert made is not None
    whole = made.path.read_bytes()
    made.path.unlink()  # not truncated in place: this process has it mapped
    made.path.write_bytes(whole[:1000])
    build._MADE.clear()
    again = library("portable")
    assert again is not None
    assert again.path.read_bytes() == whole
    assert list(fresh.iterdir()) == [again.path]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_home_that_cannot_be_written_to_costs_only_time(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    made = library("portable")
    assert made is not None
    assert not made.path.is_relative_to(fresh)
    monkeypatch.undo()
    shutil.rmtree(made.path.parent)


def test_processes_may_build_at_once(fresh: Path) -> None:
    code = (
        "import sys, pathlib; from inferneo_jax.kernels.cpu import build; "
        "build._NATIVE = pathlib.Path(sys.argv[1]); print(build.library('portable').path)"
    )

    def start(_: int) -> str:
        command = [sys.executable, "-c", code, str(build._NATIVE)]
        return subprocess.run(command, stdout=-1, text=True, timeout=120, check=True).stdout.strip()

    with ThreadPoolExecutor(2) as pool:
        paths = set(pool.map(start, range(2)))
    assert {Path(each).parent for each in paths} == {fresh}
    assert paths >= {str(each) for each in fresh.iterdir()}
