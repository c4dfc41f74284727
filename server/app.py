"""The application, as the environment describes it: ``hypercorn server.app:app``."""

from quart import Quart

from inferneo_jax import ConfigError
from server.application import create_app
from server.process.exit import exit_failed

__all__ = ["app", "create_app"]


def _from_environment() -> Quart:
    try:
        return create_app()
    except ConfigError as error:
        exit_failed(f"The settings cannot be used.\n{error}")


app = _from_environment()
