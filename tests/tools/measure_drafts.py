"""What a draft model brings a single client who asks for code: acceptance and tokens per second.

    python -m tests.tools.measure_drafts TARGET DRAFT [--rounds 3] [--tokens 200]

TARGET and DRAFT are GGUF files or folders of models. Engines without drafts, with looked-up drafts,
with the draft model alone, and with both where they pay answer the same prompts in turns. Prints
the tokens per second of each, in all rounds, and the part of the drafted tokens that was accepted.
"""

import argparse
import gc
import tempfile
import time
from pathlib import Path
from typing import Any

from inferneo_jax import EngineConfig, GenerationRequest, LanguageModel, SamplingParams
from inferneo_jax.model import load_model
from inferneo_jax.weights.convert import describe
from tests.support.tiny_model import Collected

PROMPTS = (
    "Write a Python class for a binary search tree with insert, delete, find and iteration.",
    "Write a function in C that parses an IPv4 address without library calls, with tests.",
    "Implement an LRU cache in TypeScript with generics, and explain each method in a comment.",
    "Write a SQL schema for a library with books, members and loans, and five useful queries.",
)
MODES = ("off", "ngram", "model", "auto")


def ask(model: LanguageModel, text: str, tokens: int, temperature: float) -> tuple[int, float]:
    """The number of tokens after a prompt, and the seconds from the first of them to the last."""
    messages: Any = [{"role": "user", "content": text}]
    rendered = model.tokenizer.render_chat(messages)
    request = GenerationRequest(
        id=f"{time.monotonic()}",
        prompt=tuple(model.tokenizer.encode(rendered, add_special_tokens=False)),
        max_tokens=tokens,
        stop_token_ids=model.tokenizer.eos_token_ids,
        sampling=SamplingParams(temperature=temperature, seed=7),
    )
    answer = Collected(request)
    model.engine.submit(request, answer)
    answer.wait_for_tokens(1)
    first, started = answer.count(), time.perf_counter()
    return len(answer.tokens) - first, time.perf_counter() - started


def measure(target: Path, draft: Path, mode: str, arguments: argparse.Namespace) -> None:
    """Print a line of results for one way of drafting."""
    config: Any = {"speculation": mode, "slots": 4, "max_len": 4096}
    model = load_model(
        target,
        EngineConfig(**config, compilation_cache=arguments.cache),
        name=mode,
        draft=draft if mode in ("model", "auto") else None,
    )
    assert isinstance(model, LanguageModel)
    print(mode, model.engine._runner.speculation, flush=True)
    try:
        ask(model, PROMPTS[0], 16, 0.0)
        speeds = []
        before = model.stats()
        for _ in range(arguments.rounds):
            spent = [ask(model, text, arguments.tokens, arguments.temperature) for text in PROMPTS]
            speeds.append(sum(count for count, _ in spent) / sum(seconds for _, seconds in spent))
        stats = model.stats()
        drafted = stats.drafted_tokens - before.drafted_tokens
        accepted = stats.accepted_tokens - before.accepted_tokens
        rounds = ", ".join(f"{speed:.1f}" for speed in speeds)
        steps = (stats.output_tokens - before.output_tokens) / (stats.steps - before.steps)
        print(f"{mode}: {rounds} tok/s; {accepted} of {drafted} accepted; {steps:.2f} tokens/step")
    finally:
        model.stop()


def main() -> None:
    """Measure every way of drafting, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    parser.add_argument("draft", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--cache", help="folder of compiled programs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        target, draft = (
            describe(path.absolute(), Path(folder), lambda *_: None)
            for path in (arguments.target, arguments.draft)
        )
        for mode in arguments.modes.split(","):
            measure(target, draft, mode, arguments)
            gc.collect()


if __name__ == "__main__":
    main()
