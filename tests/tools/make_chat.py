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

CHATS: dict[str, list[dict[str, str]]] = {
    "chat-capital": [{"role": "user", "content": "What is the capital of France?"}],
    "chat-system-pirate": [
        {"role": "system", "content": "You are a pirate. Answer in one short sentence."},
        {"role": "user", "content": "How is the weather today?"},
    ],
    "chat-turns": [
        {"role": "user", "content": "My name is Ada. What is 2 + 3?"},
        {"role": "assistant", "content": "Hello Ada! 2 + 3 is 5."},
        {"role": "user", "content": "And what is my name?"},
    ],
    "chat-code": [
        {"role": "system", "content": "You write Python."},
        {"role": "user", "content": "Write a function that reverses a string."},
    ],
    "chat-emoji": [{"role": "user", "content": "Explain 👩‍🚀 and 🇪🇺 in one line, s'il te plaît."}],
    "chat-list": [{"role": "user", "content": "List five fruits, one per line."}],
}

TEXTS = {
    "one-token": "The",
    "story": "Once upon a time, in a small village by the sea, there lived an old fisherman who",
    "code": "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "digits": "1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377,",
    "json": '{"users": [{"id": 1, "name": "Alice"}, {"id": 2, "name": "Bob"}, {"id": 3,',
    "cjk": "日本の首都は東京です。中国的首都是北京。대한민국의 수도는",
    "whitespace": "a\n\n\n\tb    c\r\n  12  345\n\n",
    "repeat": "na na na na na na na na na na na na na na na na",
}


def long_text(lines: int) -> str:
    """A list of ``lines`` different plain sentences, about 22 tokens each."""
    who = ["The baker", "A pilot", "My neighbour", "The old doctor", "Her sister", "One student"]
    what = ["sold", "found", "painted", "repaired", "counted", "carried", "lost"]
    things = ["apples", "clocks", "letters", "bicycles", "lamps"]
    where = ["in Lisbon", "near the river", "on Monday", "behind the station"]
    return "\n".join(
        f"{n}. {who[n % 6]} {what[n % 7]} {n * 7 % 90 + 2} {things[n % 5]} {where[n % 4]}."
        for n in range(1, lines + 1)
    )


def prompts(tokenizer: Any) -> dict[str, str]:
    """The prompt text of every case."""
    chats = {
        name: tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for name, messages in CHATS.items()
    }
    long = {"long-350": long_text(25), "long-750": long_text(52)}
    question = long_text(24) + "\n\nHow many lines does this list have?"
    long["chat-long"] = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    return chats | TEXTS | long


@torch.inference_mode()
def run(model: Any, tokenizer: Any, name: str, prompt: str) -> dict[str, Any]:
    """One case."""
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
    if name in {"chat-capital", "story", "digits", "cjk", "long-350"}:
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
    cases = [run(model, tokenizer, *item) for item in prompts(tokenizer).items()]
    golden.write("chat.json", {"about": golden.about(gguf)}, cases)


if __name__ == "__main__":
    main()
