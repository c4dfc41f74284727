"""`inferneo plan`: the memory and speed of a model on chips that need not be present."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from inferneo_jax import ConfigError
from server.config.schema import DEVICE_SLOTS

if TYPE_CHECKING:
    from inferneo_jax.config import DecoderConfig, ModelConfig
    from inferneo_jax.planner.planner import Plan, Step

_BAR = 60
_COLOURS = {
    "weights": "blue",
    "state": "magenta",
    "temporaries": "yellow",
    "code": "cyan",
    "KV": "green",
}


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="Hugging Face id, GGUF file, config.json or folder of a model.", show_default=False
        ),
    ],
    topology: Annotated[
        str, typer.Option(help="Chips, as v5e:2x4, v6e:2x2, v5p:2x2x1, h100:8 or cpu:8.")
    ],
    mesh: Annotated[
        str, typer.Option(envvar="INFERNEO_MESH", help="As data=1,model=8; all on model if empty.")
    ] = "",
    slots: Annotated[
        int | None,
        typer.Option(help="Requests that run at once, on all chips.", show_default=DEVICE_SLOTS),
    ] = None,
    max_len: Annotated[
        int | None, typer.Option(help="Tokens of the longest request; the model's if not given.")
    ] = None,
    context: Annotated[int, typer.Option(help="Live tokens each request is reckoned with.")] = 1024,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    quantization: Annotated[str, typer.Option(help="Of the weights: none, int8 or fp8.")] = "auto",
    kv_dtype: Annotated[
        str, typer.Option(help="Of keys and values: auto, float32, bfloat16, int8 or fp8.")
    ] = "auto",
    draft_model: Annotated[
        str | None,
        typer.Option(help="A smaller model that drafts; named like MODEL.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Compile a model's steps for chips that need not be present; show memory and speed."""
    # This uses the compilers of accelerators, never the accelerators themselves.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from inferneo_jax.config import EngineConfig, MeshShape
    from inferneo_jax.planner.budget import Wish
    from inferneo_jax.planner.chips import Topology
    from inferneo_jax.planner.planner import make_plan

    choices: Any = {"dtype": dtype, "quantization": quantization, "kv_dtype": kv_dtype}
    engine = EngineConfig(slots=slots, max_len=max_len, mesh=MeshShape.parse(mesh), **choices)
    found = find_model(model)
    wish = Wish(
        model=found,
        topology=Topology.parse(topology),
        engine=engine,
        context=min(context, max_len or found.context_length),
        draft=find_model(draft_model) if draft_model else None,
    )
    console = Console()
    with Console(stderr=True).status("planning") as status:
        made = make_plan(wish, lambda text: status.update(text))
    if as_json:
        typer.echo(json.dumps(made.to_dict() | {"model": model}, indent=2))
    else:
        _print(console, model, made)
    if made.missing_bytes:
        raise typer.Exit(1)


def find_model(name: str) -> "DecoderConfig":
    """Return the configuration of a model by the name that the user gives.

    Raises:
        ConfigError: there is no such model, or it does not generate text.
    """
    from inferneo_jax.config import DecoderConfig

    config = find_config(name)
    if not isinstance(config, DecoderConfig):
        raise ConfigError(f"{name} makes embeddings; plans are of models that generate")
    return config


def find_config(name: str) -> "ModelConfig":
    """Return the configuration of a model by the name that the user gives.

    Raises:
        ConfigError: there is no such model.
    """
    from inferneo_jax.models.families import find_family
    from inferneo_jax.planner.known import KNOWN
    from inferneo_jax.weights.checkpoint import INFO_FILE, read_info
    from inferneo_jax.weights.convert import read_model

    if name in KNOWN:
        return KNOWN[name]
    path = Path(name)
    if (path / INFO_FILE).is_file():
        return read_info(path).config
    if path.is_file() and path.suffix.lower() == ".gguf":
        return read_model(path).config
    file = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        known = "\n  ".join(KNOWN)
        raise ConfigError(
            f"{name} is neither a model that plans know nor the GGUF file, config.json or "
            f"folder of one ({type(error).__name__}). Known are\n  {known}"
        ) from None
    return find_family(values).read_config(values)


def _print(console: Console, model: str, made: "Plan") -> None:
    console.print(
        f"[bold]{model}[/] on {made.topology}, mesh data={made.mesh.data},model={made.mesh.model}, "
        f"{_numbers(made)}"
    )
    console.print(_memory(made))
    if made.missing_bytes:
        console.print(
            f"[bold red]It does not fit[/]: {_size(made.missing_bytes)} a chip are missing for the "
            f"weights and one request of {made.context} tokens."
        )
        remedies = " or ".join(made.remedies) or "a smaller model"
        console.print(f"It would fit with {remedies}.")
        return
    console.print(
        f"KV cache: {made.kv_tokens:,} tokens in all, so {made.rows} requests of {made.context} "
        f"tokens run at once; there are {made.slots} slots."
    )
    console.print(
        f"{made.num_programs} programs: about {made.compile_seconds:,.0f} s of compiling on this "
        f"machine, one at a time. Decode of {_listed(made.row_buckets)} rows; prefill of "
        f"{_listed(f'{rows} x {tokens}' for rows, tokens in made.prefill_shapes)} tokens."
    )
    for step in made.steps:
        console.print(_step(step, made))
    console.print(
        f"Bound: {made.tokens_per_second:,.0f} output tokens/s, "
        f"{made.tokens_per_second / (made.mesh.data * (made.mesh.model or 1)):,.0f} a chip, with "
        f"{made.rows} requests of {made.context} live tokens. Peaks of the chip's makers; nothing "
        "was run."
    )
    if made.advised_mesh != made.mesh:
        better = f"data={made.advised_mesh.data},model={made.advised_mesh.model}"
        console.print(f"Advised mesh: [bold]{better}[/], whose bound is higher.")


def _listed(items: Iterable[object]) -> str:
    *most, last = map(str, items)
    return f"{', '.join(most)} or {last}" if most else last


def _numbers(made: "Plan") -> str:
    """Describe the dtypes that the plan is for."""
    weights = made.dtype if made.quantization in ("auto", "none") else made.quantization
    return weights if weights == made.kv_dtype else f"{weights} weights, {made.kv_dtype} KV"


def _memory(made: "Plan") -> Table:
    """Return a bar of one chip's memory, with a legend of its parts."""
    parts = {
        "weights": made.weight_bytes,
        "state": made.state_bytes,
        "temporaries": made.temporary_bytes,
        "code": made.code_bytes,
        "KV": made.kv_bytes,
    }
    whole = max(made.memory_bytes, sum(parts.values()))
    bar = Text()
    for name, size in parts.items():
        bar.append("█" * round(_BAR * size / whole), style=_COLOURS[name])
    bar.append("░" * max(0, _BAR - len(bar)), style="dim")
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row(f"one chip, {_size(made.memory_bytes)}", bar)
    for name, size in parts.items():
        table.add_row(f"  {name}", Text(f"■ {_size(size)}", style=_COLOURS[name]))
    return table


def _step(step: "Step", made: "Plan") -> Table:
    table = Table(
        title=f"{step.kind}, {step.tokens} tokens", title_justify="left", box=None, pad_edge=False
    )
    table.add_column("one chip, one step")
    table.add_column("", justify="right")
    in_place = 100 * step.aliased_bytes / max(1, step.cache_bytes)
    table.add_row("weights and live KV", _size(step.needed_bytes))
    if step.moved_bytes is not None:
        table.add_row("memory traffic as compiled", _size(step.moved_bytes))
    table.add_row("operations", f"{step.operations / 1e9:,.1f} G")
    table.add_row("temporaries", _size(step.temporary_bytes))
    table.add_row("cache updated in place", f"{min(100.0, in_place):.0f} %")
    for each in step.collectives:
        table.add_row(
            f"{each.count} x {each.kind} of {_size(each.num_bytes)}",
            f"{_size(int(each.sent_bytes))} sent",
        )
    table.add_row(f"at least ({step.wall} is the wall)", f"{1e3 * step.seconds:.2f} ms")
    return table


def _size(number: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:,.2f} {unit}"
    return f"{number} B"
