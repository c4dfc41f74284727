"""Gauges whose values other parts of the server hold, read whenever ``GET /metrics`` is scraped."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from inferneo_jax import EngineStats, __version__

if TYPE_CHECKING:
    from inferneo_jax import Model

MODEL = "model_name"
"""The label of every metric of one model."""

_GAUGES: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "vllm:num_requests_running": ("Requests that hold a slot.", lambda s: s.running),
    "vllm:num_requests_waiting": ("Requests that wait for a slot.", lambda s: s.waiting),
    "vllm:kv_cache_usage_perc": (
        "The part of the KV cache's pages that requests hold, from 0 to 1.",
        lambda s: s.pages_used / max(1, s.pages),
    ),
    "inferneo_slots": ("Requests that can run at once.", lambda s: s.slots),
    "inferneo_kv_cache_pages": ("Pages of the KV cache.", lambda s: s.pages),
    "inferneo_kv_cache_page_tokens": ("Tokens that a page holds.", lambda s: s.page_len),
    "inferneo_kv_cache_pages_cached": (
        "Pages that no request holds and that wait for one with the same prefix.",
        lambda s: s.pages_cached,
    ),
    "inferneo_itl_budget_seconds": (
        "How long prefill may delay the next token of requests that are generating.",
        lambda s: s.itl_budget,
    ),
    "inferneo_prefill_allowance_tokens": (
        "Prompt tokens that a step prefills at most now while requests are generating.",
        lambda s: s.prefill_allowance,
    ),
    "inferneo_engine_ready": ("1 while the engine takes requests, else 0.", lambda s: s.ready),
}
_COUNTERS: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "vllm:generation_tokens": ("Tokens that were generated.", lambda s: s.output_tokens),
    "vllm:num_preemptions": (
        "Times that a request gave up its pages to another.",
        lambda s: s.preemptions,
    ),
    "inferneo_prefill_tokens": (
        "Prompt tokens that were computed, not found in the prefix cache.",
        lambda s: s.prompt_tokens,
    ),
    "inferneo_engine_steps": ("Steps of the engine.", lambda s: s.steps),
    "inferneo_compiles_after_ready": (
        "Programs compiled while requests waited; there should be none.",
        lambda s: s.compiles_after_ready,
    ),
}
_DRAFTS: dict[str, tuple[str, dict[str, Callable[[EngineStats], float]]]] = {
    "vllm:spec_decode_num_draft_tokens": (
        "Tokens that were drafted, by looking them up (ngram) or by the draft model (model).",
        {
            "ngram": lambda s: s.drafted_tokens - s.model_drafted_tokens,
            "model": lambda s: s.model_drafted_tokens,
        },
    ),
    "vllm:spec_decode_num_accepted_tokens": (
        "Drafted tokens that the model would have chosen too, by who drafted them.",
        {
            "ngram": lambda s: s.accepted_tokens - s.model_accepted_tokens,
            "model": lambda s: s.model_accepted_tokens,
        },
    ),
}
"""Counters with a series for each method of drafting."""

_CACHE_CONFIG: dict[str, Callable[[EngineStats], int]] = {
    "block_size": lambda s: s.page_len,
    "num_gpu_blocks": lambda s: s.pages,
}
"""Labels from which a router learns how large a prefix cache is and where it cuts prompts."""

_INFO = ("dtype", "quantization", "kv_dtype", "kernels", "mesh", "device", "draft_model")
_OF_MODELS: dict[str, tuple[str, Callable[["Model"], float]]] = {
    "inferneo_max_model_len_tokens": (
        "The longest sequence: prompt and output, or a text to be embedded.",
        lambda m: m.max_len,
    ),
    "inferneo_model_weights_bytes": (
        "What this process's devices hold of the weights.",
        lambda m: m.info.weight_bytes,
    ),
    "inferneo_kv_cache_bytes": (
        "What this process's devices hold of the KV cache.",
        lambda m: m.info.cache_bytes,
    ),
}


@dataclass(frozen=True, kw_only=True)
class ServerState:
    """What the gauges of a server show at one moment.

    Attributes:
        models: those that are loaded.
        permits: sequences that may run or wait at once.
        permits_in_use: sequences that run or wait.
        identified_sockets: open WebSockets whose client is known.
        unidentified_sockets: open WebSockets whose client has yet to send its key.
    """

    models: Sequence["Model"] = ()
    permits: int = 0
    permits_in_use: int = 0
    identified_sockets: int = 0
    unidentified_sockets: int = 0


class StateCollector(Collector):
    """The state of the server, its models and their devices, read for each scrape."""

    def __init__(self, read: Callable[[], ServerState]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        """All metric families, each once; a family without a source has no series."""
        build = GaugeMetricFamily("inferneo_build_info", "Always 1.", labels=["version"])
        build.add_metric([__version__], 1)
        yield build
        state = self._read()
        for name, words, value in (
            ("places", "Sequences that may run or wait at once.", state.permits),
            ("places_used", "Sequences that run or wait.", state.permits_in_use),
        ):
            yield GaugeMetricFamily(f"inferneo_request_{name}", words, value=value)
        sockets = GaugeMetricFamily(
            "inferneo_websockets_open", "WebSockets that are open now.", labels=["state"]
        )
        sockets.add_metric(["identified"], state.identified_sockets)
        sockets.add_metric(["unidentified"], state.unidentified_sockets)
        yield sockets
        yield from _of_models(state.models)
        yield from _of_engines(state.models)
        yield from _of_devices(state.models)

    def describe(self) -> Iterator[Metric]:
        """Nothing, so that registering does not query the engines."""
        return iter(())


def _of_models(models: Sequence["Model"]) -> Iterator[Metric]:
    info = GaugeMetricFamily("inferneo_model_info", "Always 1.", labels=[MODEL, "kind", *_INFO])
    for model in models:
        values = (getattr(model.info, name) for name in _INFO)
        info.add_metric([model.name, model.kind, *values], 1)
    yield info
    for name, (words, read) in _OF_MODELS.items():
        metric = GaugeMetricFamily(name, words, labels=[MODEL])
        for model in models:
            metric.add_metric([model.name], float(read(model)))
        yield metric


def _of_engines(models: Sequence["Model"]) -> Iterator[Metric]:
    stats = {model.name: found for model in models if (found := model.stats())}
    for family, figures in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
        for name, (words, read) in figures.items():
            metric = family(name, words, labels=[MODEL])
            for model, found in stats.items():
                metric.add_metric([model], float(read(found)))
            yield metric
    for name, (words, methods) in _DRAFTS.items():
        counter = CounterMetricFamily(name, words, labels=[MODEL, "method"])
        for model, found in stats.items():
            for method, read in methods.items():
                counter.add_metric([model, method], float(read(found)))
        yield counter
    cache = GaugeMetricFamily(
        "vllm:cache_config_info",
        "Always 1; the labels are the tokens of a page and the number of pages.",
        labels=[MODEL, *_CACHE_CONFIG],
    )
    for model, found in stats.items():
        cache.add_metric([model, *(str(read(found)) for read in _CACHE_CONFIG.values())], 1)
    yield cache


def _of_devices(models: Sequence["Model"]) -> Iterator[Metric]:
    used = GaugeMetricFamily(
        "inferneo_device_memory_used_bytes", "Allocated on an accelerator.", labels=["device"]
    )
    limit = GaugeMetricFamily(
        "inferneo_device_memory_limit_bytes", "What can be allocated there.", labels=["device"]
    )
    found = {memory.device: memory for model in models for memory in model.device_memory()}
    for memory in found.values():
        used.add_metric([memory.device], memory.used)
        limit.add_metric([memory.device], memory.limit)
    yield from (used, limit)
