"""The schema of all settings, from which `--help` and docs/reference/configuration.md are made.

Each group of settings is a class whose docstring introduces the group. ``setting_docs`` describes
every setting as a user sees it: its flag, variable, form, bounds and default.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings import NoDecode

from inferneo_jax import ConfigError, EngineConfig, MeshShape

PREFIX = "INFERNEO_"
ParserName = Literal[
    "auto",
    "none",
    "deepseek",
    "deepseek-dsml",
    "function-gemma",
    "gemma4",
    "glm",
    "harmony",
    "hermes",
    "kimi-k2",
    "kimi-k3",
    "llama3",
    "llama4",
    "mistral",
    "phi4",
    "qwen3-coder",
]
"""How models write tool calls and reasoning: the formats of server/parsers, by family."""
KEY_VARIABLE = PREFIX + "API_KEY"
"""The key that `inferneo chat` sends: no setting of a server."""
_NO_FLAG = ("models", "job_token", "prefill_token")
"""The first is the argument of `inferneo serve`; the others everybody could read in `ps`."""


DEVICE_SLOTS = "{} on accelerators, {} on CPUs".format(
    *(EngineConfig().batch_sizes(platform).slots for platform in ("gpu", "cpu"))
)


def split_list(value: Any) -> Any:
    """A comma-separated text as a list; what comes from TOML is a list already."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _pairs(value: Any) -> Any:
    """``alias=model,alias=model`` as a mapping."""
    if not isinstance(value, str):
        return value
    pairs = {}
    for part in split_list(value):
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


def _shown(form: str | None = None, default: str | None = None) -> dict[str, Any]:
    """How a value is written where its type does not say, and what it means to give none."""
    return {"form": form, "default": default}


Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(split_list)]
Aliases = Annotated[dict[str, str], NoDecode, BeforeValidator(_pairs)]


class ModelSettings(BaseModel):
    """Models: which are served, and where they are stored."""

    models: Names = Field(
        default=(),
        description="Models to serve: names from the catalog, org/name on the Hugging Face Hub, "
        "GGUF files, or folders of models. Missing ones are pulled.",
        json_schema_extra=_shown("MODEL,...", "the catalog's first chat and embedding model"),
    )
    aliases: Aliases = Field(
        default_factory=dict,
        description="Additional names under which clients may ask for these models.",
        json_schema_extra=_shown("ALIAS=MODEL,...", "none"),
    )
    output_parser: ParserName = Field(
        default="auto",
        description="The format in which the models write tool calls and reasoning, which chat "
        "answers are parsed by; auto finds it by each model's chat template, none leaves all text "
        "as it is.",
    )
    checkpoints: Path | None = Field(
        default=None,
        description="Folder of the converted models.",
        json_schema_extra=_shown("FOLDER", "checkpoints/ of the checkout, else the user's cache"),
    )
    compilation_cache: Path | None = Field(
        default=None,
        description="Folder that keeps compiled programs for the next start, or that "
        "`inferneo compile` made. Anyone who can write to it can run code in the server, so "
        "nothing is loaded from it if others than the server's user and root can.",
        json_schema_extra=_shown("FOLDER", ".compiled among the checkpoints"),
    )


class NumericSettings(BaseModel):
    """Numerics: number formats and kernels. float32, none and xla are the reference."""

    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Type of weights and matrix products; auto is bfloat16 where the hardware "
        "multiplies it natively.",
    )
    quantization: Literal["auto", "none", "int8", "fp8"] = Field(
        default="auto",
        description="Quantization of the weights. none: matrices of the type dtype; int8, fp8: "
        "8 bits with a scale for each output, integers or floats (E4M3), multiplied natively where "
        "the hardware can: fp8 on NVIDIA GPUs since Ada, int8 since Turing and on TPUs. auto is "
        "none, except on a CPU with native kernels and no explicit dtype: there the blocks of a "
        "GGUF are multiplied as the file has them, and all other matrices are rounded to blocks "
        "of 8 bits.",
    )
    kv_dtype: Literal["auto", "float32", "bfloat16", "int8", "fp8"] = Field(
        default="auto",
        description="Type of the KV cache; int8 has one scale per token and head, fp8 (E4M3) "
        "has none and is for accelerators. auto is bfloat16, but float32 if dtype is float32, or "
        "on a CPU without native kernels.",
    )
    kernels: Literal["auto", "xla", "native"] = Field(
        default="auto",
        description="Kernels for attention and, on CPUs, for matrix products. xla is the "
        "reference. native is written for the device (on a CPU it is compiled at the "
        "first start, which needs a C++ compiler). auto is native where it exists.",
    )


class EngineSettings(BaseModel):
    """Engine: how much runs at once, and on which devices."""

    slots: int | None = Field(
        default=None,
        ge=1,
        le=256,
        description="Requests that run at once.",
        json_schema_extra=_shown(default=DEVICE_SLOTS),
    )
    max_len: int | None = Field(
        default=None,
        ge=2,
        description="Maximum tokens of one request, prompt and output together.",
        json_schema_extra=_shown("TOKENS", "the model's context, as far as memory holds it"),
    )
    mesh: Annotated[str, AfterValidator(_mesh)] = Field(
        default="",
        description="How devices are divided: model splits weights and heads, data makes groups "
        "that serve requests independently.",
        json_schema_extra=_shown("data=N,model=N", "all devices on model"),
    )
    itl_budget: float = Field(
        default=EngineConfig().itl_budget,
        gt=0,
        le=60_000,
        description="How long the prefill of prompts may delay the next token of requests that are "
        "generating, in milliseconds; where a decode step takes longer, as long as that. Less "
        "makes streams smoother, more shortens the time to the first token while others generate.",
        json_schema_extra=_shown("MILLISECONDS"),
    )
    speculation: Literal["auto", "off", "ngram", "model"] = Field(
        default="auto",
        description="Speculative decoding: drafts of the next tokens are verified in one step. "
        "ngram looks them up in the preceding tokens, model has the draft model make them, auto "
        "uses either where it is measured to be faster.",
    )
    draft_model: str | None = Field(
        default=None,
        min_length=1,
        description="A smaller model with the same vocabulary, which drafts for the language "
        "models; named like the models to serve, and pulled if it is missing.",
        json_schema_extra=_shown("MODEL", "none"),
    )
    engine_process: Annotated[Literal["false", "true"], BeforeValidator(_word)] = Field(
        default="false",
        description="Run the engine in a process of its own, so that it and HTTP each have a "
        "Python interpreter: for accelerators that generate more than some 10,000 tokens per "
        "second.",
    )


class RequestSettings(BaseModel):
    """Requests: limits on their number, size and duration."""

    max_waiting: int = Field(
        default=256,
        ge=0,
        le=100_000,
        description="Requests that may wait while every slot is taken; further ones get 503.",
    )
    request_seconds: float = Field(
        default=3600.0,
        gt=0,
        le=7 * 86_400,
        description="Maximum duration of a request, which X-Request-Timeout can only shorten.",
    )
    drain_seconds: float = Field(
        default=25.0,
        ge=0,
        le=86_400,
        description="How long requests may go on after the server is told to end; keep it below "
        "the time after which the server is killed (Kubernetes: 30 s).",
    )
    max_body_bytes: int = Field(
        default=4 * 1024 * 1024,
        ge=1024,
        le=1024**3,
        description="Maximum size of a request body, and of a WebSocket frame.",
        json_schema_extra=_shown("BYTES"),
    )


class NetworkSettings(BaseModel):
    """Network: where the server listens, and which clients it accepts."""

    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="Address that `inferneo serve` listens on; 0.0.0.0 or :: makes it reachable "
        "from other machines. `hypercorn --bind` overrides it.",
        json_schema_extra=_shown("ADDRESS"),
    )
    port: int = Field(
        default=8000,
        ge=0,
        le=65_535,
        description="Port that `inferneo serve` listens on; 0 takes a free one. `hypercorn "
        "--bind` overrides it.",
    )
    allowed_origins: Names = Field(
        default=(),
        description="Origins of web pages that may open WebSockets, besides pages of this "
        "machine; * for all.",
        json_schema_extra=_shown("SCHEME://HOST[:PORT],...", "this machine's"),
    )
    allowed_hosts: Names = Field(
        default=(),
        description="Host names that requests may have in the Host header, without ports.",
        json_schema_extra=_shown(
            "NAME,...", "any where keys are needed or require_key is false, else localhost"
        ),
    )


class KeySettings(BaseModel):
    """Keys: who may use the server (`inferneo keys`)."""

    require_key: Annotated[Literal["auto", "true", "false"], BeforeValidator(_word)] = Field(
        default="auto",
        description="Whether requests need an API key; auto requires one as soon as a key exists, "
        "and until then serves only this machine.",
    )
    keys_db: str | None = Field(
        default=None,
        min_length=1,
        description="Where API keys, limits and usage are stored: the path of an SQLite file, or "
        "a URL of Redis or Valkey.",
        json_schema_extra=_shown("PATH|URL", "inferneo/keys.db in the user's data folder"),
    )


class JobSettings(BaseModel):
    """Several processes: running one language model together (docs/multihost.md)."""

    coordinator: str | None = Field(
        default=None,
        min_length=1,
        description="Address of process 0; auto lets JAX find it.",
        json_schema_extra=_shown("HOST:PORT|auto", "this process alone"),
    )
    num_processes: int | None = Field(
        default=None,
        ge=2,
        le=10_000,
        description="Number of processes.",
        json_schema_extra=_shown(default="none"),
    )
    process_id: int | None = Field(
        default=None,
        ge=0,
        description="Number of this process; 0 serves HTTP, the others run `inferneo follow`.",
        json_schema_extra=_shown(default="none"),
    )
    job_token: SecretStr | None = Field(
        default=None,
        description="Secret that all processes share. It has no flag, since everybody on the "
        "machine can read those in the list of processes.",
        json_schema_extra=_shown("SECRET", "none"),
    )


class HandoverSettings(BaseModel):
    """Prefill and decode: servers that compute prompts for others (docs/replicas.md)."""

    prefill_listen: str | None = Field(
        default=None,
        min_length=1,
        description="Address at which this server computes prompts for others.",
        json_schema_extra=_shown("HOST:PORT", "none"),
    )
    prefill_servers: Names = Field(
        default=(),
        description="Addresses of the servers that compute the prompts of this one.",
        json_schema_extra=_shown("HOST:PORT,...", "it computes them itself"),
    )
    prefill_token: SecretStr | None = Field(
        default=None,
        description="Secret that these servers share. It has no flag, since everybody on the "
        "machine can read those in the list of processes.",
        json_schema_extra=_shown("SECRET", "none"),
    )


class LogSettings(BaseModel):
    """Logs and file: the format of the log, and a file with further settings."""

    log_format: Literal["auto", "json", "console"] = Field(
        default="auto",
        description="Format of the log on standard error; auto is console on a terminal and json "
        "elsewhere.",
    )
    config: Annotated[Path | None, BeforeValidator(lambda value: value or None)] = Field(
        default=None,
        description="TOML file of settings, whose keys are the names of the flags with _ for -. "
        "Flags and environment variables take precedence over it.",
        json_schema_extra=_shown("FILE", "none"),
    )


class SettingsSchema(  # pydantic takes the fields of the last base first
    LogSettings,
    HandoverSettings,
    JobSettings,
    KeySettings,
    NetworkSettings,
    RequestSettings,
    EngineSettings,
    NumericSettings,
    ModelSettings,
):
    """All settings of the server, group by group. What is None is chosen by the engine."""


@dataclass(frozen=True)
class SettingDoc:
    """One setting as a user sees it.

    Attributes:
        name: the key in TOML, and in Python.
        group: what it belongs to, as a title.
        about: a sentence on the group.
        description: sentences on the setting.
        form: how a value is written: ``N``, ``SECONDS``, ``auto|json``.
        bounds: of a number, as ``1 to 256``; empty: none.
        default: as it would be written, or, with ``default_in_words``, what happens without one.
        variable: the environment variable.
        flag: the option of `inferneo serve`; None: it has none.
    """

    name: str
    group: str
    about: str
    description: str
    form: str
    bounds: str
    default: str
    default_in_words: bool
    variable: str
    flag: str | None


def variable_of(name: str) -> str:
    """The environment variable of a setting."""
    return PREFIX + name.upper()


def flag_of(name: str) -> str | None:
    """The option of `inferneo serve` for a setting; None: it has none."""
    if name in _NO_FLAG or name not in SettingsSchema.model_fields:
        return None
    return "--" + name.replace("_", "-")


def setting_docs(schema: type[BaseModel] = SettingsSchema) -> Iterator[SettingDoc]:
    """Every setting of a schema, group by group."""
    for name, field in schema.model_fields.items():
        group, about = _group(schema, name)
        extra: Any = field.json_schema_extra or {}
        words = extra.get("default")
        yield SettingDoc(
            name=name,
            group=group,
            about=about,
            description=field.description or "",
            form=extra.get("form") or _form(field),
            bounds=_bounds(field),
            default=words or _written(field.default),
            default_in_words=words is not None,
            variable=variable_of(name),
            flag=flag_of(name),
        )


def _group(schema: type[BaseModel], name: str) -> tuple[str, str]:
    """Title and sentence of a setting's group: the docstring of the class that declares it."""
    home = [each for each in schema.mro() if name in getattr(each, "model_fields", ())][-1]
    title, _, about = (home.__doc__ or "").splitlines()[0].partition(": ")
    return title.rstrip("."), about


def _form(field: FieldInfo) -> str:
    if get_origin(field.annotation) is Literal:
        return "|".join(get_args(field.annotation))
    kinds = {int: "N", float: "SECONDS"}
    options = get_args(field.annotation) or (field.annotation,)
    return next((kinds[each] for each in options if each in kinds), "TEXT")


def _bounds(field: FieldInfo) -> str:
    found = {type(each): each for each in field.metadata}
    least, above, most = found.get(Ge), found.get(Gt), found.get(Le)
    if least and most:
        return f"{_written(least.ge)} to {_written(most.le)}"
    words = {
        "at least": least and least.ge,
        "above": above and above.gt,
        "at most": most and most.le,
    }
    return ", ".join(
        f"{word} {_written(bound)}" for word, bound in words.items() if bound is not None
    )


def _written(value: Any) -> str:
    """As it would be typed."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
