"""The chips and topologies that a model can be planned for, with their makers' specifications."""

import contextlib
import math
import os
import re
from dataclasses import dataclass
from typing import Any

from inferneo_jax.errors import ConfigError
from inferneo_jax.platform.flags import GPU_MEMORY_PART


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One chip. All rates are peak rates.

    Attributes:
        name: the name in a topology.
        memory_bytes: memory that is available to programs, without what the runtime reserves.
        memory_rate: bytes per second from and to that memory.
        float_rate: bfloat16 operations per second; a multiply-add counts as two.
        int8_rate: int8 operations per second, counted in the same way.
        fp8_rate: the same of fp8; that of bfloat16 where fp8 is converted.
        link_rate: bytes per second that a chip can send to the other chips of its mesh, over all
            links together.
        host_chips: maximum number of chips per host.
    """

    name: str
    memory_bytes: int
    memory_rate: float
    float_rate: float
    int8_rate: float
    fp8_rate: float
    link_rate: float
    host_chips: int


_GIB = 2**30

CHIPS = {
    chip.name: chip
    for chip in (
        # cloud.google.com/tpu/docs/v5e, /v6e, /v5p; memory sizes are those of the TPU compiler.
        Chip(
            name="v5e",
            memory_bytes=int(15.75 * _GIB),
            memory_rate=819e9,
            float_rate=197e12,
            int8_rate=394e12,
            fp8_rate=197e12,
            link_rate=200e9,
            host_chips=8,
        ),
        Chip(
            name="v6e",
            memory_bytes=int(31.25 * _GIB),
            memory_rate=1640e9,
            float_rate=918e12,
            int8_rate=1836e12,
            fp8_rate=918e12,
            link_rate=448e9,
            host_chips=8,
        ),
        Chip(
            name="v5p",
            memory_bytes=int(95.74 * _GIB),
            memory_rate=2765e9,
            float_rate=459e12,
            int8_rate=918e12,
            fp8_rate=459e12,
            link_rate=600e9,
            host_chips=4,
        ),
        # NVIDIA H100 SXM datasheet, without sparsity; the memory is that of H100_TARGET.
        Chip(
            name="h100",
            memory_bytes=int(GPU_MEMORY_PART * 84_929_347_584),
            memory_rate=3350e9,
            float_rate=989e12,
            int8_rate=1979e12,
            fp8_rate=1979e12,
            link_rate=450e9,
            host_chips=8,
        ),
        # Roughly the share of one server core. A plan for CPUs is meant to show memory and
        # collectives.
        Chip(
            name="cpu",
            memory_bytes=16 * _GIB,
            memory_rate=20e9,
            float_rate=100e9,
            int8_rate=400e9,
            fp8_rate=100e9,
            link_rate=10e9,
            host_chips=64,
        ),
    )
}


H100_TARGET = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
runtime_version { major: 12 minor: 9 }
dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
"""
"""The description of an H100 that XLA's compiler needs where no such device is present."""


@dataclass(frozen=True)
class Topology:
    """A network of chips of one kind; ``shape`` is the number of chips along each axis."""

    chip: Chip
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def num_chips(self) -> int:
        """The total number of chips."""
        return math.prod(self.shape)

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """Parse a topology such as ``v5e:2x4``, ``v5p:2x2x1``, ``h100:8`` or ``cpu:8``.

        Raises:
            ConfigError: the text has another form, or the chip is unknown.
        """
        name, _, sizes = text.partition(":")
        if name not in CHIPS or not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3}){0,2}", sizes):
            raise ConfigError(
                f"topology is {text!r}; write chip:shape, as v5e:2x4, v6e:2x2, v5p:2x2x1, h100:8 "
                f"or cpu:8; the chips are {', '.join(CHIPS)}"
            )
        return cls(CHIPS[name], tuple(int(size) for size in sizes.split("x")))

    def devices(self) -> list[Any]:
        """Descriptions of the devices, for which programs can be compiled.

        Raises:
            ConfigError: the compiler for these chips is not installed, or does not support the
                topology.
        """
        if self.chip.name == "cpu":
            return self._cpus()
        if self.chip.name == "h100":
            return self._gpus()
        return self._tpus()

    def larger(self) -> "Topology":
        """The next larger topology of the same chips, in which the shortest axis is doubled."""
        axes = self.shape[:2] if self.chip.name == "v5p" and len(self.shape) < 3 else self.shape
        shortest = axes.index(min(axes))
        return Topology(
            self.chip, tuple(n * (2 if i == shortest else 1) for i, n in enumerate(self.shape))
        )

    def _tpus(self) -> list[Any]:
        _describe_no_tpu()
        from jax.experimental import topologies

        shape = (*self.shape, 1, 1)[:3]
        host = (2, 4, 1) if self.num_chips >= 8 and self.chip.host_chips == 8 else (2, 2, 1)
        bounds = tuple(min(a, b) for a, b in zip(host, shape, strict=True))
        name = f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
        try:
            found = topologies.get_topology_desc(name, platform="tpu", chips_per_host_bounds=bounds)
        except Exception as error:
            raise ConfigError(
                f"the TPU compiler has no {self} ({str(error).splitlines()[0]}); it is part of "
                "libtpu: pip install 'inferneo-jax[plan]', and the shapes are those of "
                "Cloud TPU"
            ) from error
        return list(found.devices)

    def _gpus(self) -> list[Any]:
        from jax.experimental import topologies

        try:
            found = topologies.get_topology_desc(
                platform="cuda", target_config=H100_TARGET, topology=f"1x1x{self.num_chips}"
            )
        except Exception as error:
            raise ConfigError(
                f"the CUDA compiler cannot be used ({str(error).splitlines()[0]}); in an "
                "environment of its own: pip install 'inferneo-jax[plan-cuda]', and set "
                "JAX_PLATFORMS=cpu"
            ) from error
        return list(found.devices)

    def _cpus(self) -> list[Any]:
        import jax

        with contextlib.suppress(RuntimeError):  # jax is initialized already; its devices are fixed
            jax.config.update("jax_num_cpu_devices", self.num_chips)
        devices = jax.devices("cpu")
        if len(devices) < self.num_chips:
            raise ConfigError(f"{self} needs {self.num_chips} CPU devices; jax has {len(devices)}")
        return devices[: self.num_chips]


def _describe_no_tpu() -> None:
    """Keep libtpu from looking for a TPU, and from failing if another process has loaded it."""
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(name, value)
