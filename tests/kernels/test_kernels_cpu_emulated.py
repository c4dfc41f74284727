"""Block formats give the same bits on processors of another architecture, which are emulated."""

import shutil
import subprocess
from pathlib import Path

import pytest

from inferneo_jax.kernels.cpu import build

_SOURCE = Path(__file__).parent / "block_checksums.cc"
_CROSS, _EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"

pytestmark = pytest.mark.skipif(
    shutil.which(_CROSS) is None or shutil.which(_EMULATOR) is None,
    reason="needs g++-aarch64-linux-gnu and qemu-user",
)


def _checksums(folder: Path, compiler: str, *flags: str, emulator: tuple[str, ...] = ()) -> str:
    """What the program prints that a compiler makes of the kernels."""
    program = folder / "checksums"
    exact = ("-std=c++17", "-O1", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")
    command = [compiler, *exact, *flags, "-I", build._NATIVE, "-o", program, _SOURCE]
    subprocess.run(command, check=True, timeout=300)
    return subprocess.run(
        [*emulator, program], check=True, timeout=300, text=True, stdout=subprocess.PIPE
    ).stdout


@pytest.mark.parametrize(
    ("instructions", "processor"),
    [("armv8-a", "cortex-a57"), ("armv8.2-a+dotprod", "max")],
)
def test_arm_gives_the_bits_of_this_processor(
    tmp_path: Path, instructions: str, processor: str
) -> None:
    compiler = build._compiler()
    assert compiler is not None
    here = _checksums(tmp_path, compiler, "-march=native")
    assert len(set(here.splitlines())) == 12
    there = _checksums(
        tmp_path,
        _CROSS,
        "-static",
        f"-march={instructions}",
        emulator=(_EMULATOR, "-cpu", processor),
    )
    assert there == here
