"""The settings: one schema, read from ``INFERNEO_*`` variables and a TOML file.

A variable wins over the file, which the variable ``INFERNEO_CONFIG`` names. This is the only reader
of the environment.
"""

import dataclasses
import difflib
import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from inferneo_jax import ConfigError, EngineConfig, JobConfig, MeshShape
from server.protocol.validation import describe

PREFIX = "INFERNEO_"
CONFIG_VARIABLE = PREFIX + "CONFIG"


def _split(value: Any) -> Any:
    """A comma-separated text as a list; what comes from TOML is a list already."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _pairs(value: Any) -> Any:
    """``alias=model,alias=model`` as a mapping."""
    if not isinstance(value, str):
        return value
    pairs = {}
    for part in _split(value):
        alias, equals, model = (text.strip() for text in part.partition("="))
        if not (alias and equals and model):
            raise ValueError(f"holds {part!r}; write alias=model, several with commas between")
        pairs[alias] = model
    return pairs


def _mesh(text: str) -> str:
    """A text that says how devices are shared out."""
    try:
        MeshShape.parse(text)
    except ConfigError as error:
        raise ValueError(str(error).removeprefix("mesh ")) from None
    return text


def _word(value: Any) -> Any:
    """TOML's true and false as words, and words in lower case."""
    return str(value).lower() if isinstance(value, bool | str) else value


class Settings(BaseSettings):
    """All settings of the server. What is None is chosen by the engine.

    Attributes:
        models: catalog names, ``org/name`` of the Hugging Face Hub, or folders of checkpoints;
            none: the catalog's first chat and first embedding model.
        aliases: further names of these models.
        checkpoints: the folder where converted models lie; None: the checkout's or the user's.
        compilation_cache: where compiled programs and encoded weights are kept for the next start;
            None: in ``.compiled`` among the checkpoints.
        dtype: of weights and matrix products.
        quantization: of the weights: ``int8`` or ``none``.
        kv_dtype: of keys and values; ``int8`` has a scale for each token and head.
        kernels: of attention; ``xla``: the reference; ``native``: those made for the device;
            ``auto``: these where there are some.
        speculation: ``ngram``: drafts looked up in what was said before, which one step verifies;
            ``auto``: where that is faster; ``off``.
        mesh: devices of the mesh, as ``data=1,model=8``: ``model`` splits weights and heads,
            ``data`` makes groups that serve requests of their own; empty: all devices on ``model``.
        slots: requests that run at once.
        max_len: most tokens of one request, prompt and output.
        max_waiting: requests that wait while every slot is taken; more are refused.
        request_seconds: how long a request may take, and the most that ``X-Request-Timeout`` can
            ask for.
        drain_seconds: how long a server that is told to end waits for requests to end first; less
            than whoever tells it waits before killing it (Kubernetes: 30 s).
        max_body_bytes: largest request body, and largest WebSocket frame.
        allowed_origins: web pages that may open WebSockets, besides this machine's own;
            ``scheme://host[:port]``.
        allowed_hosts: names under which the server may be asked for, as in the header ``Host``,
            without ports; none: any, where keys are needed or ``require_key`` is false.
        keys_db: where API keys, limits and usage are kept: a path of SQLite, or a URL of Redis or
            Valkey; None: ``inferneo/keys.db`` in the user's data folder.
        require_key: ``auto``: as soon as there are keys; until then only this machine is served.
        coordinator: ``host:port`` of process 0 where several processes run one language model, or
            ``auto``: as JAX finds them; None: this process alone. See docs/multihost.md.
        num_processes: of such a job.
        process_id: this one's number; 0 serves HTTP, the others ``inferneo follow``.
        job_token: a secret that all processes of the job share.
        log_format: ``auto`` is console on a terminal and json elsewhere.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    models: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)] = ()
    aliases: Annotated[dict[str, str], NoDecode, BeforeValidator(_pairs)] = Field(
        default_factory=dict
    )
    checkpoints: Path | None = None
    compilation_cache: Path | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quantization: Literal["auto", "none", "int8"] = "auto"
    kv_dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    kernels: Literal["auto", "xla", "native"] = "auto"
    speculation: Literal["auto", "off", "ngram"] = "auto"
    mesh: Annotated[str, AfterValidator(_mesh)] = ""
    slots: int | None = Field(default=None, ge=1, le=256)
    max_len: int | None = Field(default=None, ge=2)
    max_waiting: int = Field(default=256, ge=0, le=100_000)
    request_seconds: float = Field(default=3600.0, gt=0, le=7 * 86_400)
    drain_seconds: float = Field(default=25.0, ge=0, le=86_400)
    max_body_bytes: int = Field(default=4 * 1024 * 1024, ge=1024, le=1024**3)
    allowed_origins: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)] = ()
    allowed_hosts: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)] = ()
    keys_db: str | None = Field(default=None, min_length=1)
    require_key: Annotated[Literal["auto", "true", "false"], BeforeValidator(_word)] = "auto"
    coordinator: str | None = Field(default=None, min_length=1)
    num_processes: int | None = Field(default=None, ge=2, le=10_000)
    process_id: int | None = Field(default=None, ge=0)
    job_token: SecretStr | None = None
    log_format: Literal["auto", "json", "console"] = "auto"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments win over variables, and these over the file."""
        file = InitSettingsSource(settings_cls, init_kwargs=_read_file())
        return init_settings, env_settings, file

    @classmethod
    def load(cls) -> Self:
        """Read them.

        Raises:
            ConfigError: the file cannot be read, or a value is wrong; the text says which.
        """
        try:
            settings = cls()
        except ValidationError as error:
            problems = [_problem(each) for each in error.errors(include_url=False)]
            raise ConfigError("\n".join(problems)) from None
        settings.engine_config()
        settings.job_config()
        return settings

    def checkpoints_dir(self) -> Path:
        """The folder where converted models lie."""
        if self.checkpoints is not None:
            return self.checkpoints.expanduser().absolute()
        from inferneo_jax.weights.catalog import default_checkpoints_dir

        return default_checkpoints_dir()

    def keys_location(self) -> str:
        """Path or URL of the key database."""
        if self.keys_db is not None:
            return self.keys_db
        # Neither the checkout nor a cache folder: keys must not be committed, nor cleaned away.
        folder = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
        return str(Path(folder) / "inferneo" / "keys.db")

    def places(self) -> int:
        """How many requests are served or wait at once."""
        return self.engine_config().slots + self.max_waiting

    def engine_config(self) -> EngineConfig:
        """The part that the engine reads.

        Raises:
            ConfigError: the values do not go together.
        """
        cache = self.compilation_cache or self.checkpoints_dir() / ".compiled"
        config = EngineConfig() if self.slots is None else EngineConfig(slots=self.slots)
        return dataclasses.replace(
            config,
            dtype=self.dtype,
            kernels=self.kernels,
            quantization=self.quantization,
            kv_dtype=self.kv_dtype,
            speculation=self.speculation,
            max_len=self.max_len,
            mesh=MeshShape.parse(self.mesh),
            compilation_cache=str(cache.expanduser().absolute()),
        )

    def job_config(self) -> JobConfig | None:
        """The processes that run one model with this one; None: there are none.

        Raises:
            ConfigError: the values do not go together.
        """
        numbered = self.num_processes is not None or self.process_id is not None
        if self.coordinator in (None, "auto") and numbered:
            raise ConfigError(
                "INFERNEO_NUM_PROCESSES and INFERNEO_PROCESS_ID need INFERNEO_COORDINATOR, as "
                "host:port"
            )
        if self.coordinator is None:
            return None
        if self.job_token is None:
            raise ConfigError(
                "INFERNEO_COORDINATOR needs INFERNEO_JOB_TOKEN, a secret that all processes share: "
                "make one with `openssl rand -hex 32`"
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
            raise ConfigError(f"INFERNEO_COORDINATOR and INFERNEO_JOB_TOKEN: {error}") from None


def unknown_variables() -> list[str]:
    """Sentences about variables that look like settings and are none."""
    known = {PREFIX + name.upper() for name in Settings.model_fields} | {CONFIG_VARIABLE}
    sentences = []
    for name in sorted(os.environ.keys() - known):
        if name.startswith(PREFIX):
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            sentences.append(f"{name} is not a setting of this version{hint}")
    return sentences


@dataclasses.dataclass(frozen=True)
class Traces:
    """What the variables of OpenTelemetry ask for; all else about it the SDK reads itself.

    Attributes:
        exporters: ``otlp``, ``console`` or what there is not; none: no traces.
        protocol: of ``otlp``.
    """

    exporters: tuple[str, ...]
    protocol: str


def traces_wanted() -> Traces:
    """Whether the environment names a collector, or an exporter."""

    def first(*names: str) -> str:
        return next((value for name in names if (value := os.environ.get(name, "").strip())), "")

    endpoint = first("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    named = first("OTEL_TRACES_EXPORTER") or ("otlp" if endpoint else "none")
    off = first("OTEL_SDK_DISABLED").lower() == "true"
    protocol = first("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    exporters = [] if off else [name for name in _split(named) if name != "none"]
    return Traces(tuple(exporters), protocol or "http/protobuf")


def _read_file() -> dict[str, Any]:
    path = os.environ.get(CONFIG_VARIABLE)
    if not path:
        return {}
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{CONFIG_VARIABLE} names {path}, which cannot be read: {error.strerror}"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{CONFIG_VARIABLE} names {path}, which is no TOML: {error}") from None


def _problem(error: Any) -> str:
    """One sentence that names the variable, or the key of the file, at fault."""
    field = str(error["loc"][0]) if error["loc"] else ""
    variable = PREFIX + field.upper()
    where = variable if variable in os.environ else f"{field!r} in {os.environ[CONFIG_VARIABLE]}"
    if error["type"] == "extra_forbidden":
        known = ", ".join(Settings.model_fields)
        return f"{where} is not a setting; there are {known}."
    if error["type"] == "value_error":
        return f"{where} {error['ctx']['error']}."
    return describe(error, where)
