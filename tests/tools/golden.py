"""What the scripts of this folder share: reproducible numbers, the reference models, JSON layout.

The scripts make the files that tests compare with. They need torch, transformers and gguf, which
serving and testing do not:

    python -m venv ref
    ref/bin/pip install torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3 gguf==0.19.0
    ref/bin/python tests/tools/make_tokens.py SMOLLM2.gguf MINILM_FOLDER
    ref/bin/python tests/tools/make_chat.py SMOLLM2.gguf
    ref/bin/python tests/tools/make_embeddings.py MINILM_FOLDER
    ref/bin/python tests/tools/make_families.py

SMOLLM2.gguf is the file of the catalog's chat model, MINILM_FOLDER the folder of its embedding
model. Each script writes to tests/golden and says in its output which versions it ran with. What
the models are asked is read from the file that is written; add a case there.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).resolve().parents[1] / "golden"


def pin() -> None:
    """One thread, no fast paths: the same numbers on every run of one machine."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)


def about(*files: Path) -> dict[str, Any]:
    """Versions, and the hashes of the files that the numbers come from."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "sha256": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files},
    }


def chat_tokenizer(gguf: Path) -> Any:
    """transformers' tokenizer of the chat model, with the step that transformers leaves out.

    ``tokenizer.ggml.pre`` is ``smollm``: digits are split off one by one before anything else.
    transformers 5.23 does not know that name and splits as GPT-2, which differs after spaces.
    """
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return tokenizer


def chat_model(gguf: Path) -> Any:
    """The chat model in float32."""
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def rounded(values: Any, digits: int) -> Any:
    """A tensor as nested lists of numbers with few digits."""
    if isinstance(values, torch.Tensor):
        values = values.tolist()
    if isinstance(values, list):
        return [rounded(value, digits) for value in values]
    return round(values, digits)


def asked(name: str) -> dict[str, Any]:
    """The file as it is now, for the inputs of its cases."""
    found: dict[str, Any] = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    return found


def write(name: str, head: dict[str, Any], cases: list[dict[str, Any]]) -> None:
    """Write ``{"about", ..., "cases"}`` with one line per field of a case."""
    lines = [f"{json.dumps(key)}: {_compact(value)}" for key, value in head.items()]
    shown = [
        "{" + ",\n ".join(f"{json.dumps(k)}: {_compact(v)}" for k, v in case.items()) + "}"
        for case in cases
    ]
    lines.append('"cases": [\n' + ",\n".join(shown) + "\n]")
    path = FOLDER / name
    path.write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")
    print(f"{path.name}: {len(cases)} cases, {path.stat().st_size} bytes, {head['about']}")


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"))
