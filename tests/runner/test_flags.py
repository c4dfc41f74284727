"""The flags that are set for an accelerator."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from inferneo_jax.platform import flags
from inferneo_jax.platform.flags import (
    GPU_FLAGS,
    accelerator,
    expected_platform,
    nvidia_driver,
    set_flags,
)

ASKED = next(flag.value for flag in GPU_FLAGS if flag.variable == "XLA_FLAGS")


@pytest.fixture
def gpu(tmp_path: Path) -> Path:
    """The files of a machine with a GPU."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidiactl").touch()
    (tmp_path / "proc" / "driver" / "nvidia").mkdir(parents=True)
    (tmp_path / "proc" / "driver" / "nvidia" / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n"
        "GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04.2)\n"
    )
    return tmp_path


def test_a_gpu_has_all_of_them_set_once(gpu: Path) -> None:
    environment = {"XLA_FLAGS": "--xla_dump_to=/tmp/dump"}
    for _ in range(2):
        assert set_flags(environment, gpu) == list(GPU_FLAGS)
    assert environment == {
        "XLA_FLAGS": f"--xla_dump_to=/tmp/dump {ASKED}",
        "XLA_CLIENT_MEM_FRACTION": "0.92",
        "PJRT_GPU_ENABLE_ASYNC_DISPATCH": "1",
    }


def test_what_the_environment_says_stays(gpu: Path) -> None:
    own = {
        "XLA_FLAGS": "--xla_gpu_enable_command_buffer=",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5",  # the older name, which JAX refuses beside the new
        "PJRT_GPU_ENABLE_ASYNC_DISPATCH": "0",
    }
    environment = dict(own)
    assert set_flags(environment, gpu) == []
    assert environment == own


@pytest.mark.parametrize("platforms", ["cpu", "tpu,cpu"])
def test_nothing_is_set_for_other_platforms(gpu: Path, platforms: str) -> None:
    environment = {"JAX_PLATFORMS": platforms}
    assert set_flags(environment, gpu) == []
    assert environment == {"JAX_PLATFORMS": platforms}


def test_nothing_is_set_without_a_gpu(tmp_path: Path) -> None:
    environment: dict[str, str] = {}
    assert accelerator(tmp_path) is None
    (tmp_path / "dev" / "vfio").mkdir(parents=True)
    (tmp_path / "dev" / "vfio" / "vfio").touch()
    assert accelerator(tmp_path) is None
    (tmp_path / "dev" / "vfio" / "3").touch()
    assert accelerator(tmp_path) == "tpu"
    assert set_flags(environment, tmp_path) == []
    assert not environment


@pytest.mark.parametrize(
    ("installed", "platforms", "expected"),
    [
        (["jax_cuda12_plugin"], "", "gpu"),
        (["jax_cuda13_plugin"], "cuda,cpu", "gpu"),
        (["jax_cuda13_plugin"], "cpu", "cpu"),
        (["libtpu"], "", "cpu"),
        ([], "", "cpu"),
    ],
)
def test_a_gpu_is_expected_where_jax_can_use_it(
    gpu: Path,
    monkeypatch: pytest.MonkeyPatch,
    installed: list[str],
    platforms: str,
    expected: str,
) -> None:
    monkeypatch.setattr(flags, "find_spec", lambda name: name in installed or None)
    assert expected_platform({"JAX_PLATFORMS": platforms}, gpu) == expected


def test_the_driver_is_the_one_that_the_kernel_names(gpu: Path, tmp_path: Path) -> None:
    assert nvidia_driver(gpu) == "580.95.05"
    assert nvidia_driver(tmp_path / "dev") is None


def test_this_xla_knows_the_flags() -> None:
    """XLA ends a process that has flags which it does not know, or values that it cannot read."""

    def computes(flag: str) -> bool:
        code = "import jax; print(jax.jit(lambda x: x + 1)(1))"
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flag}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        return done.returncode == 0 and done.stdout.strip() == "2"

    assert computes(ASKED)
    assert not computes(ASKED.replace("WHILE", "NO_SUCH_KIND"))
