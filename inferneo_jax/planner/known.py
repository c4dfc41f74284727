"""The sizes of models that a plan can name by Hugging Face id, from published configurations."""

from dataclasses import replace

from inferneo_jax.config import DecoderConfig, RopeScaling


def _model(
    vocab_size: int,
    hidden_size: int,
    mlp_size: int,
    num_layers: int,
    heads: tuple[int, int],
    context_length: int,
    *,
    head_dim: int = 0,
    rope_theta: float = 10_000.0,
    norm_eps: float = 1e-5,
    rope_scaling: RopeScaling | None = None,
    tied: bool = False,
    qkv_bias: bool = False,
    qk_norm: bool = False,
) -> DecoderConfig:
    """Build a configuration; ``heads`` holds the numbers of query heads and KV heads."""
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        mlp_size=mlp_size,
        num_layers=num_layers,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim or hidden_size // heads[0],
        context_length=context_length,
        norm_eps=norm_eps,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tie_embeddings=tied,
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
    )


def _llama3(factor: float, *sizes: int, heads: tuple[int, int], **more: bool) -> DecoderConfig:
    scaling = RopeScaling(kind="llama3", factor=factor)
    model = _model(128_256, sizes[0], sizes[1], sizes[2], heads, 131_072, **more)  # type: ignore[arg-type]
    return replace(model, rope_theta=500_000.0, rope_scaling=scaling)


def _qwen25(vocab: int, *sizes: int, heads: tuple[int, int], tied: bool = False) -> DecoderConfig:
    model = _model(vocab, sizes[0], sizes[1], sizes[2], heads, 32_768, tied=tied, qkv_bias=True)
    return replace(model, rope_theta=1_000_000.0, norm_eps=1e-6)


def _qwen3(*sizes: int, heads: tuple[int, int], tied: bool = False) -> DecoderConfig:
    model = _model(
        151_936, sizes[0], sizes[1], sizes[2], heads, 40_960, head_dim=128, tied=tied, qk_norm=True
    )
    return replace(model, rope_theta=1_000_000.0, norm_eps=1e-6)


_LLAMA_2_7B = _model(32_000, 4096, 11_008, 32, (32, 32), 4096)
_LLAMA_2_13B = _model(32_000, 5120, 13_824, 40, (40, 40), 4096)
_LLAMA_2_70B = _model(32_000, 8192, 28_672, 80, (64, 8), 4096)
_LLAMA_31_8B = _llama3(8.0, 4096, 14_336, 32, heads=(32, 8))
_LLAMA_31_70B = _llama3(8.0, 8192, 28_672, 80, heads=(64, 8))
_LLAMA_32_1B = _llama3(32.0, 2048, 8192, 16, heads=(32, 8), tied=True)
_LLAMA_32_3B = _llama3(32.0, 3072, 8192, 28, heads=(24, 8), tied=True)
_MISTRAL_7B = _model(32_768, 4096, 14_336, 32, (32, 8), 32_768, rope_theta=1_000_000.0)
_SMOLLM2 = {
    "135M": _model(49_152, 576, 1536, 30, (9, 3), 8192, rope_theta=100_000.0, tied=True),
    "360M": _model(49_152, 960, 2560, 32, (15, 5), 8192, rope_theta=100_000.0, tied=True),
    "1.7B": _model(49_152, 2048, 8192, 24, (32, 32), 8192, rope_theta=130_000.0, tied=True),
}
_QWEN25 = {
    "0.5B": _qwen25(151_936, 896, 4864, 24, heads=(14, 2), tied=True),
    "1.5B": _qwen25(151_936, 1536, 8960, 28, heads=(12, 2), tied=True),
    "3B": _qwen25(151_936, 2048, 11_008, 36, heads=(16, 2), tied=True),
    "7B": _qwen25(152_064, 3584, 18_944, 28, heads=(28, 4)),
    "14B": _qwen25(152_064, 5120, 13_824, 48, heads=(40, 8)),
    "32B": _qwen25(152_064, 5120, 27_648, 64, heads=(40, 8)),
    "72B": _qwen25(152_064, 8192, 29_568, 80, heads=(64, 8)),
}
_QWEN3 = {
    "0.6B": _qwen3(1024, 3072, 28, heads=(16, 8), tied=True),
    "1.7B": _qwen3(2048, 6144, 28, heads=(16, 8), tied=True),
    "4B": _qwen3(2560, 9728, 36, heads=(32, 8), tied=True),
    "8B": _qwen3(4096, 12_288, 36, heads=(32, 8)),
    "14B": _qwen3(5120, 17_408, 40, heads=(40, 8)),
    "32B": _qwen3(5120, 25_600, 64, heads=(64, 8)),
}

KNOWN: dict[str, DecoderConfig] = {
    "meta-llama/Llama-2-7b-hf": _LLAMA_2_7B,
    "meta-llama/Llama-2-7b-chat-hf": _LLAMA_2_7B,
    "meta-llama/Llama-2-13b-hf": _LLAMA_2_13B,
    "meta-llama/Llama-2-13b-chat-hf": _LLAMA_2_13B,
    "meta-llama/Llama-2-70b-hf": _LLAMA_2_70B,
    "meta-llama/Llama-2-70b-chat-hf": _LLAMA_2_70B,
    "meta-llama/Llama-3.1-8B": _LLAMA_31_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_31_8B,
    "meta-llama/Llama-3.1-70B": _LLAMA_31_70B,
    "meta-llama/Llama-3.1-70B-Instruct": _LLAMA_31_70B,
    "meta-llama/Llama-3.3-70B-Instruct": _LLAMA_31_70B,
    "meta-llama/Llama-3.2-1B": _LLAMA_32_1B,
    "meta-llama/Llama-3.2-1B-Instruct": _LLAMA_32_1B,
    "meta-llama/Llama-3.2-3B": _LLAMA_32_3B,
    "meta-llama/Llama-3.2-3B-Instruct": _LLAMA_32_3B,
    "mistralai/Mistral-7B-Instruct-v0.3": _MISTRAL_7B,
    "mistralai/Mistral-7B-v0.3": _MISTRAL_7B,
}
for _name, _config in _SMOLLM2.items():
    KNOWN[f"HuggingFaceTB/SmolLM2-{_name}"] = _config
    KNOWN[f"HuggingFaceTB/SmolLM2-{_name}-Instruct"] = _config
for _name, _config in _QWEN25.items():
    KNOWN[f"Qwen/Qwen2.5-{_name}"] = _config
    KNOWN[f"Qwen/Qwen2.5-{_name}-Instruct"] = _config
for _name, _config in _QWEN3.items():
    KNOWN[f"Qwen/Qwen3-{_name}"] = _config
