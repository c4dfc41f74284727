"""The table of the contract is whole: every line has tests, and they exist."""

import ast
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from server.api.openai.chat import ChatBody
from server.api.openai.completions import CompletionBody
from server.api.openai.embeddings import EmbeddingBody

TESTS = Path(__file__).parents[1]
TABLE = tomllib.loads((Path(__file__).parent / "contract.toml").read_text(encoding="utf-8"))
LINES: list[dict[str, Any]] = TABLE["line"]
SECTIONS = ["endpoints", "parameters", "streams", "websocket", "errors"]


def names_in(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {node.name for node in functions if node.name.startswith("test_")}


@pytest.mark.parametrize("line", LINES, ids=lambda line: line["says"][:60])
def test_a_line_of_the_contract_has_tests_that_exist(line: dict[str, Any]) -> None:
    assert line["section"] in SECTIONS
    assert line["tests"]
    for name in line["tests"]:
        file, _, function = name.partition("::")
        assert function in names_in(file), name


def test_no_line_is_written_twice_and_no_section_is_empty() -> None:
    says = Counter(line["says"] for line in LINES)
    assert max(says.values()) == 1
    assert {line["section"] for line in LINES} == set(SECTIONS)


def test_every_parameter_that_is_read_has_a_line() -> None:
    named = {name for line in LINES for name in line.get("parameters", ())}
    bodies = (CompletionBody, ChatBody, EmbeddingBody)
    assert named == {name for body in bodies for name in body.model_fields}
