from pathlib import Path

import numpy as np
import pytest

from inferneo_jax.errors import ConfigError
from inferneo_jax.models import weight_specs
from inferneo_jax.models.families import FAMILIES, find_family, qwen3
from tests.support.paths import ROOT
from tests.support.weights import joined

CONFIGS = ["llama", "mistral", "qwen2", "qwen3", "phi3", "bert", "nomic_bert"]


def config_of(made, model_type):
    if model_type in ("bert", "nomic_bert"):
        return {"bert": made.BERT, "nomic_bert": made.NOMIC_BERT}[model_type]
    return made.LLAMA | {"model_type": model_type, "architectures": None, "head_dim": 16}


def made_weights(config):
    family = find_family(config)
    model = family.read_config(config)
    rng = np.random.default_rng(1)
    sources = {}
    weights = {}
    for name, mapping in family.weight_map(model).items():
        arrays = [rng.standard_normal(p.shape).astype(np.float32) for p in mapping.tensors]
        sources |= {p.name: a for p, a in zip(mapping.tensors, arrays, strict=True)}
        weights[name] = joined(mapping, *arrays)
    return model, sources, weights


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_recipes_make_exactly_the_declared_weights(made, model_type, tied):
    config = config_of(made, model_type) | {"tie_word_embeddings": tied}
    model, _, weights = made_weights(config)
    declared = {name: spec.shape for name, spec in weight_specs(model).items()}
    assert {name: array.shape for name, array in weights.items()} == declared


def test_fused_projections_equal_the_separate_ones(made):
    model, sources, weights = made_weights(config_of(made, "qwen2"))
    x = np.random.default_rng(2).standard_normal(model.hidden_size).astype(np.float32)
    prefix, dim, group = "model.layers.1.self_attn", model.head_dim, model.group_size
    fused = np.einsum("e,ekgd->kgd", x, weights["layers.1.attention.qkv.kernel"])
    fused += weights["layers.1.attention.qkv.bias"]
    for entry, (name, heads) in enumerate(
        {
            "q_proj": model.num_heads,
            "k_proj": model.num_kv_heads,
            "v_proj": model.num_kv_heads,
        }.items()
    ):
        plain = sources[f"{prefix}.{name}.weight"] @ x + sources[f"{prefix}.{name}.bias"]
        for head, expected in enumerate(plain.reshape(heads, dim)):
            if name == "q_proj":
                found = fused[head // group, head % group]
            else:
                found = fused[head, group + entry - 1]
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    mixed = np.random.default_rng(3).standard_normal(model.num_heads * dim).astype(np.float32)
    out = np.einsum(
        "kgd,kgde->e", mixed.reshape(-1, group, dim), weights["layers.1.attention.out.kernel"]
    )
    np.testing.assert_allclose(
        out, sources[f"{prefix}.o_proj.weight"] @ mixed, rtol=1e-4, atol=1e-4
    )
    gate_up = np.einsum("e,eif->if", x, weights["layers.1.mlp.gate_up.kernel"])
    for row, name in zip(gate_up, ("gate_proj", "up_proj"), strict=True):
        expected = sources[f"model.layers.1.mlp.{name}.weight"] @ x
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-5)


def test_fused_encoder_projections_equal_the_separate_ones(made):
    model, sources, weights = made_weights(made.BERT)
    x = np.random.default_rng(2).standard_normal(model.hidden_size).astype(np.float32)
    fused = np.einsum("e,eshd->shd", x, weights["layers.0.attention.qkv.kernel"])
    fused += weights["layers.0.attention.qkv.bias"]
    prefix = "encoder.layer.0.attention"
    for row, name in zip(fused, ("query", "key", "value"), strict=True):
        expected = sources[f"{prefix}.self.{name}.weight"] @ x
        expected += sources[f"{prefix}.self.{name}.bias"]
        np.testing.assert_allclose(row.ravel(), expected, rtol=1e-4, atol=1e-5)
    out = np.einsum(
        "hd,hde->e", x.reshape(model.num_heads, -1), weights["layers.0.attention.out.kernel"]
    )
    expected = sources[f"{prefix}.output.dense.weight"] @ x
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sliding_window": 64}, "sliding_window"),
        ({"layer_types": ["sliding_attention"]}, "sliding_attention"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "relu"}, "relu"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_kv_heads"),
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ],
)
def test_what_the_forward_pass_does_not_do_is_refused(made, change, named):
    config = made.LLAMA | change
    with pytest.raises(ConfigError, match=named):
        find_family(config).read_config(config)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_act": "gelu_new"}, "gelu_new"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"is_decoder": True}, "is_decoder"),
        ({"sentence_transformers": {"max_seq_length": 65}}, "65"),
        ({"sentence_transformers": {"pooling": "lasttoken"}}, "lasttoken"),
    ],
)
def test_what_the_encoder_does_not_do_is_refused(made, change, named):
    config = made.BERT | change
    with pytest.raises(ConfigError, match=named):
        find_family(config).read_config(config)


NOMIC = {
    "architectures": ["NomicBertModel"],
    "model_type": "nomic_bert",
    "activation_function": "swiglu",
    "causal": False,
    "layer_norm_epsilon": 1e-12,
    "max_trained_positions": 2048,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "n_embd": 768,
    "n_head": 12,
    "n_inner": 3072,
    "n_layer": 12,
    "n_positions": 8192,
    "parallel_block": False,
    "prenorm": False,
    "qkv_proj_bias": False,
    "rotary_emb_base": 1000,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "rotary_scaling_factor": None,
    "type_vocab_size": 2,
    "use_rms_norm": False,
    "vocab_size": 30528,
}
"""Of nomic-embed-text-v1.5, in the keys of nomic's own code."""


def test_nomics_own_keys_say_what_those_of_transformers_say(made):
    read = find_family(NOMIC).read_config
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
    sizes |= {"num_attention_heads": 12, "vocab_size": 30528, "max_position_embeddings": 2048}
    theirs = read(made.NOMIC_BERT | sizes)
    assert read(NOMIC | {"n_positions": 2048}) == theirs
    assert (theirs.rope_theta, theirs.mlp, theirs.biases) == (1000.0, "swiglu", False)
    rope = {"rope_type": "default", "rope_theta": 500.0}
    assert read(made.NOMIC_BERT | {"rope_parameters": rope}).rope_theta == 500.0


def test_nomic_bert_reads_as_much_as_it_was_trained_for():
    read = find_family(NOMIC).read_config
    assert read(NOMIC).max_tokens == 2048
    assert read(NOMIC | {"sentence_transformers": {"max_seq_length": 8192}}).max_tokens == 2048
    assert read(NOMIC | {"sentence_transformers": {"max_seq_length": 512}}).max_tokens == 512
    assert read(NOMIC | {"n_positions": 512}).max_tokens == 512


@pytest.mark.parametrize(
    "change",
    [
        {"activation_function": "gelu"},
        {"moe_every_n_layers": 2},
        {"prenorm": True},
        {"qkv_proj_bias": True},
        {"rotary_emb_fraction": 0.5},
        {"rotary_emb_interleaved": True},
        {"use_rms_norm": True},
        {"rope_parameters": {"rope_type": "yarn"}},
        {"sentence_transformers": {"pooling": "last"}},
        {"rotary_emb_base": -1},
        {"n_head": 7},
    ],
)
def test_what_nomic_bert_does_not_do_is_refused(change):
    (key,) = change
    named = {
        "rope_parameters": "rope_type",
        "sentence_transformers": "pooling",
        "rotary_emb_base": "rope_theta",
        "n_head": "num_heads",
    }
    with pytest.raises(ConfigError, match=named.get(key, key)):
        find_family(NOMIC).read_config(NOMIC | change)


def test_rope_is_read_from_both_generations_of_configs(made):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    old = made.LLAMA | {"rope_theta": 5e5, "rope_scaling": scaling}
    new = made.LLAMA | {"rope_theta": None, "rope_parameters": scaling | {"rope_theta": 5e5}}
    read = find_family(old).read_config
    assert read(old) == read(new)
    assert read(old).rope_theta == 5e5
    assert read(old).rope_scaling.original_context_length == 64
    assert (
        read(made.LLAMA | {"rope_scaling": {"type": "linear", "factor": 2}}).rope_scaling.factor
        == 2
    )


def test_a_window_that_hides_nothing_is_accepted(made):
    for change in ({"sliding_window": 128}, {"sliding_window": 8, "use_sliding_window": False}):
        config = made.LLAMA | change
        assert find_family(config).read_config(config).context_length == 128


def test_each_architecture_belongs_to_one_family():
    names = [name for family in FAMILIES for name in family.architectures | family.model_types]
    assert len(names) == len(set(names))


def test_the_manuals_example_is_the_file():
    manual = ROOT / "docs" / "models.md"
    assert Path(qwen3.__file__).read_text(encoding="utf-8") in manual.read_text(encoding="utf-8")
