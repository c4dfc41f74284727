"""The errors of a benchmark: of the whole, or of one request."""

from inferneo_jax import InferneoError


class BenchError(InferneoError):
    """The benchmark cannot run; the message says what to do."""


class RequestFailedError(Exception):
    """One request failed, which the benchmark counts.

    Attributes:
        reason: the reason in a few words, by which failures are counted.
        status: the status of the answer, if there was one.
    """

    def __init__(self, reason: str, detail: str = "", status: int | None = None) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.status = status
