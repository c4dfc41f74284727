"""What a request carries from where it enters the server to all that works for it."""

from contextlib import AsyncExitStack
from dataclasses import dataclass

from server.http.deadline import Deadline
from server.http.errors import ApiError, as_api_error
from server.keys.caller import Caller
from server.keys.limits import Charge
from server.observe.access_log import AccessLogEntry
from server.run.permits import Permit


@dataclass(frozen=True, kw_only=True)
class Context:
    """A request over HTTP, or one of a WebSocket. It is handed down, never looked up.

    The last three are None until :meth:`~server.run.admission.Admission.enter` has let it in.

    Attributes:
        caller: who sent it.
        strict: whether parameters that are not known are refused.
        timeout: the value of the header ``X-Request-Timeout``.
        log_entry: its entry in the access log.
        cleanup: what is to be done when its answer has been sent, or nobody waits for it any more.
        deadline: when its time is over.
        charge: what it counts for in the limits of its key.
        permit: its leave to be served.
    """

    caller: Caller
    strict: bool
    timeout: str | None
    log_entry: AccessLogEntry
    cleanup: AsyncExitStack
    deadline: Deadline | None = None
    charge: Charge | None = None
    permit: Permit | None = None

    def fail(self, error: Exception) -> ApiError:
        """Log and settle a request that failed.

        Returns:
            What the client is told.
        """
        failure = as_api_error(error)
        self.log_entry.add_error(failure)
        if self.charge is not None:
            self.charge.settle_failed(failure)
        return failure
