"""A runner whose programs answer at once, so that what is left of a step is the host's part.

The engine, the scheduler and the runner are the real ones, and so are the shapes of all programs.
Every sampled token is 0.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from inferneo_jax.config import DecoderConfig, EngineConfig
from inferneo_jax.runner.runner import Runner
from tests.support.tiny_model import TINY, TINY_ENGINE, make_runner

INSTANT_ENGINE = dataclasses.replace(
    TINY_ENGINE,
    slots=256,
    page_len=16,
    kv_tokens=2**15,
    prefill_chunks=(256,),
    row_buckets=(16, 64, 256),
    compilation_cache=None,
)


def instant_runner(
    config: EngineConfig = INSTANT_ENGINE,
    model: DecoderConfig = TINY,
    note: Callable[[Any, Any], Any] = lambda _, results: results,
    **fields: Any,
) -> Runner:
    """A runner of the tiny model with programs that return zeros instead of computing.

    Args:
        config: of the engine.
        model: what has the shapes of the programs.
        note: called with a program's key and its results whenever it is dispatched; returns the
            results.
        fields: changes of the configuration.
    """
    runner = make_runner(dataclasses.replace(config, **fields), model)

    def program(key: Any) -> Callable[..., Any]:
        shapes = runner._programs.lower(key).out_info
        zeros = jax.tree.map(lambda each: jnp.zeros(each.shape, each.dtype), shapes)
        return lambda *_: note(key, zeros)

    runner._compiled = {key: program(key) for key in runner._programs.all_keys()}
    return runner
