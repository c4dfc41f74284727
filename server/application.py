"""Builds the application. Importing this module builds none."""

import asyncio
import functools
import gc
from collections.abc import AsyncGenerator
from functools import partial
from typing import TYPE_CHECKING

import orjson
import structlog
from quart import (
    Quart,
    Response,
    has_request_context,
    has_websocket_context,
)

from inferneo_jax import EngineProcess, InferneoError, malloc_trim
from server.api.endpoint import access_of, add_routes
from server.api.openapi import document
from server.config.settings import Settings, unknown_variables
from server.endpoints import ENDPOINTS
from server.http import connection
from server.http.codec import json_response
from server.http.connection import current_request
from server.http.errors import as_api_error
from server.http.frames import patch_websockets
from server.http.socket_connection import current_socket, install_sockets
from server.http.transport import patch_hypercorn
from server.keys.guard import Guard
from server.keys.keyring import Keyring
from server.keys.limits import Limiter
from server.keys.socket_auth import admit_socket
from server.keys.sockets import SocketAdmission
from server.keys.store.open import open_store
from server.keys.store.threads import StoreThreads
from server.models.registry import Registry
from server.models.sources import Loader, load_from_disk
from server.observe import log
from server.observe.collector import ServerState
from server.observe.metrics import Metrics
from server.observe.tracing import open_tracing
from server.process.exit import end_orderly, exit_failed
from server.process.shutdown import drain, end_if_lost, held_up
from server.prompt.cpu_pool import CpuPool
from server.run.admission import Admission
from server.run.permits import Permits
from server.services import Services, attach

if TYPE_CHECKING:
    from inferneo_jax import Job

logger = structlog.get_logger(__name__)

_LOADING_THRESHOLD = 50_000
"""New objects between two runs of the garbage collector while models load."""


def create_app(settings: Settings | None = None, loader: Loader | None = None) -> Quart:
    """Build the application. ``loader`` loads the models once it is served; by default from disk.

    Raises:
        ConfigError: the settings cannot work.
    """
    settings = settings or Settings.load()
    log.configure(settings.log_format)
    threads = StoreThreads(open_store(settings.keys_location(), settings.named("keys_db")))
    guard, limiter = Guard(settings, threads, access_of(ENDPOINTS)), Limiter(threads)
    job, process = _engines(settings)
    load = loader or partial(load_from_disk, job=job, process=process)
    registry = Registry(settings, load, guard.check_model, job, process)
    permits = Permits(settings.capacity())
    sockets = SocketAdmission(settings.capacity())

    def state() -> ServerState:
        return ServerState(
            models=registry.models(),
            permits=permits.capacity,
            permits_in_use=permits.in_use,
            identified_sockets=sockets.identified,
            unidentified_sockets=sockets.unidentified,
        )

    metrics = Metrics(state)
    operations = {each.path: each.gen_ai_operation for each in ENDPOINTS if each.gen_ai_operation}
    tracing = open_tracing(operations, [each.path for each in ENDPOINTS if not each.traced])
    services = Services(
        settings=settings,
        registry=registry,
        cpu_pool=CpuPool(),
        threads=threads,
        guard=guard,
        keyring=Keyring(threads.store, keep_admin=True),
        limiter=limiter,
        permits=permits,
        admission=Admission(permits, settings.request_seconds, guard, limiter, metrics),
        sockets=sockets,
        metrics=metrics,
        tracing=tracing,
        description=functools.cache(lambda: orjson.dumps(document(ENDPOINTS))),
    )

    app = Quart("server", static_folder=None)
    attach(app, services)
    unlogged = [each.path for each in ENDPOINTS if not each.logged]
    connections = connection.install(app, tracing, unlogged)
    install_sockets(app, metrics, settings.max_body_bytes)
    patch_hypercorn()
    patch_websockets()
    app.config["MAX_CONTENT_LENGTH"] = settings.max_body_bytes
    app.config["RESPONSE_TIMEOUT"] = None  # it would cut long streams without a word
    app.config["BODY_TIMEOUT"] = None  # LimitedBody has its own, by the body's progress
    app.url_map.merge_slashes = False  # a redirect would be no answer of the API
    _handle_errors(app)
    _name_responses(app, services)
    app.before_request(guard.admit_request)
    app.before_websocket(partial(admit_socket, settings, guard, limiter, sockets, registry))
    add_routes(app, services, ENDPOINTS)

    @app.while_serving
    async def run_models() -> AsyncGenerator[None, None]:
        for sentence in unknown_variables():
            logger.warning("unknown_setting", reason=sentence)
        await guard.announce()
        tasks = [
            asyncio.create_task(_load(registry)),
            asyncio.create_task(limiter.run()),
            asyncio.create_task(end_if_lost(permits, registry, threads)),
        ]
        try:
            seconds = settings.drain_seconds
            with held_up(partial(drain, permits, registry, connections, seconds)):
                yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.to_thread(registry.stop)
            services.cpu_pool.close()
            await asyncio.to_thread(threads.close)
            if tracing is not None:
                await tracing.close()

    return app


def _engines(settings: Settings) -> "tuple[Job | None, EngineProcess | None]":
    """The job that this process leads, or the process that runs the engines and leads it."""

    def leave(reason: str) -> None:
        logger.warning("job_ends", reason=reason)
        end_orderly()

    config = settings.job_config()
    if settings.engine_process == "true":
        return None, EngineProcess(job=config, on_leave=leave)
    if config is None:
        return None, None
    from inferneo_jax import Job

    return Job(config, leads=True, on_leave=leave), None


async def _load(registry: Registry) -> None:
    """Load the models. A server that can never serve ends with exit code 1."""
    usual = gc.get_threshold()
    # Nearly all that is made now stays; to look through it over and over takes a tenth of the time.
    gc.set_threshold(_LOADING_THRESHOLD, *usual[1:])
    try:
        await registry.load()
    except InferneoError as error:
        logger.error("loading_failed", reason=str(error))
    except Exception:
        logger.exception("loading_failed")
    else:
        # What is loaded stays. Left to the collector, its every full pass would look through all
        # of that, and hold up every request for a tenth of a second or more.
        gc.collect()
        gc.freeze()
        malloc_trim()
        logger.info("ready")
        return
    finally:
        gc.set_threshold(*usual)
    # Of a job's other processes some may wait for this one, and JAX would wait for them.
    exit_failed(at_once=registry.in_job)


def _handle_errors(app: Quart) -> None:
    @app.errorhandler(Exception)
    async def fail(error: Exception) -> Response:
        failure = as_api_error(error)
        response = json_response(failure.envelope(), failure.status, failure.headers)
        if has_request_context():
            current = current_request()
            current.log_entry.add_error(failure)
        if has_websocket_context():
            await current_socket().refuse(failure)
            response.headers["X-Request-Id"] = current_socket().id
        return response


def _name_responses(app: Quart, services: Services) -> None:
    @app.after_request
    async def finish(response: Response) -> Response:
        current = current_request()
        response.headers["X-Request-Id"] = current.id
        response.headers.update(await services.limiter.headers(current.caller))
        ends = services.permits.closed.is_set() or current.body.stalled
        if ends and current.http_version.startswith("1"):
            response.headers["Connection"] = "close"
        current.log_entry.add(status=response.status_code)
        rule = current.url_rule.rule if current.url_rule else "none"
        services.metrics.answered(current.method, rule, response.status_code)
        await current.body.drain()
        return response
