"""The examples of the documentation, taken from it and run against the real models."""

import re
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.programs import framework_python, node_modules, program, run, run_on_page

PAGES = ("docs/clients.md", "docs/quickstart.md", "docs/structured-output.md", "README.md")
FRAMEWORK_PAGES = tuple(
    f"docs/clients/{name}.md" for name in ("langchain", "llamaindex", "litellm")
)
PRINTED_ADDRESS = "127.0.0.1:8000"
ANSWER = "Tokyo"

pytestmark = pytest.mark.real


def blocks(language: str, pages: tuple[str, ...] = PAGES) -> list[tuple[str, str]]:
    """Every fenced block of this language: where it is, and its text."""
    found = []
    for page in pages:
        text = (ROOT / page).read_text(encoding="utf-8")
        for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            line = text.count("\n", 0, match.start()) + 1
            found.append((f"{page}:{line}", match[1]))
    return found


def cases(language: str, *, holding: str = "", without: str = "\0") -> list[object]:
    return [
        pytest.param(code, id=name)
        for name, code in blocks(language)
        if holding in code and without not in code
    ]


def pointed_at(code: str, address: str) -> str:
    assert PRINTED_ADDRESS in code
    return code.replace(PRINTED_ADDRESS, address)


def test_there_are_examples_of_every_kind() -> None:
    assert len(blocks("python")) >= 4
    assert len(blocks("javascript")) >= 3
    assert len(cases("bash", holding="curl")) >= 4


@pytest.mark.parametrize("code", cases("python"))
def test_python_examples_run(address: str, code: str) -> None:
    printed = run([sys.executable, "-W", "error", "-c", pointed_at(code, address)])
    assert printed.strip()
    assert ANSWER in printed or "capital" not in code


@pytest.mark.parametrize("page", FRAMEWORK_PAGES)
def test_framework_examples_run(address: str, page: str) -> None:
    ((_, code),) = blocks("python", (page,))
    printed = run([framework_python(), "-c", pointed_at(code, address)])
    assert printed.count(ANSWER) >= 2
    assert "vectors of 384" in printed or "lions" not in printed.lower()


@pytest.mark.parametrize("code", cases("bash", holding="curl"))
def test_curl_examples_run(address: str, code: str) -> None:
    program("curl")
    printed = run(["bash", "-euc", pointed_at(code, address)])
    assert ANSWER in printed
    assert ("data: [DONE]" in printed) == ('"stream": true' in code)


@pytest.mark.parametrize("code", cases("javascript"))
def test_javascript_examples_run_in_node(address: str, code: str, tmp_path: Path) -> None:
    folder = node_modules()
    # Node before 22 has no WebSocket of its own; the package's is the same to a script.
    prefix = "import _ws from 'ws'; globalThis.WebSocket ??= _ws;\n"
    script = prefix + pointed_at(code, address)
    printed = run([program("node"), "--input-type=module", "-"], cwd=folder, input=script)
    assert ANSWER in printed


@pytest.mark.parametrize("code", cases("javascript", without="import "))
def test_javascript_examples_run_on_a_page(address: str, code: str, tmp_path: Path) -> None:
    script = pointed_at(code, address)
    assert ANSWER in run_on_page(script, f"http://{address}/health", ANSWER, tmp_path)
