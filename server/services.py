"""What the routes share."""

from dataclasses import dataclass

from server.models import Registry
from server.settings import Settings
from server.text import TextWork


@dataclass(frozen=True)
class Services:
    """One application's settings, models and text threads."""

    settings: Settings
    registry: Registry
    text: TextWork
