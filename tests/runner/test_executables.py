"""Programs kept on disk: the next start runs the very same, and nothing wrong is ever run."""

import dataclasses
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from inferneo_jax.config import EngineConfig, MeshShape
from inferneo_jax.layers.sampler import Sampling
from inferneo_jax.runner.capacity import make_programs
from inferneo_jax.runner.compile_cache import ExecutableStore
from inferneo_jax.runner.manifest import Manifest, decoder_facts, facts_of
from inferneo_jax.runner.programs import Programs, Sample, Score, ScorePrompt, depends, keeps
from inferneo_jax.sharding.mesh import make_mesh
from tests.support.tiny_model import (
    EIGHT_SLOTS,
    ONE_DEVICE,
    TINY,
    TINY_ENGINE,
    mixed,
    running_engine,
    tiny_backend,
)


def _lower() -> jax.stages.Lowered:
    return jax.jit(lambda x: x * 2, donate_argnums=0).lower(jnp.zeros(4))


def _never() -> jax.stages.Lowered:
    raise AssertionError("lowered again")


def _store(
    folder: Path | None, settings: object = None, shape: MeshShape = ONE_DEVICE
) -> ExecutableStore:
    mesh = make_mesh(shape)
    batch = settings.batch_sizes("cpu") if isinstance(settings, EngineConfig) else None
    return ExecutableStore(folder, mesh, facts_of(mesh, settings=settings, batch=batch))


def _made_again(store: ExecutableStore, key: str = "double") -> bool:
    made = []

    def lower() -> jax.stages.Lowered:
        made.append(key)
        return _lower()

    double = store.compile_all({key: lower}, None)[key]
    assert double(jnp.ones(4)).tolist() == [2.0] * 4
    return bool(made)


@pytest.mark.parametrize("shape", [ONE_DEVICE, MeshShape(2, 4)], ids=str)
def test_the_next_start_lowers_nothing_and_computes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: MeshShape
) -> None:
    config = dataclasses.replace(EIGHT_SLOTS, mesh=shape, compilation_cache=str(tmp_path))
    with running_engine(config) as engine:
        first = mixed(engine)
    lower, mesh = Programs.lower, make_mesh(shape)
    kept = lambda self, key: _never() if keeps(mesh, key) else lower(self, key)  # noqa: E731
    monkeypatch.setattr(Programs, "lower", kept)
    with running_engine(config) as engine:
        second = mixed(engine)
    for old, new in zip(first, second, strict=True):
        assert (old.tokens, old.logprobs) == (new.tokens, new.logprobs)


def _unordered(hlo: str) -> list[tuple[str, str]]:
    """The pairs of collectives in compiled HLO of which neither follows from the other."""
    computations: dict[str, dict[str, str]] = {}
    for line in hlo.splitlines():
        if head := re.match(r"(?:ENTRY )?%([\w.-]+) .*\{$", line):
            within = computations.setdefault(head[1], {})
        elif made := re.match(r"\s+(?:ROOT )?%([\w.-]+) = (.*)", line):
            within[made[1]] = made[2]

    @cache
    def exchanges(computation: str, name: str) -> bool:
        made = computations[computation][name]
        called = [each for each in re.findall(r"%([\w.-]+)", made) if each in computations]
        direct = re.search(r"\b(all-|reduce-scatter|collective-)[\w-]*\(", made)
        return bool(direct) or any(
            exchanges(each, n) for each in called for n in computations[each]
        )

    @cache
    def before(computation: str, name: str) -> frozenset[str]:
        made = computations[computation]
        used = {each for each in re.findall(r"%([\w.-]+)", made[name]) if each in made}
        return frozenset(used).union(*(before(computation, each) for each in used))

    return [
        (one, two)
        for computation, made in computations.items()
        for one, two in combinations([name for name in made if exchanges(computation, name)], 2)
        if one not in before(computation, two) and two not in before(computation, one)
    ]


def test_only_programs_whose_collectives_follow_from_each_other_are_kept() -> None:
    """On several CPU devices. The others are not: what is read from a file confuses them."""
    config = dataclasses.replace(EIGHT_SLOTS, mesh=MeshShape(1, 8))
    programs = make_programs(tiny_backend(config), config, lambda: 0)
    found = {type(key): key for key in programs.all_keys()}
    for key in found.values():
        hlo = programs.lower(key).compile().as_text()
        if keeps(programs.mesh, key):
            assert not _unordered(hlo), key
        else:
            assert isinstance(key, Sample | Score | ScorePrompt)
    assert _unordered(programs.lower(Sample(8, Sampling.DRAWN)).compile().as_text())


def test_what_a_program_is_made_of_tells_it_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = EngineConfig(slots=1), EngineConfig(slots=2)
    assert _made_again(_store(tmp_path, small))
    assert not _made_again(_store(tmp_path, EngineConfig(slots=1)))
    assert _made_again(_store(tmp_path, large))
    assert _made_again(_store(tmp_path, small), "another")
    assert _made_again(_store(tmp_path, small, MeshShape(1, 2)))
    monkeypatch.setenv("XLA_FLAGS", "--xla_other")
    assert _made_again(_store(tmp_path, small))
    monkeypatch.setattr("inferneo_jax.runner.manifest.source_hash", lambda *_: "changed")
    assert _made_again(_store(tmp_path, small))


_PLAIN = dataclasses.replace(
    TINY_ENGINE, prefill_chunks=(8,), speculation="ngram", draft_rows=4, draft_tokens=2
)
_FORWARD = {"Decode", "Verify", "Prefill", "Mixed"}
_SAMPLING = {"Sample", "Score"}


@pytest.mark.parametrize(
    ("changes", "shared"),
    [
        pytest.param(
            {"speculation": "off", "prefill_chunks": (4, 8)},
            {*_FORWARD - {"Verify"}, "Admit", *_SAMPLING, "ScorePrompt", "EmptyCache"},
            id="which programs there are",
        ),
        pytest.param(
            {"kv_tokens": 320}, {"Admit", *_SAMPLING, "ScorePrompt"}, id="size of the cache"
        ),
        pytest.param({"kv_dtype": "int8"}, {"Admit", *_SAMPLING}, id="type of the cache"),
        pytest.param({"max_len": 32}, {"Score", "ScorePrompt"}, id="length"),
        pytest.param({"slots": 2}, {"Score", "ScorePrompt"}, id="slots"),
        pytest.param(
            {"max_logit_bias": 3},
            {*_FORWARD, "Score", "ScorePrompt", "EmptyCache"},
            id="number of biases",
        ),
        pytest.param(
            {"max_logprobs": 3}, {*_FORWARD, "Admit", "Sample", "EmptyCache"}, id="alternatives"
        ),
        pytest.param({"hidden_size": 48}, {"Admit", *_SAMPLING}, id="another model"),
        pytest.param(
            {"draft": 48},
            {*_FORWARD, "Admit", *_SAMPLING, "ScorePrompt", "EmptyCache"},
            id="a draft model",
        ),
    ],
)
def test_programs_of_one_name_are_the_same(changes: dict[str, Any], shared: set[str]) -> None:
    def made(changes: dict[str, Any]) -> tuple[Programs, dict[str, str]]:
        sizes = {"hidden_size": changes.pop("hidden_size", TINY.hidden_size)}
        width = changes.pop("draft", None)
        config = dataclasses.replace(_PLAIN, **changes)
        model = tiny_backend(config, dataclasses.replace(TINY, **sizes))
        draft = (
            tiny_backend(config, dataclasses.replace(TINY, hidden_size=width)) if width else None
        )
        programs = make_programs(model, config, lambda: 0, draft)
        return programs, decoder_facts(model, config, draft) | programs.sizes

    (one, facts), (two, others) = made({}), made(changes)
    differ = {name for name in facts.keys() | others.keys() if facts.get(name) != others.get(name)}
    both = set(one.all_keys()) & set(two.all_keys())
    same = {key for key in both if not any(depends(key, name) for name in differ)}
    # Which tokens grammars allow is a matter of the vocabulary alone.
    assert {type(key).__name__ for key in same} == shared | {"Constrain"}
    for key in same:
        assert one.lower(key).as_text() == two.lower(key).as_text(), key


def test_the_same_is_known_in_another_process(tmp_path: Path) -> None:
    code = (
        "from inferneo_jax.config import *; from inferneo_jax.sharding.mesh import make_mesh; "
        "from inferneo_jax.runner.manifest import digest, facts_of;"
        "from tests.support.tiny_model import TINY;"
        "from inferneo_jax.models import REFERENCE as R;"
        "facts = facts_of(make_mesh(MeshShape(1, 1)), model=TINY, config=EngineConfig(), other=R);"
        "print(digest(facts))"
    )

    def run(seed: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout

    assert run("1") == run("2") != ""


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: content[: len(content) // 2], id="cut"),
        pytest.param(lambda content: b"nothing of ours" + content, id="strange"),
    ],
)
def test_what_cannot_be_loaded_is_compiled_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[bytes], bytes]
) -> None:
    assert _made_again(_store(tmp_path))
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert _made_again(_store(tmp_path))
    assert "cannot be loaded and is compiled again" in caplog.text
    assert not _made_again(_store(tmp_path))
    assert [file] == list(tmp_path.iterdir())


@pytest.mark.parametrize("of", ["folder", "file"])
def test_what_others_could_have_written_is_compiled_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, of: str
) -> None:
    assert _made_again(_store(tmp_path))
    (file,) = tmp_path.iterdir()
    opened = file if of == "file" else tmp_path
    opened.chmod(0o777)
    assert _made_again(_store(tmp_path))
    assert "to which every user may write; chmod o-w" in caplog.text
    opened.chmod(0o700)
    assert not _made_again(_store(tmp_path))


def test_a_new_folder_is_for_nobody_else_to_write(tmp_path: Path) -> None:
    mask = os.umask(0)
    try:
        assert _made_again(_store(tmp_path / "new"))
    finally:
        os.umask(mask)
    assert not _made_again(_store(tmp_path / "new"))


def test_what_jax_read_from_its_own_cache_is_not_kept(tmp_path: Path) -> None:
    class Known:
        def compile(self) -> jax.stages.Compiled:
            jax.monitoring.record_event("/jax/compilation_cache/cache_hits")
            return _lower().compile()

    _store(tmp_path).compile_all({"double": Known}, None)
    assert not [*tmp_path.iterdir()]
    assert _made_again(_store(tmp_path))
    assert not _made_again(_store(tmp_path))


def test_what_nobody_asks_for_is_removed(tmp_path: Path) -> None:
    assert _made_again(_store(tmp_path, "old"))
    (old,) = tmp_path.iterdir()
    other = tmp_path / "not-ours"
    other.touch()
    long_ago = time.time() - 40 * 86_400
    assert _made_again(_store(tmp_path, "ahead"))
    (ahead,) = {*tmp_path.glob("*.executable")} - {old}
    Manifest(
        model="", made="", facts={}, libtpu="", cache_bytes=0, programs={ahead.name: "double"}
    ).write(tmp_path)
    for file in (old, other, ahead):
        os.utime(file, (long_ago, long_ago))
    assert _made_again(_store(tmp_path, "new"))
    assert not old.exists()
    assert other.exists()
    assert ahead.exists()
    assert not _made_again(_store(tmp_path, "new"))


@pytest.mark.parametrize("folder", [None, Path("/dev/null/nowhere")], ids=["none", "unwritable"])
def test_programs_are_compiled_where_none_can_be_kept(folder: Path | None) -> None:
    assert _made_again(_store(folder))
