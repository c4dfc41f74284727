"""Helpers that write the Markdown of the pages."""

import json
from collections.abc import Iterable, Sequence
from typing import Any


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table without its empty columns; an empty string if there are no rows."""
    found = list(rows)
    kept = [column for column in range(len(header)) if any(row[column] for row in found)]
    lines = [_row([row[column] for column in kept]) for row in (header, *found)]
    lines.insert(1, "|" + "---|" * len(kept))
    return "\n".join(lines) if found else ""


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", r"\|").split()) for cell in cells) + " |"


def code(value: Any) -> str:
    """Return a value as JSON, in code marks."""
    return f"`{json.dumps(value, ensure_ascii=False)}`"


def fence(language: str, text: str) -> str:
    """Return a block of code."""
    return f"```{language}\n{text}\n```"


def anchor(heading: str) -> str:
    """Return the anchor of a heading, as GitHub generates it."""
    kept = "".join(c for c in heading.lower() if c.isalnum() or c in " -_")
    return "#" + kept.replace(" ", "-")


def join(parts: Iterable[str]) -> str:
    """Join blocks by blank lines, leaving out empty ones."""
    return "\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n"
