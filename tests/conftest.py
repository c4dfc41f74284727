"""Strictness for every test, and the models that tests share."""

import os
import tempfile

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
# Servers under test must not find the API keys of whoever runs the tests.
_DATA = tempfile.TemporaryDirectory()
os.environ["XDG_DATA_HOME"] = _DATA.name

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook
from xdist.scheduler import LoadFileScheduling

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
for _package in ("layers", "models", "engine.embedder"):
    install_import_hook(f"inferneo_jax.{_package}", "beartype.beartype")

from inferneo_jax.config import EngineConfig
from inferneo_jax.engine.embedder import Embedder
from inferneo_jax.engine.engine import Engine
from inferneo_jax.engine.served import EmbeddingModel, LanguageModel
from inferneo_jax.model import load_model
from inferneo_jax.runner.runner import Runner
from inferneo_jax.text.grammar import GrammarCompiler
from inferneo_jax.weights.catalog import default_checkpoints_dir
from inferneo_jax.weights.fetch import pull
from tests.support.fixtures import rig, shared_rig, tokenizer
from tests.support.machine_speed import Machine
from tests.support.model_files import made
from tests.support.paths import COMPILED, ROOT
from tests.support.server_process import CHAT_MODEL, EMBEDDING_MODEL, real_server
from tests.support.tiny_model import (
    NATIVE,
    NATIVE_ENGINE,
    ONE_DEVICE,
    TINY,
    TINY_ENGINE,
    compiled,
    make_runner,
)

__all__ = ["made", "rig", "shared_rig", "tokenizer"]

# A machine that does other things too is no fault of the code.
hypothesis.settings.register_profile("any time", deadline=None)
hypothesis.settings.load_profile("any time")


REAL_SERVER = (
    "tests/api/test_api_real.py",
    "tests/docs/test_docs_examples.py",
    "tests/web/test_chat_real.py",
)
"""Files whose tests share a server of the real models: one worker takes them all and starts it."""
LONG = (
    *REAL_SERVER,
    "tests/runner/test_start.py",
    "tests/sharding/test_meshes.py",
    "tests/scheduler/test_draft_model.py",
    "tests/models/test_real_models.py",
    "tests/scheduler/test_decode_steps.py",
    "tests/process/test_engine_process.py",
    "tests/runner/test_executables.py",
    "tests/kernels/test_kernels_gpu_hopper.py",
    "tests/engine/test_engine.py",
    "tests/models/test_block_formats.py",
    "tests/kernels/test_kernels_cpu_emulated.py",
    "tests/kernels/test_kernels_tpu.py",
    "tests/docs/test_notebooks.py",
    "tests/distributed/test_multihost.py",
    "tests/web/test_page_hostile.py",
    "tests/planner/test_plan.py",
    "tests/text/test_template_fuzz.py",
    "tests/weights/test_hostile_fuzz.py",
)
"""Files that take longest; workers get them first, so that none is left alone with one."""
assert all((ROOT / file).exists() for file in LONG)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {file: number for number, file in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.nodeid.split("::")[0], len(LONG)))


class Scheduling(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "the real server" if file in REAL_SERVER else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling | None:
    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture
def machine() -> Iterator[Machine]:
    """Says how long something may take on this machine, busy as it is during the test."""
    with Machine() as made:
        yield made


@pytest.fixture(scope="session")
def real_checkpoints() -> Path:
    """The folder of converted checkpoints, with both models of the catalog in it."""
    folder = Path(os.environ.get("INFERNEO_CHECKPOINTS") or default_checkpoints_dir())
    for name in (CHAT_MODEL, EMBEDDING_MODEL):
        pull(name, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_runner() -> Callable[..., Runner]:
    """Compiled runners of a tiny random model, one for each engine configuration."""
    made: dict[EngineConfig, Runner] = {}

    def make(**changes: object) -> Runner:
        # Programs are found again by what is asked for: "auto", which is the same, would be others.
        kernels = {"kernels": "xla"} | changes
        native = kernels["kernels"] == "native"
        config = dataclasses.replace(NATIVE_ENGINE if native else TINY_ENGINE, **kernels)
        if config not in made:
            model = NATIVE if native else TINY
            made[config] = compiled(make_runner(config, model))
        return made[config]

    return make


@pytest.fixture
def tiny_engine(tiny_runner: Callable[..., Runner]) -> Iterator[Callable[..., Engine]]:
    """Engines on the tiny model; each must end with every slot and page free."""
    engines: list[Engine] = []

    def make(grammars: GrammarCompiler | None = None, **changes: object) -> Engine:
        engines.append(Engine(tiny_runner(**changes), grammars))
        return engines[-1]

    yield make
    for engine in engines:
        engine.stop()
        stats = engine.stats()
        assert (stats.slots_used, stats.pages_used, stats.waiting) == (0, 0, 0)


@pytest.fixture(scope="session")
def real_model(real_checkpoints: Path) -> Iterator[LanguageModel]:
    """The catalog's chat model with reference numerics."""
    config = EngineConfig(
        slots=16,
        prefill_chunks=(32, 128),
        dtype="float32",
        quantization="none",
        kernels="xla",
        row_buckets=(2, 16),
        speculation="off",
        mesh=ONE_DEVICE,
        compilation_cache=str(COMPILED),
    )
    model = load_model(real_checkpoints / CHAT_MODEL, config, name=CHAT_MODEL)
    assert isinstance(model, LanguageModel)
    yield model
    model.stop()
    stats = model.engine.stats()
    assert (stats.slots_used, stats.pages_used) == (0, 0)


@pytest.fixture(scope="session")
def real_embedder(real_checkpoints: Path) -> Iterator[Embedder]:
    """The catalog's embedding model with reference numerics."""
    config = EngineConfig(
        dtype="float32",
        quantization="none",
        kernels="xla",
        mesh=ONE_DEVICE,
        compilation_cache=str(COMPILED),
    )
    model = load_model(real_checkpoints / EMBEDDING_MODEL, config, name=EMBEDDING_MODEL)
    assert isinstance(model, EmbeddingModel)
    yield model.embedder
    model.stop()


@pytest.fixture(scope="session")
def address(real_checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``host:port`` of a server of both real models, for all tests that only send requests."""
    with real_server(real_checkpoints, tmp_path_factory.mktemp("server") / "log") as found:
        yield found
