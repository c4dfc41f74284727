"""The `inferneo` command."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from inferneo_jax.errors import InferneoError
from server import keys_cli, plan_cli
from server.bench import cli as bench_cli
from server.doctor.cli import doctor
from server.flags import with_flags
from server.follow import GROUPS, follow
from server.serve import EPILOG, serve

app = typer.Typer(
    help="Serve language and embedding models over an OpenAI-compatible API.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command(epilog=EPILOG)(with_flags(serve))
app.add_typer(keys_cli.app, name="keys")
app.add_typer(bench_cli.app, name="bench")
app.command()(doctor)
app.command()(plan_cli.plan)
app.command()(with_flags(follow, GROUPS))
out = Console()
err = Console(stderr=True)


def _default_checkpoints() -> Path:
    from inferneo_jax.weights.catalog import default_checkpoints_dir

    return default_checkpoints_dir()


Checkpoints = Annotated[
    Path,
    typer.Option(
        envvar="INFERNEO_CHECKPOINTS",
        default_factory=_default_checkpoints,
        show_default="the checkout's checkpoints, else the user's cache",
        help="Folder of the converted models.",
    ),
]
Name = Annotated[str, typer.Argument(help="Name of a converted model.", show_default=False)]


@app.command()
def pull(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME...",
            help="Names of the catalog, or org/name (org/name:file.gguf) of the Hugging Face Hub.",
            show_default=False,
        ),
    ],
    checkpoints: Checkpoints,
) -> None:
    """Download models and convert them; those that are there already are left alone."""
    from inferneo_jax.weights.fetch import pull as pull_model

    _convert_on_host()
    for name in names:
        with _progress(name) as progress:
            path = pull_model(name, checkpoints, progress)
        out.print(f"{name}: {path}", soft_wrap=True)


@app.command()
def convert(
    path: Annotated[
        Path, typer.Argument(help="A GGUF file, or a folder with config.json and safetensors.")
    ],
    checkpoints: Checkpoints,
    name: Annotated[
        str | None, typer.Option(help="Name of the checkpoint; by default that of the path.")
    ] = None,
) -> None:
    """Convert a model that lies on this machine."""
    from inferneo_jax.weights.catalog import checkpoint_path
    from inferneo_jax.weights.convert import convert as convert_model

    _convert_on_host()
    source = path.absolute()
    name = name or (source.stem if source.is_file() else source.name)
    destination = checkpoint_path(checkpoints, name)
    with _progress(name) as progress:
        convert_model(source, destination, progress)
    out.print(f"{name}: {destination}", soft_wrap=True)


@app.command("list")
def list_models(checkpoints: Checkpoints) -> None:
    """List the converted models, and those of the catalog that could be pulled."""
    from rich.table import Table

    from inferneo_jax.weights.catalog import list_checkpoints, load_catalog
    from inferneo_jax.weights.checkpoint import read_info

    table = Table("model", "kind", "size", "licence", "state", box=None)
    found, catalog = list_checkpoints(checkpoints), load_catalog()
    for name, folder in found.items():
        size = f"{_bytes_below(folder) / 1e6:,.0f} MB"
        try:
            info = read_info(folder)
        except InferneoError:
            table.add_row(name, "", size, "", "damaged: remove it and pull again")
        else:
            kind = "chat" if info.kind == "decoder" else "embedding"
            table.add_row(name, kind, size, info.licence or "", "ready")
    for name, entry in catalog.items():
        if name not in found:
            table.add_row(name, entry.kind, "", entry.licence, f"inferneo pull {name}")
    out.print(table)


@app.command()
def show(name: Name, checkpoints: Checkpoints) -> None:
    """Show what a converted model is and where it came from."""
    import datetime
    import math

    from rich.table import Table

    from inferneo_jax.weights.catalog import checkpoint_path
    from inferneo_jax.weights.checkpoint import read_info, stored_shapes

    info = read_info(checkpoint_path(checkpoints, name))
    shapes = stored_shapes(info.path)
    created = datetime.datetime.fromtimestamp(info.created, datetime.UTC)
    rows = {
        "name": name,
        "folder": info.path,
        "family": f"{info.family} ({info.kind})",
        "parameters": f"{sum(math.prod(shape) for shape in shapes.values()):,}",
        "licence": info.licence,
        "created": f"{created:%Y-%m-%d %H:%M} UTC",
        "ends at ids": ", ".join(map(str, info.eos_token_ids)) or None,
        **{f"source {key}": value for key, value in info.source.items()},
        **info.config.to_dict(),
    }
    table = Table(box=None, show_header=False)
    for key, value in rows.items():
        table.add_row(key.replace("_", " "), "-" if value is None else str(value))
    out.print(table)


@app.command()
def rm(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", show_default=False)],
    checkpoints: Checkpoints,
) -> None:
    """Remove converted models."""
    from inferneo_jax.weights.catalog import remove_checkpoint

    for name in names:
        remove_checkpoint(checkpoints, name)
        out.print(f"{name}: removed")


def _convert_on_host() -> None:
    """Conversion only moves bytes; it must not take an accelerator from a running server."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def _bytes_below(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@contextlib.contextmanager
def _progress(name: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr for the current stage of one model."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
    from rich.progress import TimeElapsedColumn as Elapsed

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), Elapsed())
    with Progress(*columns, console=err, transient=True) as bars:
        task = bars.add_task(name, total=None)
        current = ""

        def report(stage: str, done: int, total: int) -> None:
            nonlocal task, current
            # A bar cannot go back to an unknown total: each stage has its own.
            if stage != current:
                bars.remove_task(task)
                task = bars.add_task(f"{name}: {stage}", total=total or None)
                current = stage
            bars.update(task, completed=done, total=total or None)

        yield report


def main(command: Callable[[], object] = app) -> None:
    """Runs a command; what goes wrong for a known reason is one message and exit status 1."""
    try:
        command()
    except InferneoError as error:
        err.print("[bold red]error:[/] ", end="")
        err.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
