"""What a follower does: every step that the leader announces, in its order."""

import logging
from typing import Any

import jax

from inferneo_jax.distributed.process_group import TcpProcessGroup
from inferneo_jax.distributed.transport import Kind
from inferneo_jax.runner.runner import Runner

log = logging.getLogger(__name__)


def follow(runner: Runner, processes: TcpProcessGroup) -> None:
    """Run what the leader announces, until it ends the job.

    Like the leader it dispatches a step before it waits for the one before. Nothing is read: which
    tokens there are is known to the leader alone.

    Raises:
        JobError: the leader is lost, or sent what is no step of this model.
    """
    assert runner.wire, "the runner was made without a process group"
    previous: Any = None
    while True:
        kind, payload = processes.next()
        match kind:
            case Kind.STEP:
                sampled = runner.execute(*runner.wire.read(payload))
                jax.block_until_ready(previous)
                previous = sampled
            case Kind.RESET:
                runner.reset()
                previous = None
            case Kind.STOP:
                jax.block_until_ready(previous)
                return
            case _:
                log.warning("ignored a frame of kind %s", kind.name)
