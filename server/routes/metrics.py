"""``GET /metrics``: figures for Prometheus."""

import asyncio

from prometheus_client.exposition import choose_encoder
from quart import Blueprint, Response, request

from server.services import Services


def blueprint(services: Services) -> Blueprint:
    """The route; of keys it asks the scope ``metrics``."""
    routes = Blueprint("metrics", __name__)

    @routes.get("/metrics")
    async def metrics() -> Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        # The engines are asked under their locks, which the event loop must not wait for.
        content = await asyncio.to_thread(encode, services.metrics.registry)
        return Response(content, content_type=content_type)

    return routes
