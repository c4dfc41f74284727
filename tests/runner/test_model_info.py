"""What is said of a loaded model and of its devices."""

import jax
import pytest

from inferneo_jax import device_memory
from inferneo_jax.platform import memory
from tests.support.tiny_model import TINY, make_runner, tiny_weights


class Device:
    """An accelerator, as JAX shows it."""

    def __init__(self, number: int, stats: dict[str, int] | None, platform: str = "gpu") -> None:
        self.id, self.platform, self._stats = number, platform, stats

    def memory_stats(self) -> dict[str, int] | None:
        return self._stats


def test_a_model_says_what_it_is_made_of() -> None:
    weights = tiny_weights()
    info = make_runner().info()
    assert (info.dtype, info.quantization, info.kernels) == ("float32", "none", "xla")
    assert (info.mesh, info.device) == ("data=1,model=1", "cpu")
    assert info.weight_bytes == sum(each.nbytes for each in jax.tree.leaves(weights))
    token_bytes = 2 * TINY.num_layers * TINY.num_kv_heads * TINY.head_dim * 4
    pages = 160 // 4 + 1  # page 0 is nobody's
    assert info.cache_bytes == pages * 4 * token_bytes


def test_memory_is_told_of_accelerators_that_tell_theirs() -> None:
    known = {"bytes_in_use": 3, "bytes_limit": 7, "peak_bytes_in_use": 5}
    devices = [Device(0, known), Device(1, None), Device(2, {}), Device(3, known, "cpu")]
    assert [(each.device, each.used, each.limit) for each in device_memory(devices)] == [
        ("gpu:0", 3, 7)
    ]
    assert device_memory() == []  # CPUs


def test_free_memory_is_that_of_the_fullest_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    empty, full = {"bytes_in_use": 3, "bytes_limit": 20}, {"bytes_in_use": 15, "bytes_limit": 20}
    devices = [Device(0, empty), Device(1, full), Device(2, None)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert memory.free_memory() == 5
