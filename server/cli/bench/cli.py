"""``inferneo bench``: its three commands."""

import typer

from server.cli.bench.compare import compare
from server.cli.bench.engine import engine
from server.cli.bench.serve import serve

app = typer.Typer(
    help="Measure a server, the engine alone, or two servers in turn. docs/performance.md has the "
    "definitions.",
    no_args_is_help=True,
)
app.command()(serve)
app.command()(engine)
app.command()(compare)
