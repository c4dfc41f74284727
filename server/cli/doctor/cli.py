"""`inferneo doctor`: runs every check and prints a line for each."""

import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from inferneo_jax import __version__
from server.cli.doctor.finding import Finding

_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def doctor(
    config: Annotated[
        str | None, typer.Option(metavar="FILE", help="A TOML file of settings, as of serve.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it for programs.")] = False,
) -> None:
    """Check the installation, and say what is wrong and how to fix it; nothing is changed.

    The exit status is 1 if there is a problem. With a warning the server runs, but not as well as
    it could, or not for every client.
    """
    found = list(examine({"config": config} if config else {}))
    worst = max((each.state for each in found), key=list(_STYLES).index)
    if as_json:
        checks = [vars(each) for each in found]
        print(json.dumps({"version": __version__, "state": worst, "checks": checks}, indent=2))
    else:
        _show(found)
    raise typer.Exit(worst == "problem")


def examine(flags: dict[str, Any]) -> Iterator[Finding]:
    """Yield the findings of all checks; ``flags`` are the settings of the command line."""
    # Imported here because they import numpy, which would delay every command.
    from server.cli.doctor import machine, setup
    from server.cli.doctor.accelerator import accelerator
    from server.process.listening import listener_at

    with machine.start_survey() as process:  # slow, so it runs beside the others
        try:
            yield from machine.packages()
            read, found = setup.settings(flags)
            there = listener_at(read.host, read.port) if read else None
            models = list(setup.models(read)) if read else []
            survey = machine.end_survey(process)
        finally:
            process.kill()
    yield from machine.devices(survey, served=bool(there and there.status))
    yield from accelerator(survey)
    if read:
        yield from machine.memory(survey, sum(weights for _, weights, _ in models))
    yield from machine.kernels(survey, read.kernels if read else "auto")
    yield from found
    if read is None:
        yield Finding(
            "Others", "warning", "models, keys and port were not looked at: fix the settings first"
        )
        return
    yield from machine.disk(read.checkpoints_dir(), sum(missing for *_, missing in models))
    for finding, *_ in models:
        yield finding
    yield from setup.compiled(read)
    yield from setup.keys(read)
    yield from setup.port(read, there)


def _show(found: list[Finding]) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for each in found:
        text = Text(each.text)
        if each.fix:
            text.append(f"\n-> {each.fix}", style="bold")
        table.add_row(Text(each.state, style=_STYLES[each.state]), each.check, text)
    console = Console(highlight=False)
    console.print(table)
    counts = {state: sum(each.state == state for each in found) for state in ("problem", "warning")}
    words = [f"{count} {state}{'s' * (count != 1)}" for state, count in counts.items() if count]
    console.print(f"\n{', '.join(words) or 'All is well'}.")
