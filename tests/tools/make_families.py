"""Tiny random models of every family, with the logits that transformers computes from them.

Usage: python tests/tools/make_families.py    (versions: see golden.py)

Writes families/<name>/ as Hugging Face lays a model out (safetensors, config.json, tokenizer), and
families.json: for the decoders ``ids``, ``positions`` and the ``logits`` at these, for the encoders
texts as ``ids`` with their pooled ``embeddings`` (mean, scaled to length 1). All computed in
float32 from the stored weights.

All decoders share one tokenizer: the 256 bytes, a few merges and the ChatML tokens, so that a whole
server can run on one of these models.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import golden
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    NomicBertConfig,
    NomicBertModel,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FOLDER = golden.FOLDER / "families"
MERGES = [
    ("t", "h"),
    ("th", "e"),
    ("\u0120", "the"),
    ("i", "n"),
    ("a", "n"),
    ("an", "d"),
    ("e", "r"),
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB = 272  # 256 bytes, 7 merges, 3 special tokens, 6 columns that no token has
END = 256 + len(MERGES)
POSITIONS = [0, 1, 7, 19]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SHARED: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": END + 1,
    "eos_token_id": END + 2,
    "pad_token_id": END,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def decoders_to_make() -> dict[str, Any]:
    """Models, freshly made; their weights are drawn later."""

    def rope(theta: float, **scaling: Any) -> dict[str, Any]:
        return {"rope_type": "default", "rope_theta": theta} | scaling

    llama = {**SHARED, "rms_norm_eps": 1e-5}
    return {
        "llama-tied": LlamaForCausalLM(
            LlamaConfig(**llama, tie_word_embeddings=True, rope_parameters=rope(10_000.0, **LLAMA3))
        ),
        "llama-untied": LlamaForCausalLM(
            LlamaConfig(
                **llama,
                tie_word_embeddings=False,
                head_dim=12,
                rope_parameters=rope(500.0, rope_type="linear", factor=2.0),
            )
        ),
        "qwen2": Qwen2ForCausalLM(
            Qwen2Config(**SHARED, tie_word_embeddings=True, rope_parameters=rope(1_000_000.0))
        ),
        "qwen3": Qwen3ForCausalLM(
            Qwen3Config(
                **SHARED, tie_word_embeddings=False, head_dim=16, rope_parameters=rope(10_000.0)
            )
        ),
        "phi3": Phi3ForCausalLM(
            Phi3Config(**SHARED, tie_word_embeddings=False, rope_parameters=rope(10_000.0))
        ),
    }


# How the weights are stored; the numbers are computed in float32 from what was stored.
STORED = {
    "llama-tied": torch.float32,
    "llama-untied": torch.float16,
    "qwen2": torch.bfloat16,
    "qwen3": torch.bfloat16,
    "phi3": torch.bfloat16,
    "bert": torch.float32,
    "nomic-bert": torch.float16,
}


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Draw every parameter, scales and biases included, so that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            value = 0.3 * noise
        elif parameter.ndim == 1:
            value = 1.0 + 0.3 * noise
        elif "embed" in name:
            value = noise
        else:
            value = 1.5 * noise / parameter.shape[1] ** 0.5
        parameter.data = value


def recast(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters and, unlike ``model.to``, not the tables of rotary frequencies."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def decoder_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *("".join(merge) for merge in MERGES), *SPECIAL]
    tokenizer = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return tokenizer


def encoder_tokenizer() -> Tokenizer:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = "the a cat dog sat on mat ##s ##ly big red . , !"
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*special, *words.split(), *(f"##{letter}" for letter in letters), *letters]
    vocab = {token: n for n, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(special)
    return tokenizer


def older_layout(folder: Path) -> None:
    """Rewrite config.json as it was before transformers 5, which most published models have."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    config["torch_dtype"] = config.pop("dtype")
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def save(name: str, model: Any, tokenizer: Tokenizer, settings: dict[str, Any]) -> Path:
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    recast(model, STORED[name])
    model.save_pretrained(folder)
    recast(model, torch.float32)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return folder


@torch.inference_mode()
def decoder_case(name: str, model: Any, seed: int) -> dict[str, Any]:
    randomize(model, seed)
    settings = {
        "bos_token": SPECIAL[1],
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[0],
        "chat_template": TEMPLATE,
    }
    folder = save(name, model, decoder_tokenizer(), settings)
    if name in {"llama-untied", "qwen2"}:
        older_layout(folder)
    loaded = type(model).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ids = torch.randint(0, END, (20,), generator=torch.Generator().manual_seed(seed)).tolist()
    logits = loaded.eval()(torch.tensor([ids])).logits[0]
    # The files say the same as the model they were written from.
    written = model.eval()(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits, written, atol=1e-3, rtol=1e-3)
    print(name, "logits from", float(logits.min()), "to", float(logits.max()))
    return {
        "name": name,
        "ids": ids,
        "positions": POSITIONS,
        "logits": golden.rounded(logits[POSITIONS], 5),
    }


@torch.inference_mode()
def encoder_case(name: str, kind: Any, config: Any, seed: int) -> dict[str, Any]:
    tokenizer = encoder_tokenizer()
    model = kind(
        config(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
        )
    ).eval()
    randomize(model, seed)
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    folder = save(name, model, tokenizer, {**special, "pad_token": "[PAD]"})
    loaded = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ids = [
        tokenizer.encode(text).ids for text in ("cat", "the big dog sat on a mat.", "reds! " * 9)
    ]
    embeddings = []
    for one in ids:
        hidden = loaded.eval()(torch.tensor([one])).last_hidden_state[0]
        embeddings.append(torch.nn.functional.normalize(hidden.mean(0), dim=0))
    return {"name": name, "ids": ids, "embeddings": golden.rounded(torch.stack(embeddings), 7)}


def main() -> None:
    golden.pin()
    cases = [
        decoder_case(name, model, seed)
        for seed, (name, model) in enumerate(decoders_to_make().items())
    ]
    cases.append(encoder_case("bert", BertModel, BertConfig, seed=9))
    cases.append(encoder_case("nomic-bert", NomicBertModel, NomicBertConfig, seed=10))
    golden.write("families.json", {"about": golden.about()}, cases)


if __name__ == "__main__":
    main()
