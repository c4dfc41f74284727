"""The application: ``hypercorn server.app:app``."""

import asyncio
from collections.abc import AsyncGenerator

import structlog
from quart import Blueprint, Quart, Response, has_websocket_context, websocket

from inferneo_jax import ConfigError, InferneoError
from server import connection, log
from server.connection import current_request, request_id
from server.errors import as_api_error
from server.exit import exit_failed
from server.http import json_response
from server.models import Loader, Registry, load_from_disk, still_loading
from server.routes import embeddings, generate, health, models
from server.services import Services
from server.settings import Settings, unknown_variables
from server.text import TextWork

logger = structlog.get_logger(__name__)


def create_app(settings: Settings | None = None, loader: Loader = load_from_disk) -> Quart:
    """Build the application; models are loaded once it is served, by ``loader``.

    Raises:
        ConfigError: the settings cannot work.
    """
    settings = settings or Settings.load()
    log.configure(settings.log_format)
    services = Services(settings, Registry(settings, loader), TextWork())

    app = Quart("server", static_folder=None)
    connection.install(app)
    app.config["MAX_CONTENT_LENGTH"] = settings.max_body_bytes
    app.config["RESPONSE_TIMEOUT"] = None  # it would cut long streams without a word
    _handle_errors(app)
    _name_responses(app)
    app.register_blueprint(health.blueprint(services))
    app.register_blueprint(_api(services))

    @app.while_serving
    async def run_models() -> AsyncGenerator[None, None]:
        for sentence in unknown_variables():
            logger.warning("unknown_setting", reason=sentence)
        loading = asyncio.create_task(_load(services.registry))
        try:
            yield
        finally:
            loading.cancel()
            await asyncio.to_thread(services.registry.stop)
            services.text.close()

    return app


def _api(services: Services) -> Blueprint:
    """Everything under ``/v1``, which needs the models."""
    api = Blueprint("v1", __name__, url_prefix="/v1")

    async def require_models() -> None:
        if not services.registry.loaded:
            raise still_loading()

    api.before_request(require_models)
    api.before_websocket(require_models)
    for routes in (models, generate, embeddings):
        routes.add_routes(api, services)
    return api


async def _load(registry: Registry) -> None:
    """Load the models. A server that can never serve ends, with an exit code that says so."""
    try:
        await registry.load()
    except InferneoError as error:
        logger.error("loading_failed", reason=str(error))
    except Exception:
        logger.exception("loading_failed")
    else:
        logger.info("ready")
        return
    exit_failed()


def _handle_errors(app: Quart) -> None:
    @app.errorhandler(Exception)
    async def fail(error: Exception) -> Response:
        failure = as_api_error(error)
        response = json_response(failure.envelope(), failure.status, failure.headers)
        if has_websocket_context():  # the connection was not accepted
            response.headers["X-Request-Id"] = request_id(websocket.headers)
        return response


def _name_responses(app: Quart) -> None:
    @app.after_request
    async def finish(response: Response) -> Response:
        current = current_request()
        response.headers["X-Request-Id"] = current.id
        current.record.note(status=response.status_code)
        await current.body.drain()
        return response


def _from_environment() -> Quart:
    try:
        return create_app()
    except ConfigError as error:
        exit_failed(f"The settings cannot be used.\n{error}")


app = _from_environment()
