"""The way of every request from its arrival to its settlement, in two steps.

:meth:`Admission.enter` comes before the body is read: the key is checked once more, the request is
counted, and a permit is acquired, so that under any load a refusal costs nothing but the refusal.
:meth:`Admission.admitted` comes when it is known what the request asks for: it acquires a permit
for each sequence, refuses what cannot be finished in time, reserves tokens, and charges what was
used. What was admitted is finished.
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
"""What an estimate is multiplied by: it is rather low, and the machine may become slower."""


class Work:
    """What was admitted, while it is under way.

    Attributes:
        usage: what it has taken, to be charged at the end. None while nothing was done: if the
            request fails, its error then decides what is charged.
    """

    def __init__(self, metrics: Metrics, model: str, trace: Trace | None) -> None:
        self._metrics = metrics
        self._model = model
        self._trace = trace
        self.usage: Usage | None = None

    def meter(self) -> Meter:
        """A meter for the sequences that are generated."""
        return self._metrics.meter(self._model, self._trace)

    def embedded(self, tokens: int) -> None:
        """Count tokens of texts that were embedded."""
        self._metrics.embedded(self._model, tokens)


class Admission:
    """Lets requests in, and settles them.

    Args:
        permits: of the server.
        longest: how many seconds a request may take at most, and by default.
        guard: checks keys.
        limiter: counts what keys use.
        metrics: counts what models do.
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
        """Count a request and give it a permit, both until its cleanup.

        Args:
            context: of the request.
            charge: what it counts for, if it has been counted already.

        Returns:
            The context with deadline, charge and permit.

        Raises:
            ApiError: its key does not count any more, a limit refuses it, the header of its
                timeout is wrong, or there is no permit.
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
            context: of the request.
            model: the id of its model.
            prompt: tokens of all its prompts.
            completion: most tokens that it may generate.
            sequences: how many it generates.
            forecast: estimates the seconds that it would take from now; None: that is not known.

        Raises:
            ApiError: there are too few permits, the request would take longer than it has, or a
                limit refuses it.
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
    """Refuse a request that cannot be finished in time.

    Args:
        deadline: of the request.
        seconds: how long it would take from now; None: that is not known.

    Raises:
        ApiError: it would take longer than it has.
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
