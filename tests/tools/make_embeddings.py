"""Sentence embeddings in float32, for the encoder to be compared with.

Usage: python tests/tools/make_embeddings.py MINILM_FOLDER    (versions: see golden.py)

Writes embeddings.json. Each case: ``text``, its ``ids`` with [CLS] and [SEP], and ``embedding``:
the mean of the last hidden states, scaled to length 1. Every text is run alone, without padding.
"""

import sys
from pathlib import Path

import golden
import torch
from transformers import AutoTokenizer, BertModel


@torch.inference_mode()
def main() -> None:
    folder = Path(sys.argv[1])
    golden.pin()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = BertModel.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", add_pooling_layer=False
    ).eval()
    cases = []
    for case in golden.asked("embeddings.json")["cases"]:
        name, text = case["name"], case["text"]
        ids = tokenizer(text, truncation=False)["input_ids"]
        hidden = model(torch.tensor([ids])).last_hidden_state[0]
        embedding = torch.nn.functional.normalize(hidden.mean(0), dim=0)
        print(f"{name}: {len(ids)} tokens")
        cases.append(
            {"name": name, "text": text, "ids": ids, "embedding": golden.rounded(embedding, 7)}
        )
    about = golden.about(folder / "model.safetensors", folder / "tokenizer.json")
    golden.write("embeddings.json", {"about": about}, cases)


if __name__ == "__main__":
    main()
