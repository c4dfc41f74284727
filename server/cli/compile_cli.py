"""`inferneo compile`: a model's programs, compiled ahead for a start that compiles nothing."""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from server.cli.flags import given
from server.cli.plan_cli import find_config
from server.cli.progress import model_progress
from server.config.settings import Settings
from server.models.sources import draft_source, folder_of, sources_of

if TYPE_CHECKING:
    from inferneo_jax.planner.ahead import ModelShape
    from server.models.sources import Progress, Source

SETTINGS = (
    "checkpoints",
    "dtype",
    "quantization",
    "kv_dtype",
    "kernels",
    "slots",
    "max_len",
    "mesh",
    "speculation",
    "draft_model",
    "config",
)
"""The settings that programs depend on, or that say where models and settings are."""
EPILOG = "\n\n".join(
    (
        "Examples:",
        "inferneo compile Qwen/Qwen3-0.6B --topology v6e:2x2 --output programs",
        "inferneo compile smollm2-135m-instruct --max-len 4096 --output programs",
        "Settings are read as `inferneo serve` reads them, and the server must have the same.",
    )
)


def compile_programs(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Model to serve, as for `inferneo serve`; with a topology, its config.json or a "
            "Hugging Face id that `inferneo plan` knows is enough.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER", help="Folder to make; a server reads it as --compilation-cache."
        ),
    ],
    topology: Annotated[
        str | None,
        typer.Option(
            metavar="CHIPS",
            help="TPUs of one host, as v5e:2x4 or v6e:2x2, which need not be present.",
            show_default="the devices of this machine",
        ),
    ] = None,
    **_: Any,
) -> None:
    """Compile all programs of a model into a folder, from which a server loads them.

    The server must run the same version with the same settings, on devices of the same kind. If
    anything differs, it says what, and compiles as usual. Programs are code: the server loads them
    only from a folder to which nobody but its user and root can write.
    """
    flags = {name: value for name, value in given(context).items() if name in SETTINGS}
    settings = Settings.load(flags | {"models": [model]})
    if topology:
        # This uses the compilers of accelerators, never the accelerators themselves.
        os.environ["JAX_PLATFORMS"] = "cpu"
    # What JAX has read from its own cache cannot be kept.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    from inferneo_jax.platform.flags import set_flags

    set_flags()
    from inferneo_jax.planner.ahead import compile_ahead
    from inferneo_jax.planner.chips import Topology

    chips = Topology.parse(topology) if topology else None
    shape = _known if chips else _stored
    (source,), drafter = sources_of(settings), draft_source(settings)
    begun = time.monotonic()
    with model_progress(Console(stderr=True), model) as progress:
        made = compile_ahead(
            output.expanduser().absolute(),
            settings.engine_config(),
            shape(source, settings, progress),
            shape(drafter, settings, progress) if drafter else None,
            name=model,
            topology=chips,
            progress=progress,
        )
    size = sum(file.stat().st_size for file in output.expanduser().iterdir())
    Console().print(
        f"{output}: {len(made.programs)} programs for {made.facts['device']}, {size / 1e6:.1f} MB, "
        f"compiled in {time.monotonic() - begun:.0f} s",
        soft_wrap=True,
    )


def _known(source: "Source", settings: Settings, _: "Progress") -> "ModelShape":
    """The sizes of a model that need not be here: for accelerators, they are enough."""
    from inferneo_jax import checkpoint_path
    from inferneo_jax.planner.ahead import ModelShape

    path = source.path or checkpoint_path(settings.checkpoints_dir(), source.id)
    return ModelShape(config=find_config(str(path) if path.exists() else source.id))


def _stored(source: "Source", settings: Settings, progress: "Progress") -> "ModelShape":
    """The sizes of a model, and the formats of its weights; it is pulled if it is missing."""
    from inferneo_jax.models import weight_specs
    from inferneo_jax.planner.ahead import ModelShape
    from inferneo_jax.weights.checkpoint import open_weights, read_info
    from inferneo_jax.weights.sources.weight import block_formats

    info = read_info(folder_of(source, settings, progress))
    shapes = {name: spec.shape for name, spec in weight_specs(info.config).items()}
    return ModelShape(config=info.config, formats=block_formats(open_weights(info.path, shapes)))
