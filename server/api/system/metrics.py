"""``GET /metrics``: figures for Prometheus."""

import asyncio

from prometheus_client import generate_latest
from quart import Blueprint, Response

from server.services import Services

_TEXT_FORMAT = "text/plain; version=0.0.4; charset=utf-8"


def blueprint(services: Services) -> Blueprint:
    """The route; of keys it asks the scope ``metrics``."""
    routes = Blueprint("metrics", __name__)

    @routes.get("/metrics")
    async def metrics() -> Response:
        # One format, which every Prometheus reads: of OpenMetrics prometheus_client (0.26) makes
        # vllm_num_requests_running where Prometheus 2 asks for it, and so no figure has its name.
        # The engines are asked under their locks, which the event loop must not wait for.
        content = await asyncio.to_thread(generate_latest, services.metrics.registry)
        return Response(content, content_type=_TEXT_FORMAT)

    return routes
