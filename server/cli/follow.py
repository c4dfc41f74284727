"""`inferneo follow`: one of the processes that run a model together, without HTTP."""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any, NoReturn

import structlog
import typer

from inferneo_jax import ConfigError, InferneoError, Job
from server.cli.flags import given
from server.config.settings import Settings
from server.models.sources import draft_source, folder_of, sources_of
from server.observe import log

logger = structlog.get_logger(__name__)

GROUPS = ("Models", "Numerics", "Engine", "Several processes", "Logs and file")
"""The settings that a process without HTTP reads."""


def follow(context: typer.Context, **_: Any) -> None:
    """Run the language model's steps for process 0 of a job, until the job ends.

    Give it the same settings as process 0, except for its own process number.
    """
    settings = Settings.load(given(context))
    log.configure(settings.log_format)
    if (config := settings.job_config()) is None:
        raise ConfigError(
            "no coordinator is named, so there is nobody to follow: set INFERNEO_COORDINATOR, "
            "INFERNEO_NUM_PROCESSES and INFERNEO_PROCESS_ID (or give the flags of these names), "
            "and INFERNEO_JOB_TOKEN"
        )
    job = Job(config, leads=False)
    job.on_lost(_end_now)
    _hand_on_signals(job)
    try:
        _follow(settings, job)
    except Exception as error:
        if not isinstance(error, InferneoError):
            logger.exception("following_failed")
        job.fail(str(error))
        _end_now(str(error))
    job.end()
    logger.info("ended")


def _follow(settings: Settings, job: Job) -> None:
    """Run the leader's steps until it ends the job.

    Raises:
        InferneoError: a model cannot be used, or the job is lost.
    """
    job.join()
    from inferneo_jax import follow_model

    config, drafter = settings.engine_config(), draft_source(settings)
    draft = folder_of(drafter, settings, _quiet) if drafter else None
    if not any(
        follow_model(folder_of(source, settings, _quiet), config, job, draft=draft)
        for source in sources_of(settings)
    ):
        raise ConfigError(
            f"{settings.named('models')} names no language model; there is nothing to follow"
        )


def _end_now(reason: str) -> NoReturn:
    """Exit at once with code 1; JAX might wait for ever for the missing parts of a step."""
    logger.error("job_lost", reason=reason)
    sys.stderr.flush()
    os._exit(1)


def _hand_on_signals(job: Job) -> None:
    """Pass the first signal to the leader, which lets requests finish; end at the second."""

    def leave(number: int, frame: FrameType | None) -> None:
        del frame
        signal.signal(number, signal.SIG_DFL)
        # On a thread of its own, because this one may be in the middle of sending.
        threading.Thread(target=job.leave, daemon=True).start()
        logger.info("told_to_end", reason="the leader drains, and then ends all processes")

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)


def _quiet(stage: str, done: int, total: int) -> None:
    """Ignore progress."""
