"""What of JSON Schema is enforced: JSON-Schema-Test-Suite against the grammars made of its schemas.

``python -m tests.tools.schema_suite FOLDER``, from the root of the checkout, where FOLDER is the
``json`` folder of jsonschema's source distribution. Every schema is enforced or refused. Of those
that are enforced, random walks under the masks must all be valid, no instance that the suite calls
invalid may be allowed, and those that it calls valid should be. Counted by file, which is by
keyword.
"""

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np

from inferneo_jax.errors import ConstraintError
from inferneo_jax.request import Constraint
from inferneo_jax.text.grammar import GrammarCompiler, json_schema_constraint
from inferneo_jax.text.tokenizer import Tokenizer
from tests.support.fake_server import make_tokenizer
from tests.support.walks import walk

COLUMNS = ("schemas", "refused", "walks", "complete", "invalid", "allowed", "valid", "unsound")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--draft", default="draft2020-12")
    parser.add_argument("--walks", type=int, default=1000, help="random texts of each schema")
    parser.add_argument("--reasons", action="store_true", help="list why schemas are refused")
    options = parser.parse_args()
    tokenizer = make_tokenizer()
    compiler = GrammarCompiler.of(tokenizer)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    reasons: Counter[str] = Counter()
    for file in sorted((options.folder / "tests" / options.draft).glob("*.json")):
        for case in json.loads(file.read_text(encoding="utf-8")):
            if isinstance(case["schema"], dict):
                case["schema"].pop("$schema", None)
                found = _check(case, compiler, tokenizer, options.walks, reasons)
                counts[file.stem] += found
    print("| keyword |", " | ".join(COLUMNS), "|")
    print("|---" * (len(COLUMNS) + 1) + "|")
    total: Counter[str] = Counter()
    for keyword, found in counts.items():
        total += found
        print(f"| {keyword} |", " | ".join(str(found[each]) for each in COLUMNS), "|")
    print("| all |", " | ".join(str(total[each]) for each in COLUMNS), "|")
    if options.reasons:
        for reason, count in reasons.most_common():
            print(count, reason)


def _check(
    case: dict[str, Any],
    compiler: GrammarCompiler,
    tokenizer: Tokenizer,
    walks: int,
    reasons: Counter[str],
) -> Counter[str]:
    """The figures of one schema."""
    schema, found = case["schema"], Counter(schemas=1)
    constraint = json_schema_constraint(schema)
    try:
        compiler.compile(constraint)
    except ConstraintError as error:
        reasons[str(error)] += 1
        return found + Counter(refused=1)
    validator = jsonschema.Draft202012Validator(schema)
    rng = np.random.default_rng(0)
    for _ in range(walks):
        found["walks"] += 1
        try:
            text = walk(compiler, tokenizer, constraint, rng, 200)
        except ConstraintError as error:
            reasons[f"while it was followed: {error}"] += 1
            continue
        if text is not None:
            found["complete"] += 1
            if not validator.is_valid(json.loads(text)):
                found["unsound"] += 1
                print(f"{case['description']}: {json.dumps(schema)} allows {text}")
    for test in case["tests"]:
        allowed = _allows(compiler, tokenizer, constraint, test["data"])
        if test["valid"]:
            found["valid"] += 1
            found["allowed"] += allowed
        else:
            found["invalid"] += 1
            found["unsound"] += allowed
            if allowed:
                print(f"{case['description']}: {json.dumps(schema)} allows {test['data']!r}")
    return found


def _allows(
    compiler: GrammarCompiler, tokenizer: Tokenizer, constraint: Constraint, data: Any
) -> bool:
    """Whether a grammar allows a value, written as Python writes it."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    tokens = [*tokenizer.encode(text), min(tokenizer.eos_token_ids)]
    return compiler.compile(constraint).accepted(tokens) == len(tokens)


if __name__ == "__main__":
    main()
