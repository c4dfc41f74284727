"""A request's JSON body, parsed and worked on off the event loop unless it is small."""

from collections.abc import Callable
from typing import Any, TypeVar

from server.http.codec import parse_object, read_json
from server.http.connection import current_request
from server.prompt.cpu_pool import CpuPool

Result = TypeVar("Result")


async def read_body(
    cpu_pool: CpuPool, work: Callable[[dict[str, Any]], Result], *, inline: bool = True
) -> Result:
    """What ``work`` makes of the current request's body.

    The size of the body decides whether that happens on the event loop, for all of it: parsing,
    validation, and whatever ``work`` computes. ``inline`` is that of :meth:`CpuPool.run`.

    Raises:
        ApiError: as ``work``, ``CpuPool.run``, ``read_json`` and ``parse_object`` do.
    """
    raw = await read_json()
    current = current_request()
    return await cpu_pool.run(
        len(raw),
        lambda: work(parse_object(raw)),
        owner=current.caller.id,
        deadline=current.body.deadline,
        inline=inline,
    )
