"""What `inferneo serve` shows on a terminal: the loading progress, then the server's addresses."""

import time
from collections.abc import Collection

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from structlog.typing import EventDict

from inferneo_jax import __version__
from server.cli.progress import ModelProgress
from server.config.settings import Settings
from server.models.registry import Registry
from server.observe import log
from server.process.listening import is_local, url_of

_KINDS = {"decoder": "chat", "encoder": "embeddings"}
_PLACES = (
    ("Chat", "/", "in a browser"),
    ("Dashboard", "/dashboard", "in a browser"),
    ("API", "/v1", "the base URL of OpenAI clients"),
    ("API docs", "/docs", "in a browser"),
    ("Metrics", "/metrics", "for Prometheus"),
)
_MAKE = "[bold]inferneo keys create NAME[/]"


class Display:
    """Shows on a terminal what the log would say while the server starts and ends.

    Args:
        console: a console on standard error.
        settings: the settings of the server.
        port: the port that it listens on.
        paths: the paths that it serves.
        registry: the registry of its models.
    """

    def __init__(
        self,
        console: Console,
        settings: Settings,
        port: int,
        paths: Collection[str],
        registry: Registry,
    ) -> None:
        self._console = console
        self._settings = settings
        self._url = url_of(settings.host, port)
        self._paths = paths
        self._registry = registry
        self._keys = f"needed; {_MAKE} makes one"
        self._others = "reach it"
        self._begin = time.monotonic()
        self._progress = ModelProgress(console, registry.progress)

    def __enter__(self) -> "Display":
        self._console.print(f"[bold]Inferneo[/] {__version__} at {self._url}", highlight=False)
        self._progress.start()
        # Started now, so that further log output appears above the progress.
        log.configure(self._settings.log_format, self._takes)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_progress()

    def _stop_progress(self) -> None:
        self._progress.stop()
        log.configure(self._settings.log_format, self._takes)

    def _takes(self, event: EventDict) -> bool:
        """Return whether a log event is shown here and need not be written."""
        match event["event"]:
            case "loading" | "loaded" | "connections_cut":
                pass
            case "pulling":
                text = f"{event['model']}: {event['what']}"
                self._console.print(text, markup=False, highlight=False, soft_wrap=True)
            case "no_keys":
                self._keys = f"none yet, so only this machine is served; {_MAKE} makes one"
                self._others = "are refused until there is a key"
            case "no_key_required":
                self._keys = "[yellow]not needed: everybody who reaches the server is served[/]"
            case "ready":
                self._stop_progress()
                self._console.print(self._places())
            case "loading_failed" if not event.get("exc_info"):
                self._stop_progress()
                self._console.print("[bold red]error:[/] ", end="")
                self._console.print(event["reason"], markup=False, highlight=False, soft_wrap=True)
            case "draining":
                self._stop_progress()
                self._console.print(
                    f"Ending: requests that run have {event['seconds']:g} s. "
                    "Ctrl-C again ends at once."
                )
            case _:
                return False
        return True

    def _places(self) -> Panel:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        width = len(self._url) + max(len(path) for _, path, _ in _PLACES)
        for name, path, use in _PLACES:
            if path in self._paths or any(
                each.startswith(f"{path}/") for each in self._paths if path != "/"
            ):
                table.add_row(name, f"[cyan]{self._url + path:<{width}}[/]  [dim]{use}[/]")
        models = [f"{each.name} ({_KINDS[each.kind]})" for each in self._registry.models()]
        models += [f"{alias} ({name})" for alias, name in self._settings.aliases.items()]
        table.add_row("Models", Text(", ".join(models)))
        table.add_row("Keys", self._keys)
        if not is_local(self._settings.host):
            text = f"listens on {self._settings.host}: other machines {self._others}"
            table.add_row("Network", text)
        seconds = time.monotonic() - self._begin
        return Panel(
            table,
            title=f"[green]ready[/] after {seconds:.1f} s",
            title_align="left",
            subtitle="Ctrl-C ends it",
            subtitle_align="left",
            expand=False,
        )
