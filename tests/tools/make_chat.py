"""Greedy generations of the chat model in float32, for the engine to be compared with.

Usage: python tests/tools/make_chat.py SMOLLM2.gguf    (versions: see golden.py)

Writes chat.json. Each case: ``prompt`` and ``prompt_ids``; 48 greedy ``output_ids``, which go on
after an end-of-sequence token; for each of them its ``logprobs`` (natural logarithm), the five best
``top_ids`` with ``top_logprobs``, and ``margins``, the best logit less the second best: where it
is small, another order of additions may choose the other token. Some cases have
``prompt_logprobs``, null for the first token. Ids come from steps with a cache, the numbers from
one pass over the whole sequence; the script fails unless both agree.
"""

import sys
from pathlib import Path
from typing import Any

import golden
import torch

OUTPUT_TOKENS = 48
TOP = 5


@torch.inference_mode()
def run(model: Any, tokenizer: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """A case anew."""
    name, prompt = asked["name"], asked["prompt"]
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    output, cache, step = [], None, torch.tensor([prompt_ids])
    for _ in range(OUTPUT_TOKENS):
        out = model(step, past_key_values=cache, use_cache=True)
        cache, step = out.past_key_values, out.logits[:, -1:].argmax(-1)
        output.append(int(step))
    whole = model(torch.tensor([prompt_ids + output]), use_cache=False).logits[0]
    logits = whole[len(prompt_ids) - 1 : -1]
    assert logits.argmax(-1).tolist() == output, name
    logprobs = logits.log_softmax(-1)
    top = logprobs.topk(TOP)
    best = logits.topk(2).values
    chosen = logprobs.gather(-1, torch.tensor(output)[:, None])[:, 0]
    case = {
        "name": name,
        "prompt": prompt,
        "prompt_ids": prompt_ids,
        "output_ids": output,
        "text": tokenizer.decode(output, skip_special_tokens=False),
        "logprobs": golden.rounded(chosen, 5),
        "top_ids": top.indices.tolist(),
        "top_logprobs": golden.rounded(top.values, 4),
        "margins": golden.rounded(best[:, 0] - best[:, 1], 4),
    }
    if "prompt_logprobs" in asked:
        scored = whole[: len(prompt_ids) - 1].log_softmax(-1)
        own = scored.gather(-1, torch.tensor(prompt_ids[1:])[:, None])[:, 0]
        case["prompt_logprobs"] = [None, *golden.rounded(own, 5)]
    print(f"{name}: {len(prompt_ids)} tokens, least margin {min(case['margins'])}")
    print(f"    {case['text']!r}")
    return case


def main() -> None:
    gguf = Path(sys.argv[1])
    golden.pin()
    tokenizer, model = golden.chat_tokenizer(gguf), golden.chat_model(gguf)
    cases = [run(model, tokenizer, case) for case in golden.asked("chat.json")["cases"]]
    golden.write("chat.json", {"about": golden.about(gguf)}, cases)


if __name__ == "__main__":
    main()
