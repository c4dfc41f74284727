"""Structured logs on standard error: what happened to requests, never what they said."""

import logging
import sys
from typing import Literal

import structlog
from structlog.typing import Processor


def configure(log_format: Literal["auto", "json", "console"]) -> None:
    """Set up structlog; ``auto`` is console on a terminal and json elsewhere."""
    console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    shape: list[Processor] = (
        [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
        if console
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *shape,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
    )
