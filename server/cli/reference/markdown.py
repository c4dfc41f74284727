"""The little Markdown that the pages are made of."""

import json
from collections.abc import Iterable, Sequence
from typing import Any


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table without the columns that are empty; nothing where there are no rows."""
    found = list(rows)
    kept = [column for column in range(len(header)) if any(row[column] for row in found)]
    lines = [_row([row[column] for column in kept]) for row in (header, *found)]
    lines.insert(1, "|" + "---|" * len(kept))
    return "\n".join(lines) if found else ""


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", r"\|").split()) for cell in cells) + " |"


def code(value: Any) -> str:
    """A value as JSON has it."""
    return f"`{json.dumps(value, ensure_ascii=False)}`"


def fence(language: str, text: str) -> str:
    """A block of code."""
    return f"```{language}\n{text}\n```"


def anchor(heading: str) -> str:
    """What a link to a heading ends with, as GitHub makes it."""
    kept = "".join(c for c in heading.lower() if c.isalnum() or c in " -_")
    return "#" + kept.replace(" ", "-")


def join(parts: Iterable[str]) -> str:
    """Blocks with a blank line between, those that are empty left out."""
    return "\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n"
