"""The first minutes on a GPU: what is right, how fast steps are, and how fast the server is.

    python -m tests.accelerators.gpu check --seconds 420     # is it right?
    python -m tests.accelerators.gpu steps --seconds 540     # how near to the memory's rate is it?
    python -m tests.accelerators.gpu serve --seconds 540     # and with HTTP?

Each stage prints its figures as they come and as a table at the end, and writes them as JSON lines
to ``$OUT`` (or the working directory). It goes on after a failure, begins nothing after its
seconds, and exits with the number of failed checks. ``--dry`` does all of it at toy sizes on any
device: times are then shown and not judged. The compiled programs of whole models are kept in the
folder ``$CACHE``, if that is set.
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inferneo_jax.platform.flags import set_flags


class Report:
    """What a stage has found.

    Args:
        stage: its name.
        folder: where the JSON lines are written, and whatever else is to be kept.
        seconds: after which no part is begun.
        dry: whether sizes are toys, and times are not judged.
    """

    def __init__(self, stage: str, folder: Path, seconds: float, *, dry: bool) -> None:
        self.folder, self.dry, self.failed = folder, dry, 0
        self._until = time.monotonic() + seconds
        self._rows: list[tuple[str, str, str]] = []
        self._lines = folder / f"gpu-{stage}.jsonl"
        self._lines.unlink(missing_ok=True)

    def figure(self, name: str, ok: bool | None = None, **figures: Any) -> None:
        """Note figures.

        Args:
            name: of what was measured.
            ok: whether they are as wanted; None: nothing is wanted of them.
            figures: by name, with its unit.
        """
        self.failed += ok is False
        state = {None: "", True: "ok", False: "FAILED"}[ok]
        with self._lines.open("a", encoding="utf-8") as file:
            line = {"name": name, "ok": ok, "at": round(time.time(), 1), **figures}
            file.write(json.dumps(line, default=str) + "\n")
        text = "  ".join(f"{key}={_shown(value)}" for key, value in figures.items())
        self._rows.append((name, state, text))
        print(f"{state:7}{name:44}{text}", flush=True)

    def judged(self, ok: bool) -> bool | None:
        """Whether a time is as wanted; toys' times are not judged."""
        return None if self.dry else ok

    def run(self, name: str, part: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Run a part of the stage, if there is time left; what it raises is a failed check."""
        if time.monotonic() > self._until:
            self.figure(name, False, error="not begun: no time is left")
            return None
        try:
            return part(*arguments, **options)
        except Exception as error:  # noqa: BLE001 - whatever it is, the stage goes on
            traceback.print_exc()
            first = (str(error).splitlines() or [""])[0]
            self.figure(name, False, error=f"{type(error).__name__}: {first[:300]}")
            return None

    def left(self) -> float:
        """Seconds that are left, at least one."""
        return max(1.0, self._until - time.monotonic())

    def table(self) -> None:
        """Print all figures once more."""
        print(f"\n{len(self._rows)} figures, {self.failed} failed checks")
        for name, state, text in self._rows:
            print(f"{state:7}{name:44}{text}")


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> int:
    """Run a stage; the number of its failed checks."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=("check", "steps", "serve"))
    parser.add_argument("--seconds", type=float, default=540.0, help="after which nothing is begun")
    parser.add_argument("--dry", action="store_true", help="toy sizes, on any device")
    options = parser.parse_args()
    folder = Path(os.environ.get("OUT") or ".")
    folder.mkdir(parents=True, exist_ok=True)
    report = Report(options.stage, folder, options.seconds, dry=options.dry)
    set_flags()
    match options.stage:
        case "check":
            from tests.accelerators import gpu_check as stage
        case "steps":
            from tests.accelerators import gpu_steps as stage
        case "serve":
            from tests.accelerators import gpu_serve as stage
    stage.run(report)
    report.table()
    return report.failed


if __name__ == "__main__":
    sys.exit(main())
