"""The services that the endpoints share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from quart import Quart

from server.config.settings import Settings
from server.keys.guard import Guard
from server.keys.keyring import Keyring
from server.keys.limits import Limiter
from server.keys.sockets import SocketAdmission
from server.keys.store.threads import StoreThreads
from server.models.registry import Registry
from server.observe.metrics import Metrics
from server.observe.tracing import Tracing
from server.prompt.cpu_pool import CpuPool
from server.run.admission import Admission
from server.run.permits import Permits

_NAME = "services"


@dataclass(frozen=True)
class Services:
    """The services of one application, made once by ``create_app``.

    Attributes:
        description: makes the API's description, an OpenAPI document as JSON.
    """

    settings: Settings
    registry: Registry
    cpu_pool: CpuPool
    threads: StoreThreads
    guard: Guard
    keyring: Keyring
    limiter: Limiter
    permits: Permits
    admission: Admission
    sockets: SocketAdmission
    metrics: Metrics
    tracing: Tracing | None
    description: Callable[[], bytes]


def services_of(app: Quart) -> Services:
    """The services of an application."""
    return cast(Services, app.extensions[_NAME])


def attach(app: Quart, services: Services) -> None:
    """Attach its services to an application."""
    app.extensions[_NAME] = services
