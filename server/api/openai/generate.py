"""The two endpoints that generate: the same way from body to answer over HTTP and WebSocket."""

from functools import partial

from quart import Blueprint, Response

from server.http import sse
from server.http.codec import long_response, wants_strict
from server.http.connection import current_request
from server.http.pieces import Json
from server.prompt.body import read_body
from server.run.admission import admit
from server.run.answer import Answer
from server.run.prepare import Prepare, prepare_chat, prepare_completion
from server.run.websocket import serve_socket
from server.services import Services


def add_routes(blueprint: Blueprint, services: Services) -> None:
    """``POST`` and WebSocket of ``/completions`` and ``/chat/completions``."""
    _add_endpoint(blueprint, services, "/completions", prepare_completion)
    _add_endpoint(blueprint, services, "/chat/completions", prepare_chat)


def _add_endpoint(blueprint: Blueprint, services: Services, path: str, prepare: Prepare) -> None:
    name = path.strip("/").replace("/", "_")

    async def create() -> Response:
        caller = current_request().caller
        work = partial(prepare, services.registry, caller, strict=wants_strict())
        answer = await read_body(services.cpu_pool, work, inline=prepare is not prepare_chat)
        return await _respond(services, answer)

    async def socket() -> None:
        await serve_socket(services, prepare)

    blueprint.add_url_rule(path, name, create, methods=["POST"])
    blueprint.add_websocket(path, name + "_socket", socket)


async def _respond(services: Services, answer: Answer) -> Response:
    current, generation = current_request(), answer.generation
    current.cleanup.callback(lambda: current.log_entry.add_usage(generation.usage))
    assert current.permit is not None
    assert current.charge is not None
    await admit(services, current.permit, current.charge, answer, current.log_entry)
    current.cleanup.callback(generation.end)  # should it never begin
    if not answer.stream:
        return long_response(Json(await answer.whole()))
    chunks = answer.chunks()
    current.cleanup.push_async_callback(chunks.aclose)
    # The engine is asked here, so that what fails at once has an HTTP status.
    first = await anext(chunks)
    return Response(sse.stream(first, chunks, current.log_entry), headers=sse.HEADERS)
