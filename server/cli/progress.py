"""Progress of models on a terminal: a row with a stage and a bar for each."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from server.observe.terminal import clean

_BAR, _NAME, _REFRESHES_PER_SECOND = 16, 26, 8
_MEASURED_SECONDS = 2.0
_LINE_SECONDS = 10.0
_MINUTES_FROM, _HOURS_FROM = 90, 5400  # seconds
_BYTES_FROM = 1_000_000
_WORDS = {
    "checking": "checking the weights",
    "compile": "compiling programs",
    "joining": "waiting for the other processes",
    "loading": "reading weights",
    "verifying": "checking its hash",
}


class TimeLeft:
    """Estimates when a stage ends, from its speed since it was first seen.

    What an interrupted download has left counts as done, but not as fast.
    """

    def __init__(self) -> None:
        self._stage: tuple[str, int] = ("", 0)
        self._begin = (0.0, 0)

    def after(self, stage: str, done: int, total: int) -> str:
        """Return the time left in words, empty while it is unknown."""
        now = time.monotonic()
        if (stage, total) != self._stage or done < self._begin[1]:
            self._stage, self._begin = (stage, total), (now, done)
        elapsed, gained = now - self._begin[0], done - self._begin[1]
        if elapsed < _MEASURED_SECONDS or not gained > 0 or not total:
            return ""
        seconds = (total - done) * elapsed / gained
        if seconds < _MINUTES_FROM:
            return f"{seconds:.0f} s left"
        if seconds < _HOURS_FROM:
            return f"{seconds / 60:.0f} min left"
        return f"{seconds / 3600:.1f} h left"


def amount(done: int, total: int) -> str:
    """Return how far a stage is: in MB if it counts bytes, which only they are so many of."""
    if not total:
        return ""
    unit, word = (1_000_000, " MB") if total >= _BYTES_FROM else (1, "")
    return f"{done // unit:,} of {total // unit:,}{word}"


@contextmanager
def model_progress(console: Console, name: str) -> Iterator[Callable[[str, int, int], None]]:
    """Show the progress of one model: live on a terminal, elsewhere a line each 10 s."""
    row: dict[str, Any] = {"id": name, "stage": "waiting", "done": 0, "total": 0}
    left, shown = TimeLeft(), time.monotonic()

    def report(stage: str, done: int, total: int) -> None:
        nonlocal shown
        row.update(stage=stage, done=done, total=total)
        if console.is_terminal:
            return
        words = left.after(stage, done, total)
        if (now := time.monotonic()) > shown + _LINE_SECONDS:
            shown = now
            parts = [part for part in (amount(done, total), words) if part]
            text = clean(f"{name}: {stage} {', '.join(parts)}".rstrip())
            console.print(text, markup=False, highlight=False, soft_wrap=True)

    with ModelProgress(console, lambda: [row]):
        yield report


class ModelProgress:
    """A live table that disappears at the end. Without a terminal, nothing is shown.

    While it is shown, output to ``sys.stderr`` appears above it.

    Args:
        console: the console to draw on.
        rows: returns the current ``id``, ``stage``, ``done`` and ``total`` of each model.
    """

    def __init__(self, console: Console, rows: Callable[[], Iterable[Mapping[str, Any]]]) -> None:
        self._rows = rows
        self._begin = time.monotonic()
        self._left: dict[str, TimeLeft] = {}
        self._live = Live(
            console=console,
            get_renderable=self._table,
            refresh_per_second=_REFRESHES_PER_SECOND,
            transient=True,
            redirect_stdout=False,
        )

    def __enter__(self) -> "ModelProgress":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start showing the table."""
        if self._live.console.is_terminal:
            self._live.start(refresh=True)

    def stop(self) -> None:
        """Remove the table if it is still shown."""
        self._live.stop()

    def _table(self) -> Group:
        table = Table.grid(padding=(0, 2))
        table.add_column(max_width=_NAME, no_wrap=True)
        for _ in range(4):
            table.add_column(no_wrap=True)
        for row in self._rows():
            stage, done, total = row["stage"], row["done"], row["total"]
            if stage == "ready":
                table.add_row(Text(clean(row["id"])), Text("ready", style="green"), "")
                continue
            bar = ProgressBar(total or None, done, width=_BAR, pulse=not total)
            words = Text(clean(_WORDS.get(stage, stage)))
            left = self._left.setdefault(row["id"], TimeLeft()).after(stage, done, total)
            table.add_row(Text(clean(row["id"])), words, bar, amount(done, total), left)
        return Group(table, Text(f"{time.monotonic() - self._begin:.0f} s", style="dim"))
