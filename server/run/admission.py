"""Admission of requests, from arrival to settlement, in two steps.

:meth:`Admission.enter` runs before the body is read: it checks the key once more, counts the
request and acquires a permit, so that rejecting a request stays cheap under any load.
:meth:`Admission.admitted` runs once it is known what the request asks for: it acquires a permit
for each sequence, rejects requests that cannot finish in time, reserves tokens, and charges what
was used. An admitted request runs to its end.
"""

import dataclasses
import math
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

from server.http.deadline import TIMEOUT_HEADER, Deadline
from server.http.errors import ApiError, unavailable
from server.keys.guard import Guard
from server.keys.limits import Charge, Limiter
from server.keys.store.store import Usage
from server.observe.metrics import Meter, Metrics
from server.observe.tracing import Trace
from server.run.context import Context
from server.run.permits import LONGEST_RETRY, Permits

_MARGIN = 1.25
"""Safety factor for estimates, which tend to be low, on a machine that may slow down."""


class Work:
    """The work of an admitted request while it runs.

    Attributes:
        usage: the usage to charge at the end; None until some work has been done. If the request
            fails before that, its error decides what is charged.
    """

    def __init__(self, metrics: Metrics, model: str, trace: Trace | None) -> None:
        self._metrics = metrics
        self._model = model
        self._trace = trace
        self.usage: Usage | None = None

    def meter(self) -> Meter:
        """Return a meter for the sequences that are generated."""
        return self._metrics.meter(self._model, self._trace)

    def embedded(self, tokens: int) -> None:
        """Count the tokens of embedded texts."""
        self._metrics.embedded(self._model, tokens)


class Admission:
    """Admits requests and settles their charges.

    Args:
        permits: the permits of the server.
        longest: the maximum and default time of a request, in seconds.
        guard: checks keys.
        limiter: counts the usage of keys.
        metrics: counts the work of models.
    """

    def __init__(
        self, permits: Permits, longest: float, guard: Guard, limiter: Limiter, metrics: Metrics
    ) -> None:
        self._permits = permits
        self._longest = longest
        self._guard = guard
        self._limiter = limiter
        self._metrics = metrics

    async def enter(self, context: Context, charge: Charge | None = None) -> Context:
        """Count a request and give it a permit; its cleanup settles the one and releases the other.

        Args:
            context: the context of the request.
            charge: the charge of the request, if it has been counted already.

        Returns:
            The context with deadline, charge and permit.

        Raises:
            ApiError: the key is no longer valid, a limit is exceeded, the timeout header is
                invalid, or no permit is free.
        """
        caller, cleanup = context.caller, context.cleanup
        if charge is not None:
            cleanup.callback(charge.settle, Usage())  # unless it has been
        try:
            await self._guard.recheck(caller)
            if charge is None:
                charge = await self._limiter.enter(caller)
                cleanup.callback(charge.settle, Usage())
            deadline = Deadline.parse(context.timeout, self._longest)
            permit = cleanup.enter_context(self._permits.acquire(caller.id))
        except ApiError as error:
            if charge is not None:
                charge.settle_failed(error)
            raise
        return dataclasses.replace(context, deadline=deadline, charge=charge, permit=permit)

    @asynccontextmanager
    async def admitted(
        self,
        context: Context,
        model: str,
        prompt: int,
        completion: int,
        *,
        sequences: int = 1,
        forecast: Callable[[], float | None] = lambda: None,
    ) -> AsyncGenerator[Work, None]:
        """Do the work of a request that has entered.

        Args:
            context: the context of the request.
            model: the id of its model.
            prompt: number of tokens in all prompts.
            completion: maximum number of tokens that the request may generate.
            sequences: number of sequences that it generates.
            forecast: estimates how many seconds it would take from now; None if unknown.

        Raises:
            ApiError: too few permits are free, the request could not finish before its deadline,
                or a limit is exceeded.
        """
        assert context.deadline is not None
        assert context.charge is not None
        assert context.permit is not None
        context.permit.acquire(sequences)
        check_in_time(context.deadline, forecast())
        await context.charge.reserve(model, prompt, completion)
        context.permit.served = True
        work = Work(self._metrics, model, context.log_entry.trace)
        try:
            yield work
        finally:
            if work.usage is not None:
                context.charge.settle(work.usage)


def check_in_time(deadline: Deadline, seconds: float | None) -> None:
    """Reject a request that cannot finish before its deadline.

    Args:
        deadline: the deadline of the request.
        seconds: the time that the request would take from now; None if unknown.

    Raises:
        ApiError: the request would miss its deadline.
    """
    if seconds is None:
        return
    needed, total = seconds * _MARGIN, deadline.seconds
    if 0 < deadline.remaining() < needed:
        raise unavailable(
            f"The server is too busy to finish this request within {total:g} s: beside "
            f"the work already accepted, at the speed measured now, it would take about "
            f"{needed:.1f} s. Send it again later, ask for fewer tokens, or allow it more time "
            f"with the header {TIMEOUT_HEADER}.",
            "overloaded",
            max(1, min(LONGEST_RETRY, math.ceil(needed - total))),
        )
