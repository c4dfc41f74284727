"""Options that the benchmarks share, and the parsing of their lists."""

from pathlib import Path
from typing import Annotated, Any

import typer

from server.cli.bench.errors import BenchError
from server.cli.bench.load import Level

MOST_REQUESTS = 1_000_000
MOST_CLIENTS = 512
_PER_CLIENT, _LEAST, _RATE_SECONDS = 4, 8, 30.0

Concurrency = Annotated[
    str,
    typer.Option(metavar="N,...", help="Clients at once; each asks again as soon as it is done."),
]
PromptTokens = Annotated[
    int, typer.Option(min=1, metavar="N", help="Of each prompt; no two are the same.")
]
OutputTokens = Annotated[
    int, typer.Option(min=1, metavar="N", help="To generate for each request.")
]
NumRequests = Annotated[
    int | None,
    typer.Option(
        "--requests",
        min=1,
        max=MOST_REQUESTS,
        metavar="N",
        help="Of each level of load.",
        show_default="4 a client and at least 8; 30 s of arrivals",
    ),
]
ApiKey = Annotated[
    str | None, typer.Option(envvar="OPENAI_API_KEY", metavar="KEY", help="Sent as a bearer token.")
]
Timeout = Annotated[
    float,
    typer.Option(min=0.1, metavar="S", help="Seconds after which a request counts as failed."),
]
Seconds = Annotated[
    float, typer.Option(min=0.1, metavar="S", help="Each level begins no request after so long.")
]
Warmup = Annotated[
    int,
    typer.Option(
        min=0, max=1000, metavar="N", help="Requests before each level that do not count."
    ),
]
Seed = Annotated[int, typer.Option(metavar="N", help="Of prompts and arrivals.")]
Goodput = Annotated[
    str,
    typer.Option(
        metavar="LIMITS",
        help="Also count the requests that kept limits in ms, such as ttft=500,itl=50,e2e=5000.",
    ),
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write all figures there.")
]
PlotFile = Annotated[
    Path | None,
    typer.Option(
        "--plot", metavar="FILE", help="Draw them, as PNG by its name; needs the extra `plot`."
    ),
]


def numbers(text: str, option: str, most: float) -> list[float]:
    """Parse ``1,4,16`` as numbers.

    Raises:
        BenchError: the text is not a list of numbers.
    """
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found or not all(0 < number <= most for number in found):
        raise BenchError(
            f"{option} is {text!r}; write numbers above 0, at most {most:g}, as 1,4,16"
        )
    return found


def integers(text: str, option: str, most: int) -> list[int]:
    """Parse ``1,4,16`` as integers.

    Raises:
        BenchError: the text is not a list of integers.
    """
    found = numbers(text, option, most)
    if any(number != int(number) for number in found):
        raise BenchError(f"{option} is {text!r}; write whole numbers as 1,4,16")
    return [int(number) for number in found]


def default_requests(clients: int) -> int:
    """Return the number of requests for ``clients``: enough for the ends to weigh little."""
    return max(_LEAST, _PER_CLIENT * clients)


def levels_of(
    concurrency: str, rate: str | None, requests: int | None, seconds: float
) -> list[Level]:
    """Return the levels of load that the options ask for.

    Raises:
        BenchError: an option is not a list of numbers.
    """
    if rate is not None:
        return [
            Level(
                rate=each,
                requests=requests or max(_LEAST, round(each * min(seconds, _RATE_SECONDS))),
                seconds=seconds,
            )
            for each in numbers(rate, "--rate", 10_000)
        ]
    return [
        Level(clients=each, requests=requests or default_requests(each), seconds=seconds)
        for each in integers(concurrency, "--concurrency", MOST_CLIENTS)
    ]


def as_json(values: dict[str, Any]) -> dict[str, Any]:
    """Return the options for a JSON file, without keys and files."""
    left_out = ("api_key", "json_file", "plot", "gaps")
    return {name: value for name, value in values.items() if name not in left_out}


def tell(text: str) -> None:
    """Print progress on stderr. A live bar's thread would disturb the measurement."""
    typer.echo(text, err=True)
