"""Inferneo-JAX: an inference engine for language and embedding models on JAX.

Names are loaded on first use, so that importing this package costs nothing and touches no device.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from inferneo_jax.version import __version__

if TYPE_CHECKING:
    from inferneo_jax.config import (
        DecoderConfig,
        EncoderConfig,
        EngineConfig,
        HandoverConfig,
        JobConfig,
        MeshShape,
    )
    from inferneo_jax.distributed.job import Job
    from inferneo_jax.engine.embedder import Embedder
    from inferneo_jax.engine.engine import Engine
    from inferneo_jax.engine.remote import EngineProcess
    from inferneo_jax.engine.served import (
        EmbeddingModel,
        GenerationEngine,
        LanguageModel,
        Model,
    )
    from inferneo_jax.errors import (
        CheckpointError,
        ConfigError,
        ConstraintError,
        ContextLengthError,
        EngineError,
        EngineFailedError,
        EngineStoppedError,
        FetchError,
        InferneoError,
        JobError,
        OverloadedError,
        RequestError,
        TemplateError,
        TokenizerError,
        WeightsError,
    )
    from inferneo_jax.model import follow_model, load_model
    from inferneo_jax.platform.flags import expected_platform
    from inferneo_jax.platform.memory import malloc_trim
    from inferneo_jax.request import (
        Constraint,
        EngineStats,
        GenerationOutput,
        GenerationRequest,
        SamplingParams,
        TokenLogprob,
    )
    from inferneo_jax.runner.model_info import DeviceMemory, ModelInfo, device_memory
    from inferneo_jax.text.detokenize import IncrementalDecoder
    from inferneo_jax.text.grammar import (
        GrammarCompiler,
        choice_constraint,
        gbnf_constraint,
        json_object_constraint,
        json_rule,
        json_schema_constraint,
        lark_constraint,
        regex_constraint,
    )
    from inferneo_jax.text.stops import StopMatcher
    from inferneo_jax.text.tokenizer import Tokenizer
    from inferneo_jax.weights.catalog import (
        checkpoint_path,
        default_checkpoints_dir,
        load_catalog,
    )
    from inferneo_jax.weights.convert import describe
    from inferneo_jax.weights.fetch import Offer, pull

_HOMES = {
    "config": (
        "DecoderConfig",
        "EncoderConfig",
        "EngineConfig",
        "HandoverConfig",
        "JobConfig",
        "MeshShape",
    ),
    "text.detokenize": ("IncrementalDecoder",),
    "engine.embedder": ("Embedder",),
    "engine.engine": ("Engine",),
    "engine.remote": ("EngineProcess",),
    "engine.served": ("EmbeddingModel", "GenerationEngine", "LanguageModel", "Model"),
    "errors": (
        "CheckpointError",
        "ConfigError",
        "ConstraintError",
        "ContextLengthError",
        "EngineError",
        "EngineFailedError",
        "EngineStoppedError",
        "FetchError",
        "InferneoError",
        "JobError",
        "OverloadedError",
        "RequestError",
        "TemplateError",
        "TokenizerError",
        "WeightsError",
    ),
    "runner.model_info": ("DeviceMemory", "ModelInfo", "device_memory"),
    "distributed.job": ("Job",),
    "platform.flags": ("expected_platform",),
    "platform.memory": ("malloc_trim",),
    "model": ("follow_model", "load_model"),
    "request": (
        "Constraint",
        "EngineStats",
        "GenerationOutput",
        "GenerationRequest",
        "SamplingParams",
        "TokenLogprob",
    ),
    "text.grammar": (
        "GrammarCompiler",
        "choice_constraint",
        "gbnf_constraint",
        "json_object_constraint",
        "json_rule",
        "json_schema_constraint",
        "lark_constraint",
        "regex_constraint",
    ),
    "text.stops": ("StopMatcher",),
    "text.tokenizer": ("Tokenizer",),
    "weights.catalog": ("checkpoint_path", "default_checkpoints_dir", "load_catalog"),
    "weights.convert": ("describe",),
    "weights.fetch": ("Offer", "pull"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "CheckpointError",
    "ConfigError",
    "Constraint",
    "ConstraintError",
    "ContextLengthError",
    "DecoderConfig",
    "DeviceMemory",
    "Embedder",
    "EmbeddingModel",
    "EncoderConfig",
    "Engine",
    "EngineConfig",
    "EngineError",
    "EngineFailedError",
    "EngineProcess",
    "EngineStats",
    "EngineStoppedError",
    "FetchError",
    "GenerationEngine",
    "GenerationOutput",
    "GenerationRequest",
    "GrammarCompiler",
    "HandoverConfig",
    "IncrementalDecoder",
    "InferneoError",
    "Job",
    "JobConfig",
    "JobError",
    "LanguageModel",
    "MeshShape",
    "Model",
    "ModelInfo",
    "Offer",
    "OverloadedError",
    "RequestError",
    "SamplingParams",
    "StopMatcher",
    "TemplateError",
    "TokenLogprob",
    "Tokenizer",
    "TokenizerError",
    "WeightsError",
    "__version__",
    "checkpoint_path",
    "choice_constraint",
    "default_checkpoints_dir",
    "describe",
    "device_memory",
    "expected_platform",
    "follow_model",
    "gbnf_constraint",
    "json_object_constraint",
    "json_rule",
    "json_schema_constraint",
    "lark_constraint",
    "load_catalog",
    "load_model",
    "malloc_trim",
    "pull",
    "regex_constraint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value
