"""`inferneo serve`: the application under Hypercorn, with a flag for every setting."""

import asyncio
import socket
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import typer

from server.cli.flags import given
from server.config.settings import Settings
from server.observe import log

if TYPE_CHECKING:
    from quart import Quart

    from server.models.sources import Loader

EXAMPLES = (
    "inferneo serve",
    "inferneo serve Qwen/Qwen3-0.6B --slots 16 --max-len 8192",
    "inferneo serve my-model all-minilm-l6-v2 --host 0.0.0.0 --port 9000",
    "inferneo serve --config inferneo.toml",
)
EPILOG = "\n\n".join(
    (
        "Examples:",
        *EXAMPLES,
        "Each flag is a variable too (--max-len: INFERNEO_MAX_LEN), and a key of the file "
        "(max_len); the models are INFERNEO_MODELS. Flags win over variables, and variables over "
        "the file. INFERNEO_JOB_TOKEN and INFERNEO_PREFILL_TOKEN have no flags, which anybody here "
        "could read in the list of processes.",
    )
)


def serve(context: typer.Context, **_: Any) -> None:
    """Serve models over an OpenAI-compatible API, until Ctrl-C or SIGTERM.

    Without arguments, two small models are served to this machine. Missing models are downloaded.
    """
    run(Settings.load(given(context)))


def run(settings: Settings, loader: "Loader | None" = None) -> None:
    """Serve until a signal, as ``hypercorn server.app:app`` does, but in this process.

    Args:
        settings: the settings of the server.
        loader: the loader of its models, as for ``create_app``.

    Raises:
        ConfigError: the settings are invalid, or the address cannot be used.
        SystemExit: the models cannot be loaded, or one is lost; with exit code 1.
    """
    from server.application import create_app
    from server.process.listening import listen

    with listen(settings) as listener:
        asyncio.run(_serve(create_app(settings, loader), settings, listener))


async def _serve(app: "Quart", settings: Settings, listener: socket.socket) -> None:
    import hypercorn.asyncio
    from hypercorn.config import Config
    from rich.console import Console

    from server.cli.serve_display import Display
    from server.services import services_of

    config = Config()
    with ExitStack() as stack:
        if sys.stderr.isatty() and log.to_console(settings.log_format):
            config.loglevel = "WARNING"
            paths = {rule.rule for rule in app.url_map.iter_rules()}
            port, registry = listener.getsockname()[1], services_of(app).registry
            stack.enter_context(Display(Console(stderr=True), settings, port, paths, registry))
        config.bind = [f"fd://{listener.detach()}"]  # Hypercorn closes it
        await hypercorn.asyncio.serve(app, config)
