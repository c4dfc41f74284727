"""``inferneo bench``: its three commands."""

import typer

from server.bench.compare import compare
from server.bench.engine import engine
from server.bench.serve import serve

app = typer.Typer(
    help="Measure a server, the engine alone, or two servers in turn. docs/performance.md has the "
    "definitions.",
    no_args_is_help=True,
)
app.command()(serve)
app.command()(engine)
app.command()(compare)
