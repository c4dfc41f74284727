"""Phi-3 and Phi-4: Llama's layout with fused QKV and gate-up tensors."""

import numpy as np

from inferneo_jax.config import DecoderConfig
from inferneo_jax.models.families import llama
from inferneo_jax.models.families.family import (
    Array,
    Family,
    SourceTensor,
    WeightMapping,
    transposed,
)


def weight_map(config: DecoderConfig) -> dict[str, WeightMapping]:
    """Llama's weight map, except for the two weights that Phi-3 stores fused in its own order."""
    weights = llama.weight_map(config)
    width, mlp, dim = config.hidden_size, config.mlp_size, config.head_dim
    queries, keys = config.num_heads * dim, config.num_kv_heads * dim

    def qkv(rows: Array) -> Array:
        return llama.fuse_heads(config, *np.split(rows, [queries, queries + keys]))

    shape = width, config.num_kv_heads, config.group_size + 2, dim
    for index in range(config.num_layers):
        source, ours = f"model.layers.{index}", f"layers.{index}"
        weights[f"{ours}.attention.qkv.kernel"] = WeightMapping(
            (SourceTensor(f"{source}.self_attn.qkv_proj.weight", (queries + 2 * keys, width)),),
            shape,
            qkv,
            kernel=True,
        )
        weights[f"{ours}.mlp.gate_up.kernel"] = transposed(
            f"{source}.mlp.gate_up_proj.weight", 2 * mlp, width, width, 2, mlp
        )
    return weights


PHI3 = Family(
    name="phi3",
    kind="decoder",
    architectures=frozenset({"Phi3ForCausalLM"}),
    model_types=frozenset({"phi3"}),
    read_config=llama.read_config,
    weight_map=weight_map,
    ignored=llama.ignored,
)
