"""The time by which a request must be finished, which its client may shorten."""

import asyncio
import re
from typing import Self

from server.http.errors import ApiError, bad_request

TIMEOUT_HEADER = "X-Request-Timeout"
_SECONDS = re.compile(r"\d{1,9}(\.\d{1,9})?")


class Deadline:
    """When a request's time is over, counted from now.

    Attributes:
        seconds: how long the request may take in all.
        at: when that time is over, by the event loop's clock.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.at = asyncio.get_running_loop().time() + seconds

    @classmethod
    def parse(cls, timeout: str | None, longest: float) -> Self:
        """The deadline that a client asks for.

        Args:
            timeout: the value of the header ``X-Request-Timeout``, in seconds.
            longest: how many seconds a request may take at most, and by default.

        Raises:
            ApiError: the header is not a number of seconds.
        """
        if timeout is None:
            return cls(longest)
        if not _SECONDS.fullmatch(timeout) or not float(timeout) > 0:
            raise bad_request(
                f"The header {TIMEOUT_HEADER} must be a number of seconds above 0, such as 30 or "
                "2.5.",
                TIMEOUT_HEADER,
            )
        return cls(min(float(timeout), longest))

    def remaining(self) -> float:
        """Seconds that are left; negative once the time is over."""
        return self.at - asyncio.get_running_loop().time()

    def missed(self) -> ApiError:
        """The error for a request whose time is over."""
        return ApiError(
            504,
            f"The request was not finished within {self.seconds:g} s. Allow it more time with the "
            f"header {TIMEOUT_HEADER}, or ask for fewer tokens.",
            kind="server_error",
            code="deadline_exceeded",
            headers={"X-Should-Retry": "false"},
        )
