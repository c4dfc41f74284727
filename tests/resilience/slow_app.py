"""The application, with steps that take some milliseconds more, however quick the machine is."""

import os
import time
from typing import Any

from inferneo_jax.runner.runner import PendingStep
from server.app import create_app

_wait, _SECONDS = PendingStep.wait, float(os.environ["TEST_STEP_SECONDS"])


def wait(step: PendingStep) -> Any:
    """Read a step's results, late."""
    time.sleep(_SECONDS)
    return _wait(step)


PendingStep.wait = wait  # type: ignore[method-assign]
app = create_app()
