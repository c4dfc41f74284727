"""Programs that are compiled ahead: a start elsewhere loads all of them, or says what differs."""

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import pytest
from typer.testing import CliRunner

from inferneo_jax.config import DecoderConfig, EncoderConfig, EngineConfig, MeshShape
from inferneo_jax.engine.embedder import Embedder
from inferneo_jax.engine.served import LanguageModel
from inferneo_jax.errors import ConfigError
from inferneo_jax.model import load_model
from inferneo_jax.planner import ahead
from inferneo_jax.planner.ahead import ModelShape, compile_ahead
from inferneo_jax.planner.chips import CHIPS, Topology
from inferneo_jax.platform.trusted import distrust
from inferneo_jax.runner.backends import resolve_decoder, resolve_encoder
from inferneo_jax.runner.manifest import Manifest, compiled_ahead, manifests
from inferneo_jax.runner.programs import Programs
from inferneo_jax.runner.runner import Runner
from inferneo_jax.sharding.mesh import make_mesh
from inferneo_jax.weights.convert import describe
from inferneo_jax.weights.placement import flat, weight_shapes
from server.cli.main import app
from tests.support.model_files import LLAMA, random_tensors, write_gguf
from tests.support.paths import COMPILED, ROOT
from tests.support.tiny_model import GREEDY, ONE_DEVICE, TINY, TINY_ENGINE, submit

PROMPT = (5, 70, 3, 18, 9)
ENGINE = dataclasses.replace(
    TINY_ENGINE, kv_tokens=None, row_buckets=(2, 4), prefill_chunks=(8,), compilation_cache=None
)
COMPILES = """
import json, sys
from pathlib import Path
from tests.planner.test_ahead import ENGINE, shape_of
from inferneo_jax.planner.ahead import compile_ahead
checkpoint, folder = map(Path, sys.argv[1:])
made = compile_ahead(folder, ENGINE, shape_of(checkpoint), name="tiny")
print(json.dumps(made.programs))
"""
STARTS = """
import json, sys
from pathlib import Path
import jax.monitoring
compiled = []
def note(event, seconds, **_):
    if "backend_compile" in event or "to_mlir" in event:
        compiled.append(event)
jax.monitoring.register_event_duration_secs_listener(note)
from tests.planner.test_ahead import answer
checkpoint, folder = map(Path, sys.argv[1:])
print(json.dumps([answer(checkpoint, folder), compiled]))
"""


def shape_of(checkpoint: Path) -> ModelShape:
    """The shape of a stored model, as the command reads it."""
    from server.cli.compile_cli import _stored
    from server.config.settings import Settings
    from server.models.sources import Source

    return _stored(Source("tiny", checkpoint), Settings(), lambda *_: None)


def answer(checkpoint: Path, folder: Path) -> list[int]:
    """Tokens of a model that was started with a folder of programs, once all of them are there."""
    config = dataclasses.replace(ENGINE, compilation_cache=str(folder))
    model = load_model(checkpoint, config, name="tiny")
    assert isinstance(model, LanguageModel)
    assert model.compiling
    model.compiling.join()
    try:
        return submit(model.engine, PROMPT, 12, sampling=GREEDY).tokens
    finally:
        model.stop()


def _child(code: str, *arguments: Path, devices: int) -> Any:
    flags = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_start_from_a_copied_folder_compiles_nothing(tmp_path: Path) -> None:
    """One process compiles, and another starts with a copy; this one has programs of its own."""
    file = write_gguf(tmp_path / "tiny.gguf", LLAMA, random_tensors(LLAMA))
    checkpoint = describe(file, tmp_path / "checkpoints")
    made = _child(COMPILES, checkpoint, tmp_path / "made", devices=1)
    copy = shutil.copytree(tmp_path / "made", tmp_path / "elsewhere" / "copy")
    shutil.rmtree(tmp_path / "made")
    before = {each.name for each in copy.iterdir()}
    tokens, compiled = _child(STARTS, checkpoint, copy, devices=2)
    assert compiled == []
    assert {each.name for each in copy.iterdir() if each.suffix != ".times"} == before
    assert made.keys() < before
    assert tokens == answer(checkpoint, COMPILED)


SHIPPED = DecoderConfig(
    vocab_size=512,
    hidden_size=256,
    mlp_size=512,
    num_layers=1,
    num_heads=8,
    num_kv_heads=4,
    head_dim=128,
    context_length=2**16,
)
ON_CHIPS = EngineConfig(slots=4, prefill_chunks=(32,), row_buckets=(4,), speculation="off")
FOUR = Topology(dataclasses.replace(CHIPS["v6e"], memory_bytes=100 * 2**20), (2, 2))
"""Chips so small that their memory bounds the KV cache."""


@dataclass(frozen=True)
class Client:
    """The client of a device, which says what compiles for it."""

    platform_version: str


@dataclass(frozen=True)
class Chip:
    """A TPU as JAX describes one that is present."""

    id: int
    coords: tuple[int, int, int]
    client: Client
    device_kind: str = "TPU v6 lite"
    platform: str = "tpu"
    process_index: int = 0
    core_on_chip: int = 0


def _runner(folder: Path, monkeypatch: pytest.MonkeyPatch, free: int, **changes: Any) -> Runner:
    """A runner on four such chips, which have this much memory free."""
    version = FOUR.devices()[0].client.platform_version
    chips: Any = [Chip(i, (i % 2, i // 2, 0), Client(version), **changes) for i in range(4)]
    monkeypatch.setattr("inferneo_jax.runner.capacity.free_memory", lambda: free)
    config = dataclasses.replace(ON_CHIPS, compilation_cache=str(folder))
    backend = resolve_decoder(SHIPPED, config, make_mesh(config.mesh, chips), {})
    return Runner(backend, config)


def _files(runner: Runner) -> set[str]:
    """The files in which a runner looks for its programs."""
    return {runner._store._file(key).name for key in runner._programs.all_keys()}


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs for four TPUs."""
    folder = tmp_path_factory.mktemp("ahead") / "programs"
    compile_ahead(folder, ON_CHIPS, ModelShape(config=SHIPPED), name="shipped", topology=FOUR)
    return folder


needs_libtpu = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="libtpu is not installed"
)


@needs_libtpu
def test_programs_for_tpus_are_those_that_a_runner_on_them_looks_for(
    shipped: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (manifest,) = manifests(shipped)
    a_little_less = FOUR.chip.memory_bytes - 10**6
    assert _files(_runner(shipped, monkeypatch, a_little_less)) == manifest.programs.keys()
    assert manifest.programs.keys() < {each.name for each in shipped.iterdir()}
    assert all(file.stat().st_size > 1000 for file in shipped.iterdir())
    assert manifest.facts["device"] == "tpu, TPU v6 lite"
    assert manifest.libtpu
    assert not caplog.text


@needs_libtpu
def test_a_start_on_other_chips_says_what_differs(
    shipped: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (manifest,) = manifests(shipped)
    other = _runner(shipped, monkeypatch, FOUR.chip.memory_bytes, device_kind="TPU v5 lite")
    assert not _files(other) & manifest.programs.keys()
    assert "device is tpu, TPU v5 lite and was tpu, TPU v6 lite" in caplog.text
    caplog.clear()
    less = _runner(shipped, monkeypatch, FOUR.chip.memory_bytes // 2)
    same = {manifest.programs[name] for name in _files(less) & manifest.programs.keys()}
    of_the_cache = ("Decode", "Verify", "Prefill", "Mixed", "EmptyCache")
    assert same < {*manifest.programs.values()}
    assert not any(each.startswith(of_the_cache) for each in same)
    assert f"for a KV cache of {manifest.cache_bytes} bytes on a device, and" in caplog.text


def test_the_nearest_manifest_is_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    facts = {"model": "DecoderBackend", "jax": "1", "settings.slots": "8", "XLA_FLAGS": ""}

    def manifest(**changes: str) -> Manifest:
        return Manifest(
            model="tiny",
            made="today",
            facts=facts | changes,
            libtpu="",
            cache_bytes=1,
            programs={},
        )

    for each in (manifest(model="EncoderBackend"), manifest(jax="2", XLA_FLAGS="--a")):
        each.write(tmp_path)
    assert compiled_ahead(tmp_path, facts) is None
    assert "compiled ahead for tiny, do not fit" in caplog.text
    assert "XLA_FLAGS is not set and was --a; jax is 1 and was 2" in caplog.text
    caplog.clear()
    manifest(jax="2").write(tmp_path)
    assert compiled_ahead(tmp_path, facts) is None
    assert caplog.messages[0].endswith("compiled anew: jax is 1 and was 2")
    caplog.clear()
    manifest().write(tmp_path)
    assert compiled_ahead(tmp_path, facts) == manifest()
    assert compiled_ahead(tmp_path, {"model": "another"}) is None
    assert not caplog.text
    (tmp_path / "damaged.manifest").write_bytes(b"{")
    assert compiled_ahead(tmp_path, facts) == manifest()
    assert "damaged.manifest cannot be read" in caplog.text
    tmp_path.chmod(0o777)
    assert compiled_ahead(tmp_path, facts) is None


def test_programs_of_an_embedding_model_are_loaded_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = EncoderConfig(
        vocab_size=97,
        hidden_size=24,
        mlp_size=32,
        num_layers=1,
        num_heads=3,
        num_positions=32,
        max_tokens=32,
    )
    monkeypatch.setattr("inferneo_jax.scheduler.packing._BATCH_TOKENS", 32)
    engine = EngineConfig(mesh=ONE_DEVICE, kernels="xla", dtype="float32")
    made = compile_ahead(tmp_path / "made", engine, ModelShape(config=model), name="tiny")
    assert len(made.programs) > 1

    def lower(self: Embedder) -> dict[int, Any]:
        return dict.fromkeys(self._packer.sizes, _never)

    monkeypatch.setattr(Embedder, "programs", lower)
    engine = dataclasses.replace(engine, compilation_cache=str(tmp_path / "made"))
    backend = resolve_encoder(model, engine, make_mesh(ONE_DEVICE))
    shapes = flat(weight_shapes(backend.padded, backend.mesh, backend.quantization))
    weights = [jax.numpy.ones(each.shape, each.dtype, device=each.sharding) for each in shapes]
    embedder = Embedder(backend, weights, engine)
    embedder.start()
    try:
        assert embedder.embed([[1, 2, 3]]).result(60).shape == (1, 24)
    finally:
        embedder.stop()


def _never() -> Any:
    raise AssertionError("lowered again")


def test_what_fails_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lower, lowered = Programs.lower, []

    def fail(self: Programs, key: Any) -> Any:
        lowered.append(key)
        if len(lowered) > 1:
            raise ConfigError("stop here")
        return lower(self, key)

    monkeypatch.setattr(Programs, "lower", fail)
    with pytest.raises(ConfigError, match="stop here"):
        compile_ahead(tmp_path / "a" / "b", TINY_ENGINE, ModelShape(config=TINY), name="tiny")
    assert not [*(tmp_path / "a").iterdir()]


@pytest.mark.parametrize(
    ("topology", "words"),
    [
        pytest.param("h100:8", "XLA chooses a GPU's kernels by timing them", id="gpu"),
        pytest.param("cpu:2", "run this on a machine of that kind", id="cpu"),
        pytest.param(
            "v5p:2x2x2",
            r"topology v5p:2x2x2 has 2 hosts; .* of one, at most 4",
            id="hosts",
            marks=needs_libtpu,
        ),
    ],
)
def test_what_cannot_be_compiled_ahead_is_refused(
    topology: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        compile_ahead(
            tmp_path / "made",
            TINY_ENGINE,
            ModelShape(config=TINY),
            name="tiny",
            topology=Topology.parse(topology),
        )
    assert not [*tmp_path.iterdir()]


def test_weights_that_leave_no_memory_are_refused(tmp_path: Path) -> None:
    small = Topology(dataclasses.replace(CHIPS["v6e"], memory_bytes=2**10), (1, 1))
    with pytest.raises(ConfigError, match="which leaves no memory for the KV cache; `inferneo"):
        compile_ahead(
            tmp_path / "made", ON_CHIPS, ModelShape(config=SHIPPED), name="tiny", topology=small
        )


def test_the_command_compiles_what_a_server_of_the_same_settings_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("JAX_PLATFORMS", "JAX_ENABLE_COMPILATION_CACHE"):
        monkeypatch.setenv(name, "")  # and restored afterwards
    asked: list[Any] = []

    def compiled(destination: Path, *arguments: Any, **more: Any) -> Manifest:
        asked.extend((destination, *arguments, more))
        destination.mkdir()
        return Manifest(
            model="", made="", facts={"device": "tpu"}, libtpu="", cache_bytes=0, programs={}
        )

    monkeypatch.setattr(ahead, "compile_ahead", compiled)
    monkeypatch.setenv("INFERNEO_SLOTS", "8")
    arguments = ["compile", "Qwen/Qwen3-0.6B", "--topology", "v6e:2x2", "--max-len", "4096"]
    done = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "made")])
    assert done.exit_code == 0, done.output
    destination, engine, model, draft, more = asked
    assert destination == tmp_path / "made"
    assert (engine.slots, engine.max_len, engine.mesh) == (8, 4096, MeshShape())
    assert (model.config.hidden_size, draft) == (1024, None)
    assert (more["name"], str(more["topology"])) == ("Qwen/Qwen3-0.6B", "v6e:2x2")
    monkeypatch.undo()
    again = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "made")])
    assert "exists already; name a folder that does not" in str(again.exception)


@pytest.mark.parametrize(
    ("mode", "owner", "group", "words"),
    [
        (0o755, os.geteuid(), os.getegid(), ""),
        (0o755, 0, 0, ""),
        (0o775, os.geteuid(), os.getegid(), ""),
        (0o775, os.geteuid(), os.getegid() + 1, f"group {os.getegid() + 1} may write"),
        (0o757, os.geteuid(), os.getegid(), "every user may write"),
        (0o755, os.geteuid() + 1, os.getegid(), "not to this one or root"),
    ],
)
def test_what_others_can_write_is_not_trusted(
    mode: int, owner: int, group: int, words: str
) -> None:
    status = os.stat_result((mode, 0, 0, 1, owner, group, 0, 0, 0, 0))
    found = distrust(status)
    assert words in found
    assert bool(words) == bool(found)
