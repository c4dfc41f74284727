"""Several servers behind one port: ``serve run server.replicas:app`` (Ray Serve).

Every replica is a process that runs the whole of ``server.app``: it loads the models itself, and
receives requests once it is ready. This module needs the extra ``ray``.
"""

import asyncio
import os
import threading
from collections.abc import AsyncGenerator

from quart import Quart
from ray import serve

from server.config.replica_settings import ReplicaSettings
from server.config.schema import PREFIX

HEALTH_SECONDS = 5.0
"""Interval of health checks; a replica that fails three in a row is replaced."""
_POLL_SECONDS = 0.2
_GOODBYE_SECONDS = 5.0


def _serve_app() -> Quart:
    """Return the application, whose startup ends once it is ready. Called in each replica."""
    from server.app import app

    @app.while_serving
    async def until_ready() -> AsyncGenerator[None, None]:
        while await _status(app) != 200:  # noqa: ASYNC110  (a state of threads)
            await asyncio.sleep(_POLL_SECONDS)
        yield

    return app


async def _status(app: Quart) -> int:
    return (await app.test_client().get("/ready")).status_code


@serve.ingress(_serve_app)
class Replica:
    """One server."""

    app: Quart

    def __init__(self, environment: dict[str, str]) -> None:
        """Called in the replica's process, on the thread of the event loop, before the app."""
        for name in [name for name in os.environ if name.startswith(PREFIX)]:
            del os.environ[name]
        os.environ.update(environment)
        # An application that cannot serve exits its thread (SystemExit), which Ray does not notice.
        loop_thread = threading.current_thread()
        threading.Thread(target=_end_after, args=(loop_thread,), daemon=True).start()

    async def check_health(self) -> None:
        """Called by Serve, which replaces the replica if this raises."""
        if (status := await _status(self.app)) != 200:
            raise RuntimeError(f"GET /ready answers {status}")


def _end_after(thread: threading.Thread) -> None:
    thread.join()
    os._exit(1)


def build(settings: ReplicaSettings) -> serve.Application:
    """Return the application that ``serve run`` deploys."""
    capacity = settings.capacity()
    tpus = {"TPU": settings.replica_tpus} if settings.replica_tpus else {}
    deployment = serve.deployment(
        Replica,
        num_replicas=settings.replicas,
        # Each server bounds its requests and sockets itself, and rejects more with API errors.
        max_ongoing_requests=4 * capacity,
        max_queued_requests=capacity,
        health_check_period_s=HEALTH_SECONDS,
        health_check_timeout_s=2 * HEALTH_SECONDS,
        graceful_shutdown_timeout_s=settings.drain_seconds + _GOODBYE_SECONDS,
        ray_actor_options={
            "num_cpus": settings.replica_cpus,
            "num_gpus": settings.replica_gpus,
            "resources": tpus,
        },
    )
    return deployment.bind(settings.environment())


app = build(ReplicaSettings.load())
