"""What structured output costs: compiling grammars, masks, and streams of JSON beside plain ones.

``python -m tests.tools.grammar_speed CHECKPOINT``, from the root of the checkout: the times of
compiling and of masks with the model's own vocabulary. With ``--engine``, also tokens per second of
16 streams of JSON, of 16 plain ones, and of both together.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from inferneo_jax import EngineConfig, LanguageModel, SamplingParams, Tokenizer, load_model
from inferneo_jax.text.grammar import (
    ConstrainedRow,
    GrammarCompiler,
    fill_masks,
    json_object_constraint,
    json_schema_constraint,
)
from tests.support.tiny_model import Collected, submit
from tests.support.walks import allowed_of, mask_words

_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "email": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 5},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "city": {"type": "string"}},
            "required": ["street", "city"],
        },
    },
    "required": ["name", "age", "email", "tags", "address"],
}
SCHEMAS: dict[str, Any] = {
    "object": None,
    "person": _PERSON,
    "people": {"type": "array", "items": _PERSON, "minItems": 2},
    "choices": {"enum": [f"option number {i}" for i in range(500)]},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}[0-9]{2}([A-Z0-9]{4}){3,7}$"},
    "wide": {"type": "object", "properties": {f"field_{i}": _PERSON for i in range(40)}},
}
STREAMS, TOKENS = 16, 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--engine", action="store_true")
    options = parser.parse_args()
    tokenizer = Tokenizer.from_directory(options.checkpoint)
    grammars = {
        name: json_schema_constraint(schema) if schema else json_object_constraint()
        for name, schema in SCHEMAS.items()
    }
    started = time.perf_counter()
    GrammarCompiler.of(tokenizer).compile(grammars["object"])
    print(f"{tokenizer.vocab_size} tokens; the first grammar {_ms(time.perf_counter() - started)}")
    compiler = GrammarCompiler.of(tokenizer)
    compiler.compile(grammars["object"])
    print("| schema | cold ms | cached ms | mask of 1: p50, p99 ms | of 32 rows: p50, p99 ms |")
    print("|---|---|---|---|---|")
    for name, constraint in grammars.items():
        compiler._kept.clear()
        cold = _timed(lambda: compiler.compile(constraint))  # noqa: B023
        cached = min(_timed(lambda: compiler.compile(constraint)) for _ in range(5))  # noqa: B023
        one, many = (_masks(compiler, tokenizer, constraint, rows) for rows in (1, 32))
        print(f"| {name} | {_ms(cold)} | {_ms(cached)} | {_two(one)} | {_two(many)} |")
    if options.engine:
        _streams(options.checkpoint)


def _timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2f}"


def _two(seconds: list[float]) -> str:
    return ", ".join(_ms(float(np.percentile(seconds, each))) for each in (50, 99))


def _masks(
    compiler: GrammarCompiler, tokenizer: Tokenizer, constraint: Any, rows: int
) -> list[float]:
    """Seconds of each step of random walks, as many at once as there are rows."""
    rng, found = np.random.default_rng(0), []
    masks = np.zeros((rows, mask_words(tokenizer)), np.uint32)
    for _ in range(4):
        walking = {i: compiler.compile(constraint) for i in range(rows)}
        for _ in range(60):
            jobs = [ConstrainedRow(matcher, i) for i, matcher in walking.items()]
            found.append(_timed(lambda: fill_masks(jobs, masks)))  # noqa: B023
            for i, matcher in list(walking.items()):
                allowed = np.setdiff1d(allowed_of(masks[i]), sorted(tokenizer.eos_token_ids))
                if not len(allowed) or matcher.consume(int(rng.choice(allowed))):
                    del walking[i]
            if len(walking) < rows:
                break
    return found


def _streams(checkpoint: Path) -> None:
    """Tokens per second of streams of JSON, plain ones, and both."""
    model = load_model(checkpoint, EngineConfig(slots=2 * STREAMS), name="model")
    assert isinstance(model, LanguageModel)
    if model.compiling:
        model.compiling.join()
    question = [{"role": "user", "content": "Describe three people as JSON, with all fields."}]
    prompt = tuple(model.tokenizer.encode_chat(question))
    constraint = json_schema_constraint({**SCHEMAS["people"], "minItems": 4})

    def run(constrained: int, plain: int) -> str:
        fields = {"stop_token_ids": frozenset[int](), "sampling": SamplingParams(seed=1)}
        before, started = model.stats(), time.monotonic()
        of_json = [
            submit(model.engine, prompt, TOKENS, constraint=constraint, **fields)  # type: ignore[arg-type]
            for _ in range(constrained)
        ]
        others = [
            submit(model.engine, prompt, TOKENS, **fields)  # type: ignore[arg-type]
            for _ in range(plain)
        ]
        speeds = [_speed(each, started) for each in (of_json, others)]
        steps = (model.stats().steps - before.steps) if before else 0
        return f"| {constrained} | {plain} | {speeds[0]:.0f} | {speeds[1]:.0f} | {steps} |"

    run(STREAMS, STREAMS)
    print("| JSON | plain | tok/s of JSON | tok/s of plain | steps |")
    print("|---|---|---|---|---|")
    for counts in (
        (0, STREAMS),
        (STREAMS, 0),
        (STREAMS, STREAMS),
        (0, 2 * STREAMS),
        (1, 0),
        (0, 1),
    ):
        print(run(*counts))
    model.stop()


def _speed(streams: list[Collected], started: float) -> float:
    """Tokens per second of streams that began together, until the last has ended."""
    if not streams:
        return 0.0
    count = sum(len(each.tokens) for each in streams)
    return count / (max(each.ended_at for each in streams) - started)


if __name__ == "__main__":
    main()
