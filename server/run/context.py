"""The context of a request, passed to everything that handles it."""

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
    """The context of a request over HTTP or a WebSocket. It is passed down, never looked up.

    The last three are None until :meth:`~server.run.admission.Admission.enter` sets them.

    Attributes:
        caller: the sender of the request.
        strict: whether unknown parameters are rejected.
        timeout: the value of the header ``X-Request-Timeout``.
        log_entry: its entry in the access log.
        cleanup: closed when the answer has been sent, or when the client has left.
        deadline: the time by which the request must finish.
        charge: the charge against the limits of its key.
        permit: the permit under which it is served.
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
            The error to send to the client.
        """
        failure = as_api_error(error)
        self.log_entry.add_error(failure)
        if self.charge is not None:
            self.charge.settle_failed(failure)
        return failure
