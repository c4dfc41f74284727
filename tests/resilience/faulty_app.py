"""The application, with an engine that can be made to fail: the faults come as a file of orders.

A step looks for the file that the environment names. ``raise`` in it makes the step raise, a number
makes it hang for so many seconds. An engine is given up for lost sooner than a user's is, but not
before the longest hang that it is to survive: 9 seconds, of which 3 are not noticed. Rebuilding the
engine takes longer than the server's interval between two looks for a lost engine, so that one look
always falls into it.
"""

import os
import time
from pathlib import Path
from typing import Any

from inferneo_jax.runner.runner import PendingStep, Runner
from server.app import create_app
from server.models import registry

ORDERS = Path(os.environ["TEST_FAULTS"])
RESET_SECONDS = 1.2
_wait = PendingStep.wait
_reset = Runner.reset


def wait(step: PendingStep) -> Any:
    """Read a step's results, unless there are orders."""
    if ORDERS.exists():
        order = ORDERS.read_text()
        ORDERS.unlink()
        if order == "raise":
            raise RuntimeError("a fault that was ordered")
        time.sleep(float(order))
    return _wait(step)


def reset(runner: Runner) -> None:
    """Rebuild the engine's state slowly."""
    time.sleep(RESET_SECONDS)
    _reset(runner)


Runner.reset = reset  # type: ignore[method-assign]
PendingStep.wait = wait  # type: ignore[method-assign]
registry.LOST_SECONDS = 8.0
app = create_app()
