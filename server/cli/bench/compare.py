"""``inferneo bench compare``: benchmarks this server and another in turn."""

import asyncio
from enum import StrEnum
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from server.cli.bench import options, peers
from server.cli.bench.errors import BenchError


class PeerName(StrEnum):
    """Servers whose command lines are built in."""

    LLAMA_CPP = "llama.cpp"
    VLLM = "vllm"


_RATE = ("output_tokens_per_second",)
_LATENCIES = (("ttft", "p50"), ("ttft", "p99"), ("itl", "p50"), ("itl", "p99"))

Round = dict[str, list[dict[str, Any]]]
"""The levels of both sides, by label."""


def compare(
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of our server.", show_default="its first")
    ] = None,
    peer: Annotated[
        PeerName | None, typer.Option(help="A server that is found on PATH.", show_default=False)
    ] = None,
    peer_model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="What it serves: a GGUF file for llama.cpp, a folder or id for vLLM.",
            show_default=False,
        ),
    ] = None,
    peer_command: Annotated[
        str | None,
        typer.Option(metavar="COMMAND", help="Or its command, with {port}.", show_default=False),
    ] = None,
    peer_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Or where it runs already; on another machine, or idle while ours is measured.",
            show_default=False,
        ),
    ] = None,
    concurrency: options.Concurrency = "1,4,16",
    prompt_tokens: options.PromptTokens = 105,
    output_tokens: options.OutputTokens = 64,
    requests: options.NumRequests = None,
    rounds: Annotated[
        int, typer.Option(min=1, max=100, metavar="N", help="Pairs of runs; medians are shown.")
    ] = 3,
    seconds: options.Seconds = 300.0,
    warmup: options.Warmup = 2,
    timeout: options.Timeout = 120.0,
    start_seconds: Annotated[
        float, typer.Option(min=1, metavar="S", help="In which a server must be ready.")
    ] = 600.0,
    api_key: options.ApiKey = None,
    seed: options.Seed = 0,
    json_file: options.JsonFile = None,
    plot: options.PlotFile = None,
) -> None:
    """Measure this server and another in turn, on this machine, and show the ratios.

    Each round starts one, puts load on it, stops it, and does the same with the other; the order
    alternates. They never run at the same time, and always end with this command. Both get the
    same prompts in a round.

      inferneo bench compare --peer llama.cpp --peer-model model.gguf
      inferneo bench compare --peer vllm --peer-model folder --rounds 5 --plot vllm.png
      inferneo bench compare --peer-command './llama-server -m model.gguf --port {port}'
    """
    asked = options.as_json(locals())
    from server.cli.bench import plot as plots
    from server.cli.bench import report
    from server.cli.bench.load import Level, Work
    from server.cli.bench.peers import running, signals_end_it

    clients = options.integers(concurrency, "--concurrency", options.MOST_CLIENTS)
    levels = options.levels_of(concurrency, None, requests, seconds)
    if sum(each is not None for each in (peer or peer_command, peer_url)) != 1:
        raise BenchError("name the other server by one of --peer, --peer-command and --peer-url")
    if plot:
        plots.require()
    if peer_command:
        other = peers.custom(peer_command, peer_model)
    elif peer_url:
        other = peers.Side(label="peer", url=peer_url, model=peer_model)
    elif peer is PeerName.VLLM:
        other = peers.vllm(peer_model)
    else:
        tokens = prompt_tokens + output_tokens
        other = peers.llama_cpp(peer_model, max(clients), tokens, _where_gguf_lies(model))
    sides = (peers.ours(model), other)
    console = Console()
    found: list[Round] = []
    starts: dict[str, list[float]] = {side.label: [] for side in sides}

    def load(side: peers.Side, url: str, number: int, levels: list[Level]) -> list[dict[str, Any]]:
        work = Work(
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            timeout=timeout,
            seed=seed + number,
        )
        key = api_key if side is sides[0] or side.url else None
        return asyncio.run(_measure(side, url, work, levels, warmup, key))

    with signals_end_it():
        for number in range(rounds):
            found.append({})
            for side in sides if number % 2 == 0 else reversed(sides):
                options.tell(f"round {number + 1} of {rounds}: {side.label}")
                with running(side, start_seconds) as (url, took):
                    found[-1][side.label] = load(side, url, number, levels)
                if took is not None:
                    starts[side.label].append(took)
    rows = pair_up(found, sides[0].label, other.label)
    console.print(_table(rows, sides[0].label, other.label, rounds))
    share = max(row["client_cpu_share"] for each in found for side in each.values() for row in side)
    console.print(f"The client took {share:.1%} of the processor time at most.", highlight=False)
    if json_file:
        content = report.document("compare", asked, start_seconds=starts, levels=rows, rounds=found)
        report.write_json(json_file, content)
    if plot:
        title = f"{sides[0].label} and {other.label}, {prompt_tokens} + {output_tokens} tokens"
        plots.draw(plot, {side.label: _medians(found, side.label) for side in sides}, title)


async def _measure(
    side: peers.Side,
    url: str,
    work: Any,
    levels: list[Any],
    warmup: int,
    api_key: str | None,
) -> list[dict[str, Any]]:
    from server.cli.bench.api import connect
    from server.cli.bench.http import Client
    from server.cli.bench.load import measure

    async with Client(url, api_key) as client:
        api = await connect(client, side.model, api_key=api_key, seed=work.seed)
        return await measure(api, work, levels, {}, warmup)


def pair_up(rounds: list[Round], ours: str, theirs: str) -> list[dict[str, Any]]:
    """Return each level's medians of both sides, and the median, least and greatest ratio.

    A ratio is ours divided by theirs within one round.
    """
    rows = []
    for i, level in enumerate(rounds[0][ours]):
        row: dict[str, Any] = {"level": level["level"], "clients": level["clients"]}
        for path in (_RATE, *_LATENCIES):
            pairs = [(_at(r[ours][i], path), _at(r[theirs][i], path)) for r in rounds]
            known = [(a, b) for a, b in pairs if a is not None and b]
            if known:
                ratios = [a / b for a, b in known]
                row["_".join(path)] = {
                    ours: median(a for a, _ in known),
                    theirs: median(b for _, b in known),
                    "ratio": median(ratios),
                    "ratio_min": min(ratios),
                    "ratio_max": max(ratios),
                }
        rows.append(row)
    return rows


def _at(figures: dict[str, Any], path: tuple[str, ...]) -> float | None:
    found: Any = figures
    for name in path:
        found = None if found is None else found[name]
    return found


def _medians(rounds: list[Round], label: str) -> list[dict[str, Any]]:
    """Return the levels of one side, with the medians of the figures to plot."""
    rows = []
    for i, level in enumerate(rounds[0][label]):
        row = dict(level)
        for name in ("output_tokens_per_second", "total_tokens_per_second"):
            row[name] = median(each[label][i][name] for each in rounds)
        for name in ("ttft", "itl", "e2e"):
            figures = [f for each in rounds if (f := each[label][i][name])]
            row[name] = {q: median(f[q] for f in figures) for q in figures[0]} if figures else None
        rows.append(row)
    return rows


def _table(rows: list[dict[str, Any]], ours: str, theirs: str, rounds: int) -> Table:
    title = f"medians of {rounds} rounds; ratios within rounds, with the least and the most"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("clients", justify="right")
    table.add_column("", no_wrap=True)
    for heading in ("output tok/s", "TTFT ms p50", "p99", "ITL ms p50", "p99"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        figures = [row.get("_".join(path)) for path in (_RATE, *_LATENCIES)]
        for label in (ours, theirs):
            cells = [
                f"{pair[label] * (1000 if i else 1):,.1f}" if pair else "-"
                for i, pair in enumerate(figures)
            ]
            table.add_row(str(row["clients"]) if label == ours else "", label, *cells)
        ratios = [f"{pair['ratio']:.2f}" if pair else "-" for pair in figures]
        spans = [
            f"{pair['ratio_min']:.2f}-{pair['ratio_max']:.2f}" if pair else "-" for pair in figures
        ]
        table.add_row("", "ratio", *ratios, style="bold")
        table.add_row("", "least-most", *spans, end_section=True)
    return table


def _where_gguf_lies(model: str | None) -> str:
    """Return a sentence that says where to get the GGUF file of a catalog model."""
    from inferneo_jax import load_catalog

    catalog = load_catalog()
    name = model if model in catalog else next(n for n, e in catalog.items() if e.kind == "chat")
    return (
        f"After `inferneo pull {name}`, that of {name} is {name}/model.gguf in the folder of "
        "checkpoints"
    )
