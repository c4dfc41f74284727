"""Calls to the key store, off the event loop."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import structlog

from server.http.errors import RETRY_OVERLOADED_SECONDS, unavailable
from server.keys.store.store import Store, StoreError

log = structlog.get_logger(__name__)

Result = TypeVar("Result")


class StoreThreads:
    """Calls a store from as many threads as it supports."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._pool = ThreadPoolExecutor(store.threads, thread_name_prefix="keys")
        self._sent: set[Future[Any]] = set()

    async def call(
        self, method: Callable[[], Result], undo: Callable[[], object] | None = None
    ) -> Result:
        """Return what ``method`` returns. If the caller is cancelled, ``undo`` is called after it.

        Raises:
            ApiError: the store cannot be used at this moment.
        """
        future = self._pool.submit(method)
        try:
            return await asyncio.wrap_future(future)
        except StoreError as error:
            log.error("key_store_failed", reason=str(error))
            raise unavailable(
                "The server cannot look up keys and limits at this moment. Try again.",
                "overloaded",
                RETRY_OVERLOADED_SECONDS,
            ) from None
        except asyncio.CancelledError:
            if undo is not None:
                future.add_done_callback(lambda _: self.send(undo))
            raise

    def send(self, method: Callable[[], object]) -> None:
        """Call ``method`` without waiting for it; failures are logged."""

        def run() -> None:
            try:
                method()
            except StoreError as error:
                log.error("key_store_failed", reason=str(error))

        try:
            future = self._pool.submit(run)
        except RuntimeError:  # closed: leases end what is left
            return
        self._sent.add(future)
        future.add_done_callback(self._sent.discard)

    async def flush(self) -> None:
        """Wait for all calls that were sent before."""
        await asyncio.gather(*map(asyncio.wrap_future, tuple(self._sent)))

    def close(self) -> None:
        """Finish the calls that were sent, then close the store. Blocks."""
        self._pool.shutdown()
        self.store.close()
