"""``inferneo bench engine``: benchmarks the engine, without HTTP."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from server.cli.bench import options
from server.cli.bench.errors import BenchError

if TYPE_CHECKING:
    from inferneo_jax import LanguageModel


def engine(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Name or folder of a converted chat model.", show_default="the catalog's"
        ),
    ] = None,
    concurrency: options.Concurrency = "1,4,16",
    prompt_tokens: options.PromptTokens = 105,
    output_tokens: options.OutputTokens = 64,
    prefill: Annotated[
        str, typer.Option(metavar="N,...", help="Prompt lengths whose prefill is timed; or none.")
    ] = "128,512,2048",
    requests: options.NumRequests = None,
    goodput: options.Goodput = "",
    seed: options.Seed = 0,
    json_file: options.JsonFile = None,
    plot: options.PlotFile = None,
) -> None:
    """Measure the engine alone: prefill, decode, and the load of `bench serve` without HTTP.

    Loads the model in this process with a server's settings (INFERNEO_DTYPE, INFERNEO_SLOTS and so
    on), and submits token ids. The difference to the figures of `bench serve` is the cost of HTTP,
    JSON and text.

      inferneo bench engine smollm2-135m-instruct --concurrency 1,4,16,32
      INFERNEO_DTYPE=float32 inferneo bench engine my-model --prefill 4096
    """
    asked = options.as_json(locals())
    from server.cli.bench import plot as plots
    from server.cli.bench import report
    from server.cli.bench.engine_load import EngineLoad
    from server.cli.bench.stats import parse_goodput

    clients = options.integers(concurrency, "--concurrency", options.MOST_CLIENTS)
    lengths = []
    if prefill != "none":
        lengths = options.integers(prefill, "--prefill", options.MOST_REQUESTS)
    limits = parse_goodput(goodput)
    if plot:
        plots.require()
    console = Console()
    options.tell("loading")
    loaded = load(model)
    bench = EngineLoad(loaded, seed)
    work = (prompt_tokens, output_tokens)
    try:
        bench.run([work], 1)
        options.tell("prefill")
        lengths = sorted({min(length, loaded.max_len - 1) for length in lengths})
        prefills = [bench.prefill(length) for length in lengths]
        options.tell("decode")
        decodes = [bench.decode(rows) for rows in clients]
        options.tell("load")
        count = lambda each: requests or options.default_requests(each)  # noqa: E731
        rows = bench.sweep(clients, work, count, limits)
    finally:
        loaded.stop()
    title = f"{loaded.name}, engine alone"
    if prefills:
        console.print(_prefill_table(prefills))
    console.print(_decode_table(decodes))
    console.print(report.level_table(rows, f"{title}, {prompt_tokens} + {output_tokens} tokens"))
    if json_file:
        content = report.document(
            "engine",
            asked | {"model": loaded.name},
            prefill=prefills,
            decode=decodes,
            levels=rows,
        )
        report.write_json(json_file, content)
    if plot:
        plots.draw(plot, {loaded.name: rows}, title)


def load(name: str | None) -> "LanguageModel":
    """Load a model by name or folder, as a server with these settings would.

    Raises:
        BenchError: the model computes embeddings.
        InferneoError: the model cannot be loaded.
    """
    from inferneo_jax import LanguageModel
    from server.config.settings import Settings
    from server.models.sources import load_from_disk, sources_of

    settings = Settings.load()
    if name is not None:
        settings = settings.model_copy(update={"models": (name,), "aliases": {}})
    source = sources_of(settings)[0]
    loaded = load_from_disk(source, settings, lambda *_: None)
    if not isinstance(loaded, LanguageModel):
        loaded.stop()
        raise BenchError(
            f"{source.id} makes embeddings; measure it with "
            f"`inferneo bench serve --endpoint embeddings --model {source.id}`"
        )
    return loaded


def _prefill_table(rows: list[dict[str, float]]) -> Table:
    table = Table(title="prefill, one prompt", title_justify="left", box=None, pad_edge=False)
    for heading in ("prompt tokens", "ms", "tok/s"):
        table.add_column(heading, justify="right")
    for row in rows:
        speed = f"{row['tokens_per_second']:,.0f}"
        table.add_row(f"{row['prompt_tokens']:,}", f"{1000 * row['seconds']:,.1f}", speed)
    return table


def _decode_table(rows: list[dict[str, float]]) -> Table:
    table = Table(title="decode, steady", title_justify="left", box=None, pad_edge=False)
    for heading in ("rows", "step ms", "tok/s"):
        table.add_column(heading, justify="right")
    for row in rows:
        speed = f"{row['tokens_per_second']:,.1f}"
        table.add_row(str(row["rows"]), f"{1000 * row['step_seconds']:.2f}", speed)
    return table
