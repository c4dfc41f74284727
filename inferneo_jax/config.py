"""Frozen configurations, and the only place where the engine's defaults are written."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args, get_origin

from inferneo_jax.errors import ConfigError
from inferneo_jax.files import shown

MAX_VOCAB_SIZE = 2**20
"""Maximum size of a vocabulary; the largest in use has 262,144 tokens."""

# Several times the sizes of the largest models in use. A configuration that exceeds them is a
# mistake or an attack, and is rejected before anything of these sizes is allocated.
_MAX_SIZES = {
    "vocab_size": MAX_VOCAB_SIZE,
    "hidden_size": 2**17,
    "mlp_size": 2**19,
    "num_layers": 512,
    "num_heads": 2**10,
    "num_kv_heads": 2**10,
    "head_dim": 2**12,
    "context_length": 2**24,
    "original_context_length": 2**24,
    "num_positions": 2**24,
    "max_tokens": 2**24,
    "num_token_types": 2**8,
}


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Frequency scaling of rotary embeddings.

    ``linear`` divides every frequency by ``factor``. ``llama3`` divides only the low frequencies
    and interpolates towards the high ones (Llama 3.1, section "long context").
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_length: int = 8192

    def __post_init__(self) -> None:
        _check_fields(self)


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A causal language model. Sizes are in elements, ``context_length`` in tokens."""

    vocab_size: int
    hidden_size: int
    mlp_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        _check_fields(self)
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} is odd; rotary embeddings need pairs")

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of ``to_dict``; raises ConfigError on unknown or missing keys."""
        scaling = values.get("rope_scaling") if isinstance(values, dict) else None
        if scaling is not None:
            values = values | {"rope_scaling": _build(RopeScaling, scaling)}
        return _build(cls, values)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """A bidirectional encoder that computes embeddings.

    ``max_tokens`` is the longest input that the model was trained for, which may be less than its
    ``num_positions``. A ``head_dim`` of 0 is replaced by ``hidden_size // num_heads``. With a
    ``rope_theta``, queries and keys are rotated by their positions; without one, a table of
    ``num_positions`` vectors is added to the tokens' embeddings. ``biases`` are those of linear
    layers.
    """

    vocab_size: int
    hidden_size: int
    mlp_size: int
    num_layers: int
    num_heads: int
    num_positions: int
    max_tokens: int
    head_dim: int = 0
    num_token_types: int = 2
    norm_eps: float = 1e-12
    rope_theta: float | None = None
    mlp: Literal["gelu", "swiglu"] = "gelu"
    biases: bool = True
    pooling: Literal["mean", "cls"] = "mean"
    normalize: bool = True

    def __post_init__(self) -> None:
        _check_fields(self)
        if not self.head_dim:
            if self.hidden_size % self.num_heads:
                raise ConfigError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_heads "
                    f"{self.num_heads}"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        if self.rope_theta and self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} is odd; rotary embeddings need pairs")

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of ``to_dict``; raises ConfigError on unknown or missing keys."""
        return _build(cls, values)


ModelConfig = DecoderConfig | EncoderConfig
_TOKEN_LENGTH = 16


@dataclass(frozen=True, slots=True)
class MeshShape:
    """The number of devices along each axis; with ``model`` None, all that ``data`` leaves."""

    data: int = 1
    model: int | None = None

    def __post_init__(self) -> None:
        for name, size in (("data", self.data), ("model", self.model)):
            if size is not None and size < 1:
                raise ConfigError(f"mesh has {name}={size}; it must be at least 1")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a shape such as ``data=1,model=8``; an axis that is not named keeps its default.

        Raises:
            ConfigError: the text has another form.
        """
        sizes: dict[str, int] = {}
        for part in filter(None, text.replace(" ", "").split(",")):
            name, _, size = part.partition("=")
            if name not in ("data", "model") or name in sizes or not size.isdecimal():
                raise ConfigError(f"mesh is {text!r}; write it as data=1,model=8")
            sizes[name] = int(size)
        return cls(**sizes)

    def over(self, num_devices: int) -> tuple[int, int]:
        """The sizes of both axes on ``num_devices`` devices.

        Raises:
            ConfigError: the shape needs more devices, or ``data`` does not divide their number.
        """
        model = self.model or num_devices // self.data
        if not model or self.data * model > num_devices:
            raise ConfigError(
                f"the mesh data={self.data},model={self.model or 1} needs "
                f"{self.data * max(model, 1)} devices and there are {num_devices}"
            )
        if self.model is None and num_devices % self.data:
            raise ConfigError(f"data={self.data} does not divide the {num_devices} devices")
        return self.data, model


@dataclass(frozen=True, kw_only=True)
class BatchSizes:
    """What the engine computes at once, and the shapes that this is compiled in.

    Attributes:
        slots: number of requests that run at once; each is a row of the decode batch.
        prefill_chunks: the sizes of the chunks for which prefill is compiled, ascending.
        row_buckets: the numbers of rows for which a decode step is compiled, ascending.
    """

    slots: int
    prefill_chunks: tuple[int, ...]
    row_buckets: tuple[int, ...]


CPU_SIZES = BatchSizes(
    slots=32,
    prefill_chunks=(32, 128, 256),
    row_buckets=(2, 4, 8, 16, 32, 64, 128, 256),
)
"""A row or a token more takes a CPU longer, so shapes are close together."""
ACCELERATOR_SIZES = BatchSizes(
    slots=256,
    prefill_chunks=(256, 1024, 2048),
    row_buckets=(4, 16, 64, 128, 256),
)
"""Up to about 256 rows, products take an accelerator as long as reading the weights. So few shapes
are enough, and a step with fewer tokens of prompts than that would be no faster."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a model is run. What is None is chosen for the device.

    Attributes:
        slots: number of requests that run at once; each is a row of the decode batch. None: 32 on
            CPUs and 256 elsewhere, divided evenly among the data-parallel ranks.
        max_len: maximum number of tokens (prompt and output) of a request; None: the model's
            context.
        page_len: number of tokens per KV page; None: 64 on TPUs, which read few large pages faster
            than many small ones, and 16 elsewhere.
        kv_tokens: size of the KV cache in tokens, shared by all requests; None: chosen by memory.
        prefill_chunks: the sizes of the chunks for which prefill is compiled, ascending. A step
            prefills at most one chunk, or as many of a shorter size as fit into the longest chunk's
            tokens. None: up to 256 tokens on CPUs and 2,048 elsewhere.
        itl_budget: milliseconds by which prefill may delay the next token of running requests; if
            decoding takes longer, prefill may take as long. A step that decodes prefills as many
            prompt tokens as fit by the times measured; others as many as the longest chunk has.
        dtype: type of the weights and matrix products; auto: bfloat16 where it is fast.
        kernels: implementation of attention, and on CPUs of matrix products; xla: the reference,
            native: the kernels for the device, auto: native where such kernels exist.
        quantization: quantization of the weights; int8 and fp8 have a scale for each output, none
            are of ``dtype``; auto: none, except that a CPU with native kernels, if dtype is auto,
            multiplies blocks of ggml's formats as the checkpoint has them, and rounds other
            matrices to blocks of 8 bits.
        kv_dtype: type of keys and values; int8 has a scale for each token and head, fp8 is E4M3
            without scales, in which larger numbers than 448 become 448; auto: bfloat16, except
            float32 if dtype is float32 and on a CPU without native kernels.
        speculation: drafts of the next tokens, which one step verifies; ngram: the tokens that
            followed an earlier occurrence of the newest tokens, model: those of the draft model,
            auto: either where it was measured to be faster, off: none.
        decode_steps: maximum number of decode steps that are dispatched together while no prompt
            waits, as far as they take no longer than half of ``itl_budget``. The tokens of all of
            them arrive at once, for the host's work of one. None: 1 on CPUs, where the host's part
            of a step is small, and 8 elsewhere.
        draft_tokens: maximum number of tokens of a draft.
        draft_rows: maximum number of rows of a step that verifies drafts; with more rows, matrix
            products would cost as much as reading the weights.
        max_logprobs: maximum number of alternatives that a request can ask for.
        max_logit_bias: maximum number of biased tokens of a request.
        step_seconds: a step that takes longer counts as hanging; the limit is at least ten times
            the slowest step measured at start.
        compilation_cache: folder that keeps compiled programs for the next start; None: off.
        mesh: how the devices are divided; by default, all of them along ``model``.
        row_buckets: the numbers of rows for which a decode step is compiled, ascending. None: the
            powers of two up to 256 on CPUs, and some of them elsewhere.
    """

    # Without ``repr``: compiled programs are found again by the sizes that these become.
    slots: int | None = field(default=None, repr=False)
    max_len: int | None = None
    page_len: int | None = None
    kv_tokens: int | None = None
    prefill_chunks: tuple[int, ...] | None = field(default=None, repr=False)
    # No program depends on a field without ``repr``; by the others a compiled one is found again.
    itl_budget: float = field(default=50.0, repr=False)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    kernels: Literal["auto", "xla", "native"] = "auto"
    quantization: Literal["auto", "none", "int8", "fp8"] = "auto"
    kv_dtype: Literal["auto", "float32", "bfloat16", "int8", "fp8"] = "auto"
    speculation: Literal["auto", "off", "ngram", "model"] = "auto"
    decode_steps: int | None = field(default=None, repr=False)
    draft_tokens: int = 5
    draft_rows: int = 4
    max_logprobs: int = 20
    max_logit_bias: int = 1024
    step_seconds: float = field(default=3.0, repr=False)
    compilation_cache: str | None = field(default=None, repr=False)
    # The mesh that it becomes is known with its devices.
    mesh: MeshShape = field(default_factory=MeshShape, repr=False)
    row_buckets: tuple[int, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("slots", "page_len", "max_logit_bias", "decode_steps", "draft_tokens"):
            if (getattr(self, name) or 1) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.itl_budget > 0:
            raise ConfigError(f"itl_budget is {self.itl_budget}; it must be above 0")
        if not self.step_seconds > 0:
            raise ConfigError(f"step_seconds is {self.step_seconds}; it must be above 0")
        for name in ("prefill_chunks", "row_buckets"):
            sizes = getattr(self, name)
            if sizes is not None and (not sizes or list(sizes) != sorted({*sizes})):
                raise ConfigError(f"{name} {sizes} must be rising sizes")
        most = max(self.row_buckets or CPU_SIZES.row_buckets) * self.mesh.data
        if (self.slots or 1) > most:
            raise ConfigError(f"slots is {self.slots}; the most is {most}")
        if self.max_len is not None and self.max_len < 2:
            raise ConfigError(f"max_len is {self.max_len}; it must be at least 2")

    def batch_sizes(self, platform: str) -> BatchSizes:
        """The sizes on devices of a platform, which JAX calls ``cpu``, ``gpu`` or ``tpu``."""
        usual = CPU_SIZES if platform == "cpu" else ACCELERATOR_SIZES
        buckets, ranks = self.row_buckets or usual.row_buckets, self.mesh.data
        return BatchSizes(
            slots=self.slots or max(1, min(usual.slots // ranks, buckets[-1])) * ranks,
            prefill_chunks=self.prefill_chunks or usual.prefill_chunks,
            row_buckets=buckets,
        )


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """The processes that run one model together, usually one on each host.

    Attributes:
        token: a secret shared by all processes; a process without it cannot join.
        coordinator: ``host:port`` of process 0, where the others find it; None: JAX detects the
            address and the numbers itself (on TPU slices, in Slurm, Open MPI and Kubernetes'
            indexed jobs).
        num_processes: number of processes; required with a coordinator.
        process_id: number of this process, from 0, which is the leader; required with a
            coordinator.
        join_seconds: maximum time to wait for the others to start.
        connect_seconds: maximum time to connect to the others after all have started.
        load_seconds: maximum time to wait for others that load or compile.
        beat_seconds: time between two heartbeats.
        lost_seconds: a process is lost if no heartbeat arrives for this long.
        end_seconds: maximum time for the others to end.
    """

    token: str = field(repr=False)
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    join_seconds: float = 600.0
    connect_seconds: float = 30.0
    load_seconds: float = 3600.0
    beat_seconds: float = 1.0
    lost_seconds: float = 10.0
    end_seconds: float = 10.0

    def __post_init__(self) -> None:
        if len(self.token) < _TOKEN_LENGTH:
            raise ConfigError(f"the job's token must have at least {_TOKEN_LENGTH} characters")
        if self.coordinator is None:
            return
        host, _, port = self.coordinator.rpartition(":")
        if not (host and port.isdecimal() and 0 < int(port) < 2**16):
            raise ConfigError(f"coordinator is {self.coordinator!r}; write it as host:port")
        if self.num_processes is None or self.process_id is None:
            raise ConfigError("a job with a coordinator needs num_processes and process_id")
        if not 0 <= self.process_id < self.num_processes or self.num_processes < 2:
            raise ConfigError(
                f"process_id is {self.process_id} and num_processes {self.num_processes}; there "
                "must be at least 2, with numbers from 0"
            )


@dataclass(frozen=True, kw_only=True)
class HandoverConfig:
    """How an engine computes prompts for others, or has others compute its own.

    Attributes:
        token: a secret shared by all of them.
        listen: ``host:port`` where this engine computes prompts for others; None: nowhere.
        servers: ``host:port`` of the engines that compute the prompts of this one; empty: it
            computes them itself. Either this or ``listen``.
    """

    token: str = field(repr=False)
    listen: str | None = None
    servers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.token) < _TOKEN_LENGTH:
            raise ConfigError(f"the token must have at least {_TOKEN_LENGTH} characters")
        if (self.listen is None) == (not self.servers):
            raise ConfigError(
                "an engine either computes prompts for others or has others compute its own; "
                "give one address to listen at, or those of other engines"
            )
        for address in (self.listen, *self.servers):
            if address is not None:
                self.address(address)

    @staticmethod
    def address(text: str) -> tuple[str, int]:
        """Host and port.

        Raises:
            ConfigError: the text has another form.
        """
        host, _, port = text.rpartition(":")
        if not (host and port.isdecimal() and 0 < int(port) < 2**16):
            raise ConfigError(f"an address is {text!r}; write it as host:port")
        return host.strip("[]"), int(port)


def _build(cls: type[Any], values: Any) -> Any:
    """Return ``cls(**values)``; raises a ConfigError that names unknown or missing keys."""
    if not isinstance(values, dict):
        raise ConfigError(f"{cls.__name__} is {shown(values)}; it must be an object")
    known = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(values.keys() - known.keys()):
        raise ConfigError(f"unknown keys in {cls.__name__}: {shown(', '.join(unknown))}")
    required = {n for n, f in known.items() if f.default is dataclasses.MISSING}
    if missing := sorted(required - values.keys()):
        raise ConfigError(f"missing keys in {cls.__name__}: {', '.join(missing)}")
    return cls(**values)


def _check_fields(config: Any) -> None:
    """Raise ConfigError unless every field of a configuration has its type and is in bounds."""
    for each in dataclasses.fields(config):
        value, wanted = getattr(config, each.name), ""
        if each.type is int:
            least, most = 0 if each.default == 0 else 1, _MAX_SIZES[each.name]
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                wanted = f"an integer from {least} to {most}"
        elif each.type is float or (each.type == float | None and value is not None):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 < value < math.inf:
                wanted = "a number above 0"
        elif each.type is bool:
            wanted = "" if isinstance(value, bool) else "true or false"
        elif get_origin(each.type) is Literal and value not in (known := get_args(each.type)):
            wanted = " or ".join(known)
        if wanted:
            raise ConfigError(f"{each.name} is {shown(value)}; it must be {wanted}")
