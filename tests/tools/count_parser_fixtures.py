"""How many recorded model outputs the output parsers read as they should, by family.

    python -m tests.tools.count_parser_fixtures FOLDER

FOLDER holds the fixtures of the package canitoolcall (Apache-2.0): unpack its wheel, and name
canitoolcall/_data/fixtures. Each output is parsed whole and in pieces of one character. An output
that is cut off or malformed counts if no call comes of it.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from server.parsers.families import FORMATS, begins_thinking
from server.parsers.parser import Format, OutputParser

VARIANTS = {
    "deepseek": (("V3.1", "deepseek"), ("V3.2", "deepseek-dsml"), ("V4", "deepseek-dsml")),
    "kimi": (("K3", "kimi-k3"),),
    "llama": (("Llama-4", "llama4"),),
}
"""For families of several formats: what the name of a model holds, and its format."""
USUAL = {
    "deepseek": "deepseek",
    "gemma4": "gemma4",
    "glm": "glm",
    "gpt-oss": "harmony",
    "kimi": "kimi-k2",
    "llama": "llama3",
    "mistral": "mistral",
    "qwen3-hermes": "hermes",
    "qwen3-xml": "qwen3-coder",
}


def format_of(family: str, model: str) -> Format:
    variants = VARIANTS.get(family, ())
    name = next((name for part, name in variants if part in model), USUAL[family])
    return FORMATS[name]  # type: ignore[index]


def parsed(format: Format, fixture: dict[str, Any], prompt: str, size: int) -> dict[str, Any]:
    """The output of a fixture, parsed in pieces of ``size`` characters."""
    tools = {
        tool["function"]["name"]: tool["function"].get("parameters") or {}
        for tool in fixture["tools"]
    }
    parser = OutputParser(format, tools, thinking=begins_thinking(format, prompt))
    text, found = fixture["raw_output"], []
    for start in range(0, len(text), size):
        parser.push(text[start : start + size])
        found.append(parser.take())
    parser.finish(cut="truncated" in fixture["tags"])
    found.append(parser.take())
    calls = [call for _, _, part in found for call in part]
    return {
        "content": "".join(part[0] for part in found).strip() or None,
        "reasoning_content": "".join(part[1] for part in found).strip() or None,
        "tool_calls": [
            {"name": call.name, "arguments": json.loads(call.arguments)} for call in calls
        ],
    }


def matches(fixture: dict[str, Any], got: dict[str, Any]) -> bool:
    """Whether this is what is expected, but for white space around the texts."""
    if "expected" not in fixture:
        return not got["tool_calls"]
    want = dict(fixture["expected"])
    for key in ("content", "reasoning_content"):
        want[key] = (want[key] or "").strip() or None
    return bool(want == got)


def main(folder: Path) -> None:
    print(f"{'family':<14} outputs  whole  by characters")
    for path in sorted(each for each in folder.iterdir() if each.is_dir()):
        family = json.loads((path / "family.json").read_text(encoding="utf-8"))
        prompts = {m["repo"]: m["default_generation_prompt"] for m in family["reference_models"]}
        counts: Counter[str] = Counter()
        for file in sorted(path.glob("*.jsonl")):
            for line in file.read_text(encoding="utf-8").splitlines():
                fixture = json.loads(line)
                model = fixture["models"][0]
                prompt = fixture.get("generation_prompt") or prompts.get(model, "")
                format = format_of(path.name, model)
                whole = parsed(format, fixture, prompt, max(1, len(fixture["raw_output"])))
                pieces = parsed(format, fixture, prompt, 1)
                counts["all"] += 1
                counts["whole"] += matches(fixture, whole)
                counts["pieces"] += matches(fixture, pieces)
                if not matches(fixture, whole) or whole != pieces:
                    print(f"  {fixture['id']}\n    {whole}", file=sys.stderr)
                    if whole != pieces:
                        print(f"    in pieces: {pieces}", file=sys.stderr)
        print(f"{path.name:<14} {counts['all']:>7}  {counts['whole']:>5}  {counts['pieces']:>13}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
