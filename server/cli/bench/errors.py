"""What goes wrong in a benchmark: all of it, or one request."""

from inferneo_jax import InferneoError


class BenchError(InferneoError):
    """The benchmark cannot be made; the text says what to do."""


class RequestFailedError(Exception):
    """One request failed, which the benchmark counts.

    Attributes:
        reason: a few words; failures are counted by it.
        status: of the answer, if one came.
    """

    def __init__(self, reason: str, detail: str = "", status: int | None = None) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.status = status
