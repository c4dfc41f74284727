"""Structured logs on standard error. They never contain prompts or generated text."""

import logging
import sys
from collections.abc import Callable
from typing import Any, Literal

import structlog
from structlog.typing import EventDict, Processor

from server.observe.terminal import escaped


def to_console(log_format: Literal["auto", "json", "console"]) -> bool:
    """Whether the log is formatted for reading on a terminal."""
    return log_format == "console" or (log_format == "auto" and sys.stderr.isatty())


def configure(
    log_format: Literal["auto", "json", "console"],
    taken: Callable[[EventDict], bool] | None = None,
) -> None:
    """Set up structlog, and the standard loggers of the engine and of OpenTelemetry.

    Events of the server that are ``taken`` by somebody who shows them otherwise are not written.

    ``auto`` is console on a terminal and json elsewhere. Tracebacks are plain: a renderer that
    shows local variables would show prompts.
    """
    shape: list[Processor] = (
        [
            _escape,
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(),
                exception_formatter=structlog.dev.plain_traceback,
            ),
        ]
        if to_console(log_format)
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    common: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]

    def take(logger: Any, method: str, event: EventDict) -> EventDict:
        if taken and taken(event):
            raise structlog.DropEvent
        return event

    structlog.configure(
        processors=[take, *common, *shape],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
    )
    handler = logging.StreamHandler(sys.stderr)
    remove = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=common, processors=[remove, *shape])
    )
    for name, level in (("inferneo_jax", logging.INFO), ("opentelemetry", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False


def _escape(logger: Any, method: str, event: EventDict) -> EventDict:
    """Let no client draw on the terminal, or write lines of its own; JSON escapes by itself."""
    return {
        name: escaped(value) if isinstance(value, str) else value for name, value in event.items()
    }
