"""Reports of the figures, as tables and as JSON."""

import datetime
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.table import Table
from rich.text import Text

from inferneo_jax import __version__
from server.cli.bench.errors import BenchError
from server.observe.terminal import clean

BUSY_SHARE = 0.1
"""The share of the machine above which a note tells of the client's own load."""
CACHED_SHARE = 0.1

Figures = dict[str, Any]


def document(command: str, settings: Figures, **parts: Any) -> Figures:
    """Return the content of a JSON file: how the figures were measured, and the figures."""
    now = datetime.datetime.now(datetime.UTC)
    return {
        "command": f"inferneo bench {command}",
        "version": __version__,
        "time": now.isoformat(timespec="seconds"),
        "machine": {
            "system": platform.system(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        },
        "settings": settings,
        **parts,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def write_json(file: Path, content: Figures) -> None:
    """Write a JSON file.

    Raises:
        BenchError: the file cannot be written.
    """
    try:
        file.write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2) + b"\n")
    except OSError as error:
        raise BenchError(f"{file} cannot be written: {error.strerror}") from None


def level_table(rows: Sequence[Figures], title: str) -> Table:
    """Return a table of the levels of load on a language model. Latencies are p50/p90/p99 in ms."""
    table = _titled(title)
    columns: list[tuple[str, Callable[[Figures], str]]] = [
        ("load", lambda row: row["level"]),
        ("req/s", lambda row: f"{row['requests_per_second']:.2f}"),
        ("output\ntok/s", lambda row: f"{row['output_tokens_per_second']:,.1f}"),
        ("total\ntok/s", lambda row: f"{row['total_tokens_per_second']:,.1f}"),
        ("TTFT ms\np50/p90/p99", lambda row: milliseconds(row["ttft"])),
        ("ITL ms\np50/p90/p99", lambda row: milliseconds(row["itl"])),
        ("end-to-end ms\np50/p90/p99", lambda row: milliseconds(row["e2e"])),
    ]
    for i, _ in enumerate(rows[0].get("ttft_of_turns", ()) if rows else ()):
        columns.append((f"TTFT ms\nturn {i + 1}", lambda row, i=i: _turn(row, i)))  # type: ignore[misc]
    if rows and "long_prompts" in rows[0]:
        columns.append(("ITL ms\nmax", lambda row: _most(row["itl"])))
        columns.append(("long\nprompts", lambda row: str(row["long_prompts"]["requests"])))
        columns.append(
            ("their TTFT ms\np50/p90/p99", lambda row: milliseconds(row["long_prompts"]["ttft"]))
        )
    if rows and "goodput" in rows[0]:
        columns.append(("good", lambda row: f"{row['goodput']['share']:.0%}"))
        columns.append(("good\nreq/s", lambda row: f"{row['goodput']['requests_per_second']:.2f}"))
    if any(row["errors"] for row in rows):
        columns.append(("failed", lambda row: str(sum(row["errors"].values()))))
    _fill(table, columns, rows)
    return table


def embedding_table(rows: Sequence[Figures], title: str) -> Table:
    """Return a table of the levels of load on an embedding model."""
    table = _titled(title)
    columns: list[tuple[str, Callable[[Figures], str]]] = [
        ("load", lambda row: row["level"]),
        ("req/s", lambda row: f"{row['requests_per_second']:.2f}"),
        ("texts/s", lambda row: f"{row['texts_per_second']:,.1f}"),
        ("tok/s", lambda row: f"{row['total_tokens_per_second']:,.0f}"),
        ("end-to-end ms\np50/p90/p99", lambda row: milliseconds(row["e2e"])),
    ]
    if any(row["errors"] for row in rows):
        columns.append(("failed", lambda row: str(sum(row["errors"].values()))))
    _fill(table, columns, rows)
    return table


def _titled(title: str) -> Table:
    """Return an empty table; its title is literal, since servers choose the names of models."""
    shown = Text(clean(title), style="table.title")
    return Table(title=shown, title_justify="left", box=None, pad_edge=False)


def _fill(
    table: Table, columns: list[tuple[str, Callable[[Figures], str]]], rows: Sequence[Figures]
) -> None:
    for header, _ in columns:
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(cell(row) for _, cell in columns))


def _turn(row: Figures, index: int) -> str:
    turns = row.get("ttft_of_turns", ())
    return milliseconds(turns[index]) if index < len(turns) else "-"


def milliseconds(figures: Figures | None) -> str:
    """Return the percentiles of a latency, in milliseconds, for a cell."""
    if figures is None:
        return "-"
    return "/".join(_short(1000 * figures[name]) for name in ("p50", "p90", "p99"))


def _most(figures: Figures | None) -> str:
    return _short(1000 * figures["max"]) if figures else "-"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def print_notes(console: Console, rows: Sequence[Figures], wanted: int) -> None:
    """Print notes that a reader of the figures must know."""
    prompts = [row["prompt_tokens"] / (row["completed"] or 1) for row in rows]
    outputs = [row["output_tokens"] / (row["completed"] or 1) for row in rows]
    shares = [row["client_cpu_share"] for row in rows]
    notes = [
        f"{_range(prompts)} prompt and {_range(outputs)} output tokens a request; this client "
        f"took {max(shares):.1%} of the machine's processor time at most."
    ]
    if outputs and max(outputs) and min(outputs) < 0.95 * wanted:
        notes.append(
            f"Answers are shorter than --output-tokens {wanted}: the server ends them by itself."
        )
    if max(shares) > BUSY_SHARE:
        notes.append(
            "[yellow]The client takes what the server then lacks: run it on another machine.[/]"
        )
    cached = sum(row["cached_tokens"] for row in rows)
    turns = any("ttft_of_turns" in row for row in rows)
    if not turns and cached > CACHED_SHARE * sum(row["prompt_tokens"] for row in rows):
        notes.append(
            "[yellow]The server knew some of these prompts already, from a run before this one: "
            "choose another --seed.[/]"
        )
    failed = sum(sum(row.get("long_prompts", {}).get("errors", {}).values()) for row in rows)
    if failed:
        notes.append(f"[yellow]{failed} long prompts failed.[/]")
    details = {name: text for row in rows for name, text in row["error_details"].items()}
    for note in notes:
        console.print(note, soft_wrap=True, highlight=False)
    for name, text in details.items():
        count = sum(row["errors"].get(name, 0) for row in rows)
        console.print(f"[yellow]{count} failed:[/] ", end="")
        console.print(clean(text), markup=False, highlight=False, soft_wrap=True)


def _range(values: Sequence[float]) -> str:
    low, high = min(values, default=0.0), max(values, default=0.0)
    return f"{low:.0f}" if round(low) == round(high) else f"{low:.0f} to {high:.0f}"
