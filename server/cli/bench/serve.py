"""``inferneo bench serve``: benchmarks a running server."""

import asyncio
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from server.cli.bench import options
from server.cli.bench.errors import BenchError


class EndpointName(StrEnum):
    """The endpoint that requests are sent to."""

    COMPLETIONS = "completions"
    CHAT = "chat"
    EMBEDDINGS = "embeddings"


def serve(
    url: Annotated[
        str, typer.Option(metavar="URL", help="Any OpenAI-compatible server.")
    ] = "http://127.0.0.1:8000",
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="By its name there.", show_default="the server's first"),
    ] = None,
    endpoint: Annotated[EndpointName, typer.Option(help="Which requests.")] = (
        EndpointName.COMPLETIONS
    ),
    concurrency: options.Concurrency = "1,4,16",
    rate: Annotated[
        str | None,
        typer.Option(
            metavar="R,...",
            help="Instead of clients: so many requests a second, at random (Poisson) times, "
            "whether the server keeps up or not.",
            show_default=False,
        ),
    ] = None,
    prompt_tokens: options.PromptTokens = 105,
    output_tokens: options.OutputTokens = 64,
    turns: Annotated[
        int,
        typer.Option(
            min=1, max=100, metavar="N", help="Of each chat; TTFT is given for each. Implies chat."
        ),
    ] = 1,
    turn_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="What the user says from the second turn on.")
    ] = 20,
    batch: Annotated[
        int, typer.Option(min=1, max=2048, metavar="N", help="Texts of one embeddings request.")
    ] = 1,
    requests: options.NumRequests = None,
    seconds: options.Seconds = 300.0,
    warmup: options.Warmup = 2,
    timeout: options.Timeout = 120.0,
    api_key: options.ApiKey = None,
    ignore_eos: Annotated[
        bool,
        typer.Option(help="Have the server go on to --output-tokens, if it knows ignore_eos."),
    ] = True,
    long_rate: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            max=1000,
            metavar="R",
            help="Beside the load: long prompts, so many a second, at random (Poisson) times.",
            show_default="none",
        ),
    ] = None,
    long_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Of each long prompt.")
    ] = 2000,
    goodput: options.Goodput = "",
    seed: options.Seed = 0,
    json_file: options.JsonFile = None,
    plot: options.PlotFile = None,
    gaps: Annotated[
        Path | None,
        typer.Option(
            "--gaps", metavar="FILE", help="Plot every time between tokens over the run, as SVG."
        ),
    ] = None,
) -> None:
    """Put load on a running server, and measure what clients see.

    Streams completions (or chats, or embeds) and prints, for each level of load: requests and
    tokens per second, and the time to the first token (TTFT), between tokens (ITL) and to the end.

      inferneo bench serve --concurrency 1,4,16,32
      inferneo bench serve --rate 2,4,8 --goodput ttft=500,itl=50
      inferneo bench serve --concurrency 8 --long-rate 0.5 --gaps gaps.svg
      inferneo bench serve --turns 2 --prompt-tokens 1000 --concurrency 1
      inferneo bench serve --endpoint embeddings --model all-minilm-l6-v2 --batch 32
    """
    asked = options.as_json(locals())
    from server.cli.bench import plot as plots
    from server.cli.bench import report
    from server.cli.bench.api import connect
    from server.cli.bench.gaps import Panel, write
    from server.cli.bench.http import Client
    from server.cli.bench.load import LongPrompts, Measured, Work, measure
    from server.cli.bench.stats import parse_goodput

    levels = options.levels_of(concurrency, rate, requests, seconds)
    limits = parse_goodput(goodput)
    if turns > 1:
        if endpoint is EndpointName.EMBEDDINGS:
            raise BenchError("--turns are of chats; embeddings have none")
        endpoint = EndpointName.CHAT
    if long_rate and endpoint is EndpointName.EMBEDDINGS:
        raise BenchError("--long-rate is for models that generate; embeddings have no streams")
    if plot:
        plots.require()
    work = Work(
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        turns=turns,
        turn_tokens=turn_tokens,
        timeout=timeout,
        seed=seed,
    )
    long_prompts = LongPrompts(rate=long_rate, tokens=long_tokens) if long_rate else None
    console = Console()
    kept: list[Measured] = []

    async def run() -> tuple[str, list[report.Figures]]:
        async with Client(url, api_key) as client:
            api = await connect(
                client,
                model,
                endpoint.value,
                batch=batch,
                ignore_eos=ignore_eos,
                api_key=api_key,
                seed=seed,
            )
            rows = await measure(
                api, work, levels, limits, warmup, options.tell, long_prompts, kept.append
            )
            return api.model, rows

    found, rows = asyncio.run(run())
    title = f"{found} at {url}, {endpoint.value}"
    embeds = endpoint is EndpointName.EMBEDDINGS
    table = report.embedding_table if embeds else report.level_table
    console.print(table(rows, title))
    report.print_notes(console, rows, output_tokens)
    if json_file:
        settings = asked | {"model": found, "endpoint": endpoint.value}
        report.write_json(json_file, report.document("serve", settings, levels=rows))
    if plot:
        plots.draw(plot, {found: rows}, title)
    if gaps:
        panels = [Panel(f"load {each.level.name}", each.samples, each.long) for each in kept]
        write(gaps, panels)
