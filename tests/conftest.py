"""Strictness for every test, and the models that tests share."""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
for _package in ("layers", "models", "cache", "sampling", "steps"):
    install_import_hook(f"inferneo_jax.{_package}", "beartype.beartype")
