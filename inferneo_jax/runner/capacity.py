"""How long a sequence may be and how many pages the cache has: programs that fit their devices."""

import dataclasses
import logging
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from inferneo_jax.config import EngineConfig
from inferneo_jax.errors import ConfigError
from inferneo_jax.platform.memory import free_memory, total_memory
from inferneo_jax.runner.backends import DecoderBackend
from inferneo_jax.runner.programs import Programs
from inferneo_jax.sharding import mesh as meshes

log = logging.getLogger(__name__)


def make_programs(
    backend: DecoderBackend,
    config: EngineConfig,
    cache_budget: Callable[[], int],
    draft: DecoderBackend | None = None,
) -> Programs:
    """The programs of a model, with a cache that fits.

    Args:
        backend: of the model, in the quantization that its weights have.
        config: of the engine.
        cache_budget: bytes that one device can give the cache; called if the configuration leaves
            its size open.
        draft: how the draft model runs; None: there is none.

    Raises:
        ConfigError: the longest sequence does not fit the cache, or the mesh does not divide the
            slots.
    """
    dp_size = meshes.parts(backend.mesh, "slots")
    one_page = Programs(backend, config, 1, 1, draft)
    if (slots := one_page.batch.slots) % dp_size:
        raise ConfigError(f"slots is {slots}; it must be a multiple of data={dp_size}")
    max_len, pages = _cache_size(one_page, cache_budget)
    return dataclasses.replace(one_page, max_len=max_len, num_pages=pages + 1)


def devices_sharing_memory(mesh: Mesh) -> int:
    """Devices of the mesh in this process that share one memory: CPU devices all do."""
    if mesh.devices.flat[0].platform != "cpu":
        return 1
    return sum(device.process_index == jax.process_index() for device in mesh.devices.flat)


def cache_budget(platform: str, *, total: int, free: int) -> int:
    """Bytes of one device for the KV cache.

    Nine tenths of what an accelerator has left; the rest is for the state of the slots, programs
    and their temporaries. A sixteenth of a CPU's memory, which is not for the server alone.

    Args:
        platform: of the device.
        total: bytes of memory that the device has, or its share of the host's.
        free: bytes that are left once the weights are placed.
    """
    return total // 16 if platform == "cpu" else int(0.9 * free)


def measured_cache_budget(mesh: Mesh, weight_bytes: int) -> int:
    """Bytes of one device here for the KV cache, before ``weight_bytes`` are placed on it."""
    return cache_budget(
        mesh.devices.flat[0].platform,
        total=total_memory() // devices_sharing_memory(mesh),
        free=free_memory() - weight_bytes,
    )


def _cache_size(programs: Programs, budget: Callable[[], int]) -> tuple[int, int]:
    """The longest sequence, in tokens, and the pages of one data-parallel rank's cache.

    The programs given have a cache of one page.
    """
    config, dp_size, page_len = programs.config, programs.dp_size, programs.page_len
    token_bytes = programs.token_bytes
    context_length = programs.backend.model.context_length
    if config.max_len is not None and config.max_len > context_length:
        log.warning(
            "max_len is %d, but the model's context is %d tokens, and no request gets more",
            config.max_len,
            context_length,
        )
    longest = min(config.max_len or context_length, context_length)
    if config.kv_tokens:
        tokens = config.kv_tokens // dp_size
    else:
        tokens = min(programs.batch.slots // dp_size * longest, budget() // token_bytes)
    pages = tokens // page_len
    max_len = longest if config.max_len else min(longest, pages * page_len)
    if max_len > pages * page_len or max_len < 2:
        raise ConfigError(
            f"max_len is {max_len} tokens but the KV cache of "
            f"{'each data-parallel rank' if dp_size > 1 else 'the model'} holds {pages * page_len} "
            f"({token_bytes} bytes each on a device); lower max_len or raise kv_tokens"
        )
    return max_len, pages
