"""Who is served now: a bounded number at once, shared between keys, each until its deadline.

A permit is acquired before a request's body is read, once its key's limits allow a further request,
and released when its answer has been sent: under any load a refusal costs nothing but the refusal,
and what was admitted is finished. A body that stalls gives its permit back
(:class:`~server.http.body.LimitedBody`).
"""

import asyncio
import math
import time
from collections import Counter, deque
from typing import TYPE_CHECKING, Self

from server.http.deadline import TIMEOUT_HEADER, Deadline
from server.http.errors import ApiError, shutting_down, unavailable

if TYPE_CHECKING:
    from server.keys.limits import Charge
    from server.observe.access_log import AccessLogEntry
    from server.run.answer import Answer
    from server.services import Services

_LONGEST_RETRY = 30
_MARGIN = 1.25
"""What an estimate is multiplied by: it is rather low, and the machine may become slower."""
_PACE_OF = 64
"""Served requests that tell how fast permits are released."""


class Permit:
    """Leave to be served, for one request; a context manager that gives it back.

    Attributes:
        deadline: of the request.
        served: whether work for the request has begun; what was refused before does not count when
            it is estimated how fast permits are released.
    """

    def __init__(self, admission: "Admission", owner: str | None, deadline: Deadline) -> None:
        self._admission = admission
        self._owner = owner
        self._taken = 1
        self.served = False
        self.deadline = deadline

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._admission._leave(self._owner, self._taken, served=self.served)

    def acquire(self, sequences: int) -> None:
        """Acquire as many permits as the request will generate sequences.

        Raises:
            ApiError: there are too few.
        """
        if sequences > self._taken:
            self._admission._take(self._owner, sequences - self._taken, held=self._taken)
            self._taken = sequences

    def expect(self, seconds: float | None) -> None:
        """Refuse a request that cannot be finished in time.

        Args:
            seconds: how long it would take from now; None: that is not known.

        Raises:
            ApiError: it would take longer than it has.
        """
        if seconds is None:
            return
        needed, total = seconds * _MARGIN, self.deadline.seconds
        if 0 < self.deadline.remaining() < needed:
            raise unavailable(
                f"The server is too busy to finish this request within {total:g} s: beside "
                f"the work already accepted, at the speed measured now, it would take about "
                f"{needed:.1f} s. Send it again later, ask for fewer tokens, or allow it more time "
                f"with the header {TIMEOUT_HEADER}.",
                "overloaded",
                max(1, min(_LONGEST_RETRY, math.ceil(needed - total))),
            )


class Admission:
    """The permits of a server, one for each sequence that is generated or waits to be.

    Without keys every request may have any permit that is free. With keys, a key may have as many
    as it leaves free (the dynamic threshold of Choudhury and Hahne, IEEE/ACM Transactions on
    Networking 6(2), 1998), so that a flood of one never shuts out another.
    """

    def __init__(self, capacity: int, longest: float) -> None:
        """``longest`` is how many seconds a request may take at most, and if it says nothing."""
        self.capacity = capacity
        self._longest = longest
        self._taken: Counter[str | None] = Counter()
        self._total = 0
        self._left: deque[float] = deque(maxlen=_PACE_OF)  # in busy seconds
        self._busy = 0.0
        self._busy_since = 0.0
        self._empty = asyncio.Event()
        self._empty.set()
        self.closed = asyncio.Event()

    @property
    def in_use(self) -> int:
        """Permits that are held now."""
        return self._total

    def enter(self, owner: str | None, timeout: str | None) -> Permit:
        """Take a permit.

        Args:
            owner: the id of the caller's key; None: it needed none.
            timeout: the value of the header ``X-Request-Timeout``, in seconds.

        Raises:
            ApiError: there is none, the server shuts down, or the header is wrong.
        """
        if self.closed.is_set():
            raise shutting_down()
        deadline = Deadline.parse(timeout, self._longest)
        self._take(owner, 1)
        return Permit(self, owner, deadline)

    def close(self) -> None:
        """Let nobody in any more."""
        self.closed.set()

    async def emptied(self, seconds: float) -> bool:
        """Wait until nobody is served, at most so long; whether that came."""
        try:
            async with asyncio.timeout(seconds):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True

    def _take(self, owner: str | None, more: int, *, held: int = 0) -> None:
        """Give ``owner`` so many permits for a request that holds ``held`` of them already."""
        mine, free = self._taken[owner], self.capacity - self._total
        fits = (more if owner is None else mine + more) <= free
        # Every key may have one request, however large: what never fits could only be sent in vain.
        only = mine == held and self._total < 2 * self.capacity
        if not (fits or only):
            raise self._full()
        if not self._total:
            self._busy_since = time.monotonic()
        self._taken[owner] += more
        self._total += more
        self._empty.clear()

    def _leave(self, owner: str | None, taken: int, *, served: bool) -> None:
        if served:
            self._left.append(self._busy_seconds())
        if self._total == taken:
            self._busy = self._busy_seconds()
        self._total -= taken
        self._taken[owner] -= taken
        if not self._taken[owner]:
            del self._taken[owner]
        if not self._total:
            self._empty.set()

    def _busy_seconds(self) -> float:
        """Seconds in which some permit was taken; a time without requests says nothing of pace."""
        now = time.monotonic() - self._busy_since if self._total else 0.0
        return self._busy + now

    def _full(self) -> ApiError:
        return unavailable(
            "The server has as many requests as it can take. Send this one again later.",
            "overloaded",
            self._retry_seconds(),
        )

    def _retry_seconds(self) -> int:
        """When a quarter of those here will have left, at the pace of late."""
        if len(self._left) < 2:
            return 1
        each = (self._busy_seconds() - self._left[0]) / len(self._left)
        return max(1, min(_LONGEST_RETRY, math.ceil(each * self._total / 4)))


async def admit(
    services: "Services",
    permit: Permit,
    charge: "Charge",
    answer: "Answer",
    entry: "AccessLogEntry",
) -> None:
    """Let an answer be generated: there is room for all its sequences, time, and its key's limits.

    Raises:
        ApiError: there is not.
    """
    entry.add(model=answer.dialect.model, stream=answer.stream, user=answer.user)
    generation, trace = answer.generation, entry.trace
    permit.acquire(len(generation.choices))
    generation.deadline = permit.deadline
    model = services.registry.get(answer.dialect.model, answer.caller).name
    permit.expect(generation.forecast())
    await charge.reserve_answer(answer, model)
    if trace is not None:
        plan = generation.plan
        max_tokens = max(prompt.max_tokens for prompt in plan.prompts)
        trace.planned(plan.id, model, max_tokens, plan.sampling, plan.num_choices)
    generation.meter = services.metrics.meter(model, trace)
    permit.served = True
