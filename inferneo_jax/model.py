"""From a checkpoint folder to a model that serves: weights, compiled steps, tokenizer."""

import dataclasses
import filecmp
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from inferneo_jax import models
from inferneo_jax.config import (
    DecoderConfig,
    EncoderConfig,
    EngineConfig,
    HandoverConfig,
    MeshShape,
)
from inferneo_jax.distributed.job import Job
from inferneo_jax.distributed.process_group import agree
from inferneo_jax.engine.embedder import Embedder
from inferneo_jax.engine.engine import Engine
from inferneo_jax.engine.follower import follow
from inferneo_jax.engine.handover import hand_over
from inferneo_jax.engine.served import EmbeddingModel, GenerationEngine, LanguageModel, Model
from inferneo_jax.errors import ConfigError
from inferneo_jax.kernels.cpu.build import start_building
from inferneo_jax.platform import compiles
from inferneo_jax.platform.flags import set_flags
from inferneo_jax.platform.memory import oom_as_config_error, require
from inferneo_jax.platform.progress import Progress, silent
from inferneo_jax.runner.backends import (
    DecoderBackend,
    EncoderBackend,
    resolve_decoder,
    resolve_encoder,
)
from inferneo_jax.runner.capacity import devices_sharing_memory
from inferneo_jax.runner.model_info import ModelInfo
from inferneo_jax.runner.runner import Runner
from inferneo_jax.sharding.mesh import make_mesh
from inferneo_jax.text.grammar import GrammarCompiler
from inferneo_jax.text.tokenizer import Tokenizer
from inferneo_jax.version import __version__
from inferneo_jax.weights.checkpoint import CheckpointInfo, fingerprint, open_weights, read_info
from inferneo_jax.weights.placement import flat, local_bytes, place_weights, weight_shapes
from inferneo_jax.weights.sources.weight import Weight, block_formats

log = logging.getLogger(__name__)


def load_model(
    path: Path,
    config: EngineConfig,
    *,
    name: str,
    progress: Progress | None = None,
    job: Job | None = None,
    draft: Path | None = None,
    handover: HandoverConfig | None = None,
) -> Model:
    """Load a converted checkpoint and compile all its steps. Blocks, for seconds to minutes.

    In a job of several processes, which this one leads and has joined, a language model runs on
    the devices of all of them; an embedding model on this process's own.

    Args:
        path: of the checkpoint.
        config: of the engine.
        name: under which the model is served.
        progress: called with how far loading is.
        job: of several processes.
        draft: the checkpoint of a smaller model with the same vocabulary, which drafts what a
            language model verifies; None: there is none. An embedding model has no use for it.
        handover: whether a language model computes prompts for others, or has others compute its
            own; None: neither.

    Raises:
        CheckpointError: the folder holds no usable model.
        ConfigError: the model does not fit the configuration.
        JobError: another process is lost, or has another model or configuration.
    """
    set_flags()
    if config.kernels != "xla" and jax.default_backend() == "cpu":
        start_building()  # seconds, at the first start on a machine
    checkpoint = read_info(path)
    common: Any = {"name": name, "created": checkpoint.created}
    with compiles.expected(), ThreadPoolExecutor(1, "tokenizer") as pool:
        tokenizer = pool.submit(Tokenizer.from_directory, path)
        if isinstance(checkpoint.config, EncoderConfig):
            embedder, info = _load_embedder(checkpoint, checkpoint.config, config, progress)
            common |= {"tokenizer": tokenizer.result(), "info": info}
            return EmbeddingModel(**common, embedder=embedder, max_len=embedder.max_tokens)
        runner = load_runner(checkpoint, config, progress, job, draft)
        common["tokenizer"] = tokenizer.result()
    info = runner.info()  # before a step takes the cache along
    if draft:
        info = dataclasses.replace(info, draft_model=draft.name)
    grammars = GrammarCompiler(common["tokenizer"], runner.mask_words)
    engine = Engine(runner, grammars)
    if job:
        job.on_lost(engine.fail)
    serving: GenerationEngine = engine
    if handover:
        identity = {"version": __version__, "checkpoint": fingerprint(checkpoint)}
        serving = hand_over(engine, handover, identity)
    compiling = threading.Thread(
        target=runner.compile_rest, args=[engine.ended], name="compile", daemon=True
    )
    compiling.start()
    return LanguageModel(
        **common,
        engine=serving,
        grammars=grammars,
        max_len=runner.max_len,
        info=info,
        compiling=compiling,
    )


def _load_embedder(
    checkpoint: CheckpointInfo,
    model: EncoderConfig,
    config: EngineConfig,
    progress: Progress | None,
) -> tuple[Embedder, ModelInfo]:
    """An embedder that runs, on the devices of this process alone."""
    # A small model: where there are several hosts, the devices of this one are plenty.
    shape = config.mesh if jax.process_count() == 1 else MeshShape()
    mesh = make_mesh(shape, jax.local_devices())
    backend = resolve_encoder(model, config, mesh)
    weights = load_weights(_open(checkpoint), backend, progress or silent)
    embedder = Embedder(backend, weights, config)
    with oom_as_config_error("the batches were compiled and first run"):
        embedder.start(progress)
    return embedder, ModelInfo.of(backend, weights)


def follow_model(
    path: Path,
    config: EngineConfig,
    job: Job,
    progress: Progress | None = None,
    draft: Path | None = None,
) -> bool:
    """Run a language model's steps for the job's leader, until it ends the job in order.

    Returns:
        False, at once: it is an embedding model, which the leader has to itself.

    Raises:
        CheckpointError: the folder holds no usable model.
        ConfigError: the model does not fit the configuration.
        JobError: the leader is lost, or has another model or configuration.
    """
    info = read_info(path)
    if isinstance(info.config, EncoderConfig):
        return False
    with compiles.expected():
        runner = load_runner(info, config, progress, job, draft)
    log.info("following")
    follow(runner, job.processes)
    return True


def load_runner(
    info: CheckpointInfo,
    config: EngineConfig,
    progress: Progress | None,
    job: Job | None = None,
    draft: Path | None = None,
) -> Runner:
    """A language model's weights and compiled steps, on the devices of all processes.

    So is the model that drafts, whose checkpoint is the folder ``draft``.
    """
    assert isinstance(info.config, DecoderConfig)
    mesh = make_mesh(config.mesh)
    drafter = _draft_info(info, config, draft)
    if job:
        job.take(info.path.name)
        agree(job.processes, "model", _identity(info, drafter, config, mesh))
    stored, backend = _open_decoder(info, config, mesh)
    draft_stored, draft_backend = _open_decoder(drafter, config, mesh) if drafter else (None, None)
    runner = Runner(backend, config, job.processes if job else None, draft_backend)
    with oom_as_config_error("the steps were compiled and first run"):
        # Programs depend on shapes alone: they are compiled while the weights are read.
        with _beside(runner.compile, progress) as compiled:
            weights = load_weights(stored, backend, progress or silent)
            draft_weights: list[jax.Array] = []
            if draft_stored and draft_backend:
                draft_weights = load_weights(draft_stored, draft_backend, progress or silent)
            runner.place(weights, draft_weights)
            compiled()
        runner.warm_up()
    return runner


@contextmanager
def _beside(
    compile_all: Callable[[Progress], None], progress: Progress | None
) -> Iterator[Callable[[], None]]:
    """Compile in another thread while the block runs; gives a function that waits for the end.

    Progress is reported while that is waited for. If the block raises, what is not begun is left.
    """
    waiting, left = threading.Event(), threading.Event()

    def report(stage: str, done: int, total: int) -> None:
        if left.is_set():
            raise CancelledError
        if progress and waiting.is_set():
            progress(stage, done, total)

    def run() -> None:
        with compiles.expected():
            compile_all(report)

    with ThreadPoolExecutor(1, "compile") as pool:
        running = pool.submit(run)

        def wait() -> None:
            waiting.set()
            running.result()

        try:
            yield wait
        except BaseException:
            left.set()
            raise


def _draft_info(
    info: CheckpointInfo, config: EngineConfig, draft: Path | None
) -> CheckpointInfo | None:
    """The checkpoint of the model that drafts; None: there is none.

    Raises:
        ConfigError: the configuration has no use for it or needs one, or its vocabulary is another.
    """
    if draft is None:
        if config.speculation == "model":
            raise ConfigError("speculation is model, which needs a draft_model; name one")
        return None
    if config.speculation not in ("auto", "model"):
        raise ConfigError(
            f"draft_model is {draft.name}, but speculation is {config.speculation}, which does not "
            "use it; it must be auto or model"
        )
    found = read_info(draft)
    if not isinstance(found.config, DecoderConfig):
        raise ConfigError(f"draft_model is {draft.name}, which makes embeddings and no text")
    one, other = info.path / "tokenizer.json", draft / "tokenizer.json"
    if one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False):
        return found  # compared in milliseconds, where a tokenizer takes a second to read
    ours, theirs = Tokenizer.from_directory(info.path), Tokenizer.from_directory(draft)
    if difference := ours.difference(theirs):
        raise ConfigError(
            f"draft_model is {draft.name}, whose vocabulary is not that of {info.path.name}: "
            f"{difference}; take a smaller model of the same family"
        )
    return found


def _identity(
    info: CheckpointInfo, draft: CheckpointInfo | None, config: EngineConfig, mesh: Mesh
) -> dict[str, object]:
    """What all processes of a job must have in common; folders they may have of their own."""
    idle = set(range(jax.process_count())) - {device.process_index for device in mesh.devices.flat}
    if idle:
        raise ConfigError(
            f"the mesh {dict(mesh.shape)} has no device of the processes {sorted(idle)}; it must "
            f"have some of each: there are {jax.device_count()}"
        )
    settings = dataclasses.asdict(config)
    return {
        "model": info.path.name,
        "checkpoint": fingerprint(info),
        "draft_model": draft and fingerprint(draft),
        "mesh": {str(axis): int(size) for axis, size in mesh.shape.items()},
        **{
            name: settings[name] for name in sorted(settings.keys() - {"compilation_cache", "mesh"})
        },
    }


def _open_decoder(
    info: CheckpointInfo, config: EngineConfig, mesh: Mesh
) -> tuple[Mapping[str, Weight], DecoderBackend]:
    """The weights of a language model, none of them read, and how it runs."""
    assert isinstance(info.config, DecoderConfig)
    stored = _open(info)
    return stored, resolve_decoder(info.config, config, mesh, block_formats(stored))


def _open(info: CheckpointInfo) -> Mapping[str, Weight]:
    """The weights of a checkpoint, none of them read."""
    shapes = {name: spec.shape for name, spec in models.weight_specs(info.config).items()}
    return open_weights(info.path, shapes)


def load_weights(
    weights: Mapping[str, Weight],
    backend: DecoderBackend | EncoderBackend,
    progress: Progress = silent,
) -> list[jax.Array]:
    """Read, encode and place the weights of a model.

    Raises:
        CheckpointError: they cannot be read.
        ConfigError: there is not enough memory for them.
    """
    mesh, quantization = backend.mesh, backend.quantization
    needed = local_bytes(flat(weight_shapes(backend.padded, mesh, quantization)))
    require(needed * devices_sharing_memory(mesh), "the weights")
    with oom_as_config_error("the weights were loaded"):
        return place_weights(weights, backend.model, backend.padded, mesh, quantization, progress)
