"""Settings of replicas: the server's, and how many servers there are."""

import os
from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field

from inferneo_jax import ConfigError
from server.config.schema import PREFIX, variable_of
from server.config.settings import Settings

_SHARED = ("redis", "rediss", "valkey", "valkeys")


class ReplicaSettings(Settings):
    """Replicas: several servers behind one port (docs/replicas.md)."""

    replicas: int = Field(default=1, ge=1, le=1000, description="Number of servers.")
    replica_cpus: float = Field(
        default=1.0,
        ge=0,
        description="CPU cores that Ray reserves for each server.",
        json_schema_extra={"form": "N"},
    )
    replica_gpus: int = Field(default=0, ge=0, description="GPUs for each server.")
    replica_tpus: int = Field(default=0, ge=0, description="TPU chips for each server.")

    @classmethod
    def load(cls, flags: Mapping[str, Any] | None = None) -> Self:
        """Read and check them.

        Raises:
            ConfigError: they cannot work; the text names the variable.
        """
        settings = super().load(flags)
        scheme = settings.keys_location().partition("://")[0]
        if settings.replicas > 1 and scheme not in _SHARED:
            raise ConfigError(
                f"INFERNEO_REPLICAS is {settings.replicas}, and INFERNEO_KEYS_DB is no URL of "
                "Redis: the replicas of each machine would count a key's limits for themselves. "
                "Set INFERNEO_KEYS_DB to one that all of them reach, such as "
                "redis://host:6379/0, or INFERNEO_REPLICAS to 1."
            )
        return settings

    def environment(self) -> dict[str, str]:
        """The variables that a replica's server is to find: this process's, without our own."""
        own = {variable_of(name) for name in type(self).model_fields.keys() - _OF_SERVER}
        given = {
            name: value
            for name, value in os.environ.items()
            if name.startswith(PREFIX) and name not in own
        }
        # A replica sees its proxy, and cannot tell who is on this machine.
        required = "true" if self.require_key == "auto" else self.require_key
        return given | {"INFERNEO_REQUIRE_KEY": required}


_OF_SERVER = Settings.model_fields.keys()
