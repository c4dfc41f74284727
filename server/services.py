"""What the routes share."""

from dataclasses import dataclass
from typing import cast

from quart import Quart

from server.access.admission import Admission
from server.access.auth import Guard
from server.access.limits import Limiter
from server.access.sockets import SocketPlaces
from server.access.store_threads import StoreThreads
from server.metrics import Metrics
from server.models import Registry
from server.settings import Settings
from server.text import TextWork
from server.tracing import Tracing

_NAME = "services"


@dataclass(frozen=True)
class Services:
    """What one application has, made once by ``create_app``."""

    settings: Settings
    registry: Registry
    text: TextWork
    threads: StoreThreads
    guard: Guard
    limiter: Limiter
    admission: Admission
    sockets: SocketPlaces
    metrics: Metrics
    tracing: Tracing | None


def services_of(app: Quart) -> Services:
    """Those of an application."""
    return cast(Services, app.extensions[_NAME])


def attach(app: Quart, services: Services) -> None:
    """Give an application its services."""
    app.extensions[_NAME] = services
