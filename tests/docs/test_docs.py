"""The documentation is true: its reference is what the schemas say, and what it names exists."""

import functools
import re
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.api.openapi import document
from server.cli.reference import pages
from server.cli.reference.commands import Command, commands
from server.cli.reference.markdown import anchor
from server.config.replica_settings import ReplicaSettings
from server.config.schema import KEY_VARIABLE, setting_docs
from server.endpoints import ENDPOINTS
from tests.support.paths import ROOT

_NOT_OURS = {"node_modules", "checkpoints", "build", "dist"}
_USERS_OWN = {"compose.override.yaml", "config.yaml"}
"""Files that whoever reads a page may write."""
PAGES = [
    path
    for path in sorted(ROOT.rglob("*.md"))
    if not any(
        part in _NOT_OURS or part.startswith(".") for part in path.relative_to(ROOT).parts[:-1]
    )
]
COMMANDS = {command.name: command for command in commands()}
REFERENCE = pages()
ENDPOINT_PATHS = [re.sub(r"\{\w+\}", "[^/]+", path) for path in document(ENDPOINTS)["paths"]]

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@functools.cache
def prose(page: Path) -> str:
    """A page without its blocks of code."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)


@functools.cache
def codes(page: Path) -> list[str]:
    """All that a page shows as code: each line of a block, and each span."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^ *```(?:\w*)\n(.*?)^ *```$", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return lines + [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


@functools.cache
def anchors(page: Path) -> set[str]:
    """Where a page's headings can be reached; one that comes again gets a number."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ +(.*?) *$", prose(page), flags=re.MULTILINE):
        name = anchor(re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading))
        found[name] = found.get(name, -1) + 1
    return {f"{name}-{i}" if i else name for name, last in found.items() for i in range(last + 1)}


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """The file and the anchor of every link that stays in the repository."""
    for target in re.findall(r"\]\(([^)\s]+)[^)]*\)", prose(page)):
        if not re.match(r"[a-z]+:", target):
            path, _, fragment = urllib.parse.unquote(target).partition("#")
            yield (page.parent / path if path else page), fragment


# What the reference says is what the program does.


@pytest.mark.parametrize("name", REFERENCE)
def test_the_reference_is_what_the_schemas_say(name: str) -> None:
    page = ROOT / "docs" / "reference" / name
    found = page.read_text(encoding="utf-8") if page.exists() else ""
    assert found == REFERENCE[name], f"{page} is not what the schemas say: run `make docs`"


def test_no_other_page_is_in_the_reference() -> None:
    assert {path.name for path in (ROOT / "docs" / "reference").iterdir()} == REFERENCE.keys()


@pytest.mark.parametrize("command", COMMANDS.values(), ids=lambda command: command.name)
def test_every_command_and_flag_is_described(command: Command) -> None:
    assert len(command.text) > 10
    for parameter in command.parameters:
        assert len(parameter.text) > 5, parameter.flags or parameter.value


# What pages name exists.


@each_page
def test_every_link_leads_somewhere(page: Path) -> None:
    for path, fragment in links(page):
        assert path.exists(), f"there is no {path}"
        assert path.resolve().is_relative_to(ROOT), path
        if fragment:
            assert f"#{fragment}" in anchors(path), f"{path} has no heading for #{fragment}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, new = set(), [ROOT / "README.md"]
    while new:
        page = new.pop().resolve()
        if page in reached:
            continue
        reached.add(page)
        if page.is_dir():
            new += page.iterdir()
        elif page.suffix == ".md":
            new += [path for path, _ in links(page)]
    files = {path for path in (ROOT / "docs").rglob("*") if path.is_file()}
    assert not files - reached


@each_page
def test_every_file_named_exists(page: Path) -> None:
    for text in codes(page):
        for name in re.findall(r"(?<![\w./<*-])[\w./-]+\.(?:py|cc|h|md|ipynb|yaml)\b", text):
            if not name.startswith("/") and name not in _USERS_OWN:
                assert re.search(rf"(^|/){re.escape(name)}$", sources(), re.M), (
                    f"there is no {name}"
                )
        if re.fullmatch(r"(inferneo_jax|server|tests|docs|notebooks)/[\w./-]*", text):
            assert (ROOT / text).exists(), f"there is no {text}"


@functools.cache
def sources() -> str:
    """The names of files that are no build's, and no virtual environment's, on a line each."""
    folders = [ROOT / name for name in ("inferneo_jax", "server", "tests", "docs", "notebooks")]
    below = [path for folder in folders for path in folder.rglob("*")]
    found = [*ROOT.glob("*.*"), *(path for path in below if "__pycache__" not in path.parts)]
    return "\n".join(path.relative_to(ROOT).as_posix() for path in found)


@each_page
def test_every_command_named_exists(page: Path) -> None:
    groups = {name.rpartition(" ")[0] for name in COMMANDS}
    for text in codes(page):
        for words in re.findall(r"(?:^|[ /(])inferneo (?!inferneo )([a-z][^|;)&]*)", text):
            named = [f"inferneo {' '.join(words.split()[:count])}" for count in (2, 1)]
            found = next((COMMANDS[name] for name in named if name in COMMANDS), None)
            assert found or named[1] in groups, f"there is no `{named[1]}`"
            flags = {flag for each in found.parameters for flag in each.flags} if found else set()
            unquoted = re.sub(r"'.*?'|\".*?\"", "", words)
            for flag in re.findall(r"(?<= )(--?[a-z][\w-]*)", unquoted):
                assert flag in flags | {"--help"}, f"`{named[1]}` has no {flag}"


@each_page
def test_every_target_of_make_named_exists(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for text in codes(page):
        for target in re.findall(r"(?:^|&& )make ([a-z]+)", text):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"


@each_page
def test_every_variable_named_exists(page: Path) -> None:
    known = {setting.variable for setting in setting_docs(ReplicaSettings)}
    known.add(KEY_VARIABLE)
    known.update(re.findall(r"\$\{(INFERNEO_\w+)", (ROOT / "compose.yaml").read_text("utf-8")))
    named = set(re.findall(r"\bINFERNEO_[A-Z][A-Z_]+\b", page.read_text(encoding="utf-8")))
    assert not named - known


@each_page
def test_every_endpoint_named_exists(page: Path) -> None:
    for text in codes(page):
        for path in re.findall(r"(?:^|[ 0-9])(/(?:v1|admin)/[\w${}/.-]+)", text):
            assert any(re.fullmatch(each, path) for each in ENDPOINT_PATHS), path
