"""The `inferneo` command."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from inferneo_jax import InferneoError, __version__
from server.cli import compile_cli, keys_cli, plan_cli
from server.cli.bench import cli as bench_cli
from server.cli.chat.cli import chat
from server.cli.doctor.cli import doctor
from server.cli.flags import with_flags
from server.cli.follow import GROUPS, follow
from server.cli.progress import model_progress
from server.cli.serve import EPILOG, serve
from server.config.settings import Settings
from server.observe.terminal import clean

if TYPE_CHECKING:
    from inferneo_jax import Offer
    from inferneo_jax.weights.checkpoint import CheckpointInfo

MODELS, SERVE, MEASURE = "Models", "Serve", "Plan and measure"

_PIPED_WIDTH = 200  # where no terminal says how wide it is
_FORMATS = {"orbax": "Orbax", "gguf": "GGUF", "safetensors": "safetensors"}

app = typer.Typer(
    help="Serve language and embedding models over an OpenAI-compatible API.",
    epilog="Begin with `inferneo serve`; each command has a --help of its own.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command(epilog=EPILOG, rich_help_panel=SERVE)(with_flags(serve))
app.command(rich_help_panel=SERVE)(chat)
app.command(rich_help_panel=SERVE)(doctor)
app.add_typer(keys_cli.app, name="keys", rich_help_panel=SERVE)
app.command(rich_help_panel=SERVE)(with_flags(follow, GROUPS))
out = Console()
err = Console(stderr=True)

Checkpoints = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        show_default="that of the settings: INFERNEO_CHECKPOINTS",
        help="Folder of the converted models.",
    ),
]
Name = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of a converted model.", show_default=False)
]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"inferneo {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Serve language and embedding models over an OpenAI-compatible API."""
    del version


@app.command(rich_help_panel=MODELS)
def pull(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME",
            help="Names of the catalog, or repositories of the Hugging Face Hub: org/name, "
            "org/name:Q4_K_M or org/name:file.gguf.",
            show_default=False,
        ),
    ],
    checkpoints: Checkpoints = None,
) -> None:
    """Download and convert models; models that already exist are left unchanged.

    Licence, size and file are shown first. An interrupted download continues with the next pull.
    """
    from inferneo_jax.weights.fetch import pull as pull_model

    folder = _folder(checkpoints)
    for name in names:
        with model_progress(err, name) as progress:
            path = pull_model(name, folder, progress, announce=_announce)
        out.print(f"{name}: {path}", soft_wrap=True)


@app.command(rich_help_panel=MODELS)
def convert(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH", help="A GGUF file, or a folder with config.json and safetensors."
        ),
    ],
    checkpoints: Checkpoints = None,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Name of the converted model.",
            show_default="that of the file or folder",
        ),
    ] = None,
    quantization: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="Quantize the matrices: int8 (for GPUs and TPUs), q8_0, q6_k, q5_k, q4_k, q5_1, "
            "q5_0, q4_1, q4_0 (for CPUs), or none, for an Orbax checkpoint of their own dtype.",
            show_default="served as they are in their files",
        ),
    ] = None,
) -> None:
    """Make a checkpoint of a model that is on this machine; its files are linked, not copied."""
    from inferneo_jax.weights.catalog import checkpoint_path
    from inferneo_jax.weights.convert import convert as convert_model

    source = path.absolute()
    name = name or (source.stem if source.is_file() else source.name)
    destination = checkpoint_path(_folder(checkpoints), name)
    with model_progress(err, name) as progress:
        convert_model(source, destination, progress, quantization=quantization)
    out.print(f"{name}: {destination}", soft_wrap=True)


@app.command("list", rich_help_panel=MODELS)
def list_models(checkpoints: Checkpoints = None) -> None:
    """List the models that are here, and those of the catalog that can be pulled."""
    from rich.table import Table

    from inferneo_jax.weights.catalog import list_checkpoints, list_downloads, load_catalog
    from inferneo_jax.weights.checkpoint import read_info
    from server.cli.doctor.finding import in_bytes, size_of

    columns = ("model", "kind", "format", "params", "size", "state", "licence")
    table = Table(*columns, box=None)
    checkpoints_folder = _folder(checkpoints)
    found, catalog = list_checkpoints(checkpoints_folder), load_catalog()
    begun = list_downloads(checkpoints_folder)
    for name, folder in found.items():
        size = in_bytes(size_of(folder))
        try:
            info = read_info(folder)
            cells = (_format(info), _parameters(info), size, "ready", info.licence)
        except InferneoError:
            table.add_row(name, "", "", "", size, "damaged: remove it and pull again")
        else:
            table.add_row(name, "chat" if info.kind == "decoder" else "embedding", *cells)
    for name, kept in begun.items():
        if name not in found:
            table.add_row(name, "", "", "", in_bytes(kept), "pull begun")
    absent = [name for name in catalog if name not in found and name not in begun]
    for name in absent:
        entry = catalog[name]
        size = in_bytes(entry.size)
        table.add_row(name, entry.kind, "", "", size, "not here", entry.licence)
    table.columns[0].min_width = max(map(len, (*found, *begun, *absent)), default=0)
    for column in table.columns[3:5]:
        column.justify = "right"
    if not out.is_terminal:
        out.width = max(out.width, _PIPED_WIDTH)
    out.print(table)
    if absent:  # on one line, so that it can be copied
        out.print(f"\nTo have them: inferneo pull {' '.join(absent)}", soft_wrap=True)


@app.command(rich_help_panel=MODELS)
def show(name: Name, checkpoints: Checkpoints = None) -> None:
    """Show what a converted model is and where it came from."""
    import datetime

    from rich.table import Table

    from inferneo_jax.weights.catalog import find_checkpoint
    from inferneo_jax.weights.checkpoint import read_info

    info = read_info(find_checkpoint(_folder(checkpoints), name))
    created = datetime.datetime.fromtimestamp(info.created, datetime.UTC)
    rows = {
        "name": name,
        "folder": info.path,
        "family": f"{info.family} ({info.kind})",
        "format": _format(info),
        "parameters": f"{_count(info):,}",
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


@app.command(rich_help_panel=MODELS)
def rm(
    names: Annotated[
        list[str],
        typer.Argument(metavar="NAME", help="Names of converted models.", show_default=False),
    ],
    checkpoints: Checkpoints = None,
) -> None:
    """Remove converted models."""
    from inferneo_jax.weights.catalog import remove_checkpoint

    for name in names:
        remove_checkpoint(_folder(checkpoints), name)
        out.print(f"{name}: removed")


# Added here so that help shows them last.
app.command("compile", epilog=compile_cli.EPILOG, rich_help_panel=MODELS)(
    with_flags(compile_cli.compile_programs, compile_cli.SETTINGS)
)
app.command(rich_help_panel=MEASURE)(plan_cli.plan)
app.add_typer(bench_cli.app, name="bench", rich_help_panel=MEASURE)


def _format(info: "CheckpointInfo") -> str:
    """Return the format of a model's weights, with the quantization that its file's name states."""
    from inferneo_jax.weights.choice import label_of

    label = label_of(str(info.source.get("file", "")))
    return " ".join(filter(None, (_FORMATS[info.format], label)))


def _parameters(info: "CheckpointInfo") -> str:
    """Return a model's number of parameters, rounded as models are named after it."""
    count = _count(info)
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.0f}M"


def _count(info: "CheckpointInfo") -> int:
    import math

    from inferneo_jax.weights.checkpoint import stored_shapes

    return sum(math.prod(shape) for shape in stored_shapes(info).values())


def _announce(offer: "Offer") -> None:
    """Show what is about to be downloaded."""
    err.print(clean(f"{offer.name}: {offer}"), markup=False, highlight=False, soft_wrap=True)


def _folder(checkpoints: str | None) -> Path:
    """Return the folder of converted models."""
    return Settings.load({"checkpoints": checkpoints} if checkpoints else {}).checkpoints_dir()


def main(command: Callable[[], object] = app) -> None:
    """Run a command; a known error prints one message and exits with status 1."""
    try:
        command()
    except InferneoError as error:
        err.print("[bold red]error:[/] ", end="")
        err.print(clean(str(error)), markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
