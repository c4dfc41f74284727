"""The application, with an engine whose steps can be made to fail or to take longer.

A step takes ``TEST_STEP_SECONDS`` more, however quick the machine is. Faults come as a file of
orders, which a step looks for at ``TEST_FAULTS``: ``raise`` in it makes the step raise, a number
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

STEP_SECONDS = float(os.environ.get("TEST_STEP_SECONDS", "0"))
ORDERS = Path(os.environ.get("TEST_FAULTS", "/nowhere"))
RESET_SECONDS = 1.2
_wait = PendingStep.wait
_reset = Runner.reset


def wait(step: PendingStep) -> Any:
    """Read a step's results, late, unless there are orders."""
    time.sleep(STEP_SECONDS)
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
