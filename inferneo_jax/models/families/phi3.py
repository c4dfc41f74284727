"""Phi-3 and Phi-4: the Llama layout with queries, keys and values in one tensor, so gate and up."""

import numpy as np

from inferneo_jax.config import DecoderConfig
from inferneo_jax.models.families import llama
from inferneo_jax.models.families.family import Array, Family, Part, Recipe


def recipes(config: DecoderConfig) -> dict[str, Recipe]:
    """Llama's, but for the two weights that a Phi-3 checkpoint has fused in its own order."""
    made = llama.recipes(config)
    width, mlp, dim = config.hidden_size, config.mlp_size, config.head_dim
    queries, keys = config.num_heads * dim, config.num_kv_heads * dim

    def qkv(rows: Array) -> Array:
        return llama.fuse_heads(config, *np.split(rows, [queries, queries + keys]))

    def gate_up(rows: Array) -> Array:
        return np.stack([half.T for half in np.split(rows, 2)], axis=1)

    for index in range(config.num_layers):
        source, ours = f"model.layers.{index}", f"layers.{index}"
        made[f"{ours}.attention.qkv.kernel"] = Recipe(
            (Part(f"{source}.self_attn.qkv_proj.weight", (queries + 2 * keys, width)),), qkv
        )
        made[f"{ours}.mlp.gate_up.kernel"] = Recipe(
            (Part(f"{source}.mlp.gate_up_proj.weight", (2 * mlp, width)),), gate_up
        )
    return made


PHI3 = Family(
    name="phi3",
    kind="decoder",
    architectures=frozenset({"Phi3ForCausalLM"}),
    model_types=frozenset({"phi3"}),
    read_config=llama.read_config,
    recipes=recipes,
    ignored=llama.ignored,
)
