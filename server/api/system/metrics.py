"""``GET /metrics``: the server's metrics, for Prometheus."""

import asyncio

from prometheus_client import generate_latest
from quart import Response

from server.api.endpoint import Endpoint, ResponseSpec
from server.run.context import Context
from server.services import Services

_TEXT_FORMAT = "text/plain; version=0.0.4; charset=utf-8"


@Endpoint(
    method="GET",
    path="/metrics",
    access="metrics",
    tag="server",
    summary="Get metrics for Prometheus",
    description="Names, labels and units are those of vLLM where the meaning is the "
    "same. On a server with keys, the caller's key needs the scope `metrics`.",
    responses={
        200: ResponseSpec(
            description="The metrics in the text format of Prometheus.",
            content={"text/plain": {"type": "string"}},
        )
    },
    traced=False,
)
async def metrics(services: Services, context: Context) -> Response:
    """Send all metrics."""
    # One format, which every Prometheus reads: of OpenMetrics prometheus_client (0.26) makes
    # vllm_num_requests_running where Prometheus 2 asks for it, and so no figure has its name.
    # The engines are asked under their locks, which the event loop must not wait for.
    content = await asyncio.to_thread(generate_latest, services.metrics.registry)
    return Response(content, content_type=_TEXT_FORMAT)
