"""The settings: one schema, read from flags, ``INFERNEO_*`` variables and a TOML file.

A flag wins over a variable, and a variable over the file, which ``--config`` or ``INFERNEO_CONFIG``
names. This is the only reader of the environment.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import PrivateAttr, ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from inferneo_jax import (
    ConfigError,
    EngineConfig,
    HandoverConfig,
    JobConfig,
    MeshShape,
    expected_platform,
)
from server.config.schema import (
    KEY_VARIABLE,
    PREFIX,
    SettingsSchema,
    flag_of,
    split_list,
    variable_of,
)
from server.config.validation import describe


class Settings(SettingsSchema, BaseSettings):
    """All settings of the server, read and checked."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    _flags: frozenset[str] = PrivateAttr(default=frozenset())

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments take precedence over variables, and variables over the file."""
        assert isinstance(init_settings, InitSettingsSource)
        assert isinstance(env_settings, EnvSettingsSource)
        links = {name.lower() for name in _service_links()}
        variables = env_settings.env_vars.items()
        env_settings.env_vars = {name: text for name, text in variables if name not in links}
        file = InitSettingsSource(settings_cls, init_kwargs=_read_file(init_settings.init_kwargs))
        return init_settings, env_settings, file

    @classmethod
    def load(cls, flags: Mapping[str, Any] | None = None) -> Self:
        """Read the settings; ``flags`` are those of the command line, by name.

        Raises:
            ConfigError: the file cannot be read, or a value is wrong; the text says which.
        """
        flags = flags or {}
        try:
            settings = cls(**flags)
        except ValidationError as error:
            problems = [_problem(each, flags) for each in error.errors(include_url=False)]
            raise ConfigError("\n".join(problems)) from None
        settings._flags = frozenset(flags)
        settings.engine_config()
        settings.job_config()
        settings.handover_config()
        return settings

    def named(self, name: str) -> str:
        """Where ``name`` was set: the flag, the variable, or the key in the file."""
        in_file = self.config and name in self.model_fields_set
        return _named(name, self._flags, self.config if in_file else None)

    def checkpoints_dir(self) -> Path:
        """The folder of the converted models."""
        if self.checkpoints is not None:
            return self.checkpoints.expanduser().absolute()
        from inferneo_jax import default_checkpoints_dir

        return default_checkpoints_dir()

    def keys_location(self) -> str:
        """Path or URL of the key database."""
        if self.keys_db is not None:
            return self.keys_db
        # Neither the checkout nor a cache folder: keys must not be committed, nor cleaned away.
        folder = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
        return str(Path(folder) / "inferneo" / "keys.db")

    def capacity(self) -> int:
        """How many requests may run or wait at once."""
        return self.engine_config().batch_sizes(expected_platform()).slots + self.max_waiting

    def engine_config(self) -> EngineConfig:
        """The configuration of the engine.

        Raises:
            ConfigError: the values do not go together.
        """
        cache = self.compilation_cache or self.checkpoints_dir() / ".compiled"
        return EngineConfig(
            slots=self.slots,
            dtype=self.dtype,
            kernels=self.kernels,
            quantization=self.quantization,
            kv_dtype=self.kv_dtype,
            itl_budget=self.itl_budget,
            speculation=self.speculation,
            max_len=self.max_len,
            mesh=MeshShape.parse(self.mesh),
            compilation_cache=str(cache.expanduser().absolute()),
        )

    def job_config(self) -> JobConfig | None:
        """The job of several processes that run one model; None if this one is alone.

        Raises:
            ConfigError: the values do not go together.
        """
        numbered = self.num_processes is not None or self.process_id is not None
        if self.coordinator in (None, "auto") and numbered:
            raise ConfigError(
                f"{self.named('num_processes')} and {self.named('process_id')} need "
                f"{self.named('coordinator')}, as host:port"
            )
        if self.coordinator is None:
            return None
        if self.job_token is None:
            raise ConfigError(
                f"{self.named('coordinator')} needs INFERNEO_JOB_TOKEN, a secret that all "
                "processes share: make one with `openssl rand -hex 32`"
            )
        coordinator = None if self.coordinator == "auto" else self.coordinator
        token = self.job_token.get_secret_value()
        try:
            return JobConfig(
                token=token,
                coordinator=coordinator,
                num_processes=self.num_processes,
                process_id=self.process_id,
            )
        except ConfigError as error:
            raise ConfigError(
                f"{self.named('coordinator')} and INFERNEO_JOB_TOKEN: {error}"
            ) from None

    def handover_config(self) -> HandoverConfig | None:
        """Whether prompts are computed for other servers, or by them; None: neither.

        Raises:
            ConfigError: the values do not go together.
        """
        if self.prefill_listen is None and not self.prefill_servers:
            return None
        name = self.named("prefill_listen" if self.prefill_listen else "prefill_servers")
        if self.prefill_token is None:
            raise ConfigError(
                f"{name} needs INFERNEO_PREFILL_TOKEN, a secret that all these servers share: make "
                "one with `openssl rand -hex 32`"
            )
        if self.engine_process == "true":
            raise ConfigError(
                f"{name} needs the engine in the server's own process: set "
                f"{self.named('engine_process')} to false"
            )
        try:
            return HandoverConfig(
                token=self.prefill_token.get_secret_value(),
                listen=self.prefill_listen,
                servers=self.prefill_servers,
            )
        except ConfigError as error:
            raise ConfigError(f"{name} and INFERNEO_PREFILL_TOKEN: {error}") from None


def unknown_variables() -> list[str]:
    """A sentence for each variable that looks like a setting but is none."""
    known = {variable_of(name) for name in Settings.model_fields} | {KEY_VARIABLE}
    links = _service_links()
    sentences = []
    if links:
        sentences.append(
            f"{', '.join(links)}: made by Kubernetes for a Service of that name, and no settings; "
            "enableServiceLinks: false in the Pod's spec leaves them out"
        )
    for name in sorted(os.environ.keys() - known - set(links)):
        if name.startswith(PREFIX):
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            sentences.append(f"{name} is not a setting of this version{hint}")
    return sentences


@dataclass(frozen=True)
class Traces:
    """What OpenTelemetry's variables ask for; the SDK reads all others itself.

    Attributes:
        exporters: ``otlp``, ``console`` or what there is not; none: no traces.
        protocol: of ``otlp``.
    """

    exporters: tuple[str, ...]
    protocol: str


def traces_wanted() -> Traces:
    """The exporters that the environment asks for."""

    def first(*names: str) -> str:
        return next((value for name in names if (value := os.environ.get(name, "").strip())), "")

    endpoint = first("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    named = first("OTEL_TRACES_EXPORTER") or ("otlp" if endpoint else "none")
    off = first("OTEL_SDK_DISABLED").lower() == "true"
    protocol = first("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    exporters = [] if off else [name for name in split_list(named) if name != "none"]
    return Traces(tuple(exporters), protocol or "http/protobuf")


def _service_links() -> list[str]:
    """The variables that Kubernetes sets for a Service named inferneo or inferneo-something.

    Of these ``INFERNEO_PORT``, a URL, has the name of a setting.
    """
    end = "_SERVICE_HOST"
    ours = [name for name in os.environ if name.startswith(PREFIX) and name.endswith(end)]
    service = re.compile("|".join(f"{name.removesuffix(end)}_(SERVICE_|PORT).*" for name in ours))
    return sorted(
        name
        for name, text in os.environ.items()
        if service.fullmatch(name) and (name != variable_of("port") or "://" in text)
    )


def _read_file(flags: Mapping[str, Any]) -> dict[str, Any]:
    path = flags.get("config") or os.environ.get(variable_of("config"))
    if not path:
        return {}
    where = _named("config", flags)
    try:
        values = tomllib.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{where} names {path}, which cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{where} names {path}, which is no TOML: {error}") from None
    if "config" in values:
        raise ConfigError(f"'config' in {path} names a further file; there can be one only")
    return values


def _named(name: str, flags: Container[str], file: object = None) -> str:
    """The flag, the variable, or the key in the file, whichever was used."""
    if name in flags:
        return flag_of(name) or "MODEL"
    if file and variable_of(name) not in os.environ:
        return f"{name!r} in {file}"
    return variable_of(name)


def _problem(error: Any, flags: Mapping[str, Any]) -> str:
    """One sentence that names the setting at fault, by where it was set."""
    name = str(error["loc"][0]) if error["loc"] else ""
    where = _named(name, flags, flags.get("config") or os.environ.get(variable_of("config")))
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, Settings.model_fields, n=1)
        hint = (
            f"did you mean {close[0]!r}?"
            if close
            else f"there are {', '.join(Settings.model_fields)}."
        )
        return f"{where} is not a setting; {hint}"
    if error["type"] == "value_error":
        return f"{where} {error['ctx']['error']}."
    return describe(error, where)
