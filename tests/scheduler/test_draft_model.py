"""The law of drafts, where a second model makes them: requests get what they get without."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from inferneo_jax.config import DecoderConfig, EngineConfig, MeshShape
from inferneo_jax.engine.engine import Engine
from inferneo_jax.engine.served import LanguageModel, Model
from inferneo_jax.errors import ConfigError
from inferneo_jax.model import load_model
from inferneo_jax.request import SamplingParams
from inferneo_jax.runner.capacity import make_programs
from inferneo_jax.runner.runner import Runner
from inferneo_jax.scheduler.speculation import AcceptanceRate, StepCosts
from inferneo_jax.weights.convert import convert
from tests.support.paths import FAMILIES
from tests.support.tiny_model import (
    EIGHT_SLOTS,
    GREEDY,
    MIXED,
    TINY,
    TINY_ENGINE,
    Collected,
    close,
    close_all,
    compiled,
    make_runner,
    prompt,
    submit,
    tiny_backend,
    tiny_draft,
)

PLAIN = dataclasses.replace(TINY_ENGINE, prefill_chunks=(8,), kernels="xla")
DRAFTED = dataclasses.replace(PLAIN, speculation="model")
OTHER = dataclasses.replace(TINY, num_layers=1, hidden_size=16, num_heads=2, num_kv_heads=1)
SHORT_TABLE = dataclasses.replace(OTHER, vocab_size=90)

Make = Callable[..., Engine]


@cache
def _runner(config: EngineConfig, model: DecoderConfig | None, noise: float) -> Runner:
    draft = tiny_draft(config, model, noise) if model else None
    return compiled(make_runner(config, draft=draft))


@pytest.fixture
def engine() -> Iterator[Make]:
    """Engines with a draft model, the model itself by default; all slots and pages must return."""
    engines: list[Engine] = []

    def make(model: DecoderConfig | None = TINY, noise: float = 0.0, **changes: Any) -> Engine:
        config = dataclasses.replace(DRAFTED if model else PLAIN, **changes)
        engines.append(Engine(_runner(config, model, noise)))
        return engines[-1]

    yield make
    for each in engines:
        stats = each.stats()
        each.stop()
        assert (stats.slots_used, stats.pages_used, stats.waiting) == (0, 0, 0)
        assert stats.compiles_after_ready == 0
        assert not each._scheduler._speculator._drafters


def _outputs(engine: Engine, together: bool, tokens: int = 30) -> list[Collected]:
    found: list[Collected] = []
    for i, fields in enumerate(MIXED):
        found.append(submit(engine, prompt(9 + i, seed=i), tokens, **fields))
        if not together:
            found[-1].wait()
    return [each.wait() for each in found]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(
    ("model", "noise"), [(TINY, 0.0), (TINY, 0.03), (OTHER, 0.0), (SHORT_TABLE, 0.0)]
)
def test_speculative_equals_plain(
    engine: Make, model: DecoderConfig, noise: float, together: bool
) -> None:
    drafted, plain = engine(model, noise), engine(None)
    close_all(_outputs(drafted, together), _outputs(plain, together))
    stats, without = drafted.stats(), plain.stats()
    assert stats.output_tokens == without.output_tokens
    assert stats.model_drafted_tokens == stats.drafted_tokens
    assert stats.model_accepted_tokens == stats.accepted_tokens
    accepted = stats.accepted_tokens / stats.drafted_tokens
    if model is TINY and not noise:
        # Sampled with the same random numbers, an equal model's tokens are equal too.
        assert accepted == 1.0
        assert stats.steps < 0.5 * without.steps
    elif model is TINY:
        assert 0.2 < accepted < 1.0
    else:
        assert accepted < 0.2


def test_a_prefix_that_another_request_left_is_known_to_the_draft_model(engine: Make) -> None:
    drafted, plain = engine(), engine(None)
    first = prompt(24)
    whole = submit(drafted, first, 16)
    again = (*first, *whole.tokens, *prompt(3, seed=5))
    filled: list[int] = []
    run = drafted._runner._run_draft_model

    def watch(scheduled: Any, most: int) -> Any:
        rows = [row for rank in scheduled for row in rank.decode]
        filled.extend(row.fill.length for row in rows if row.fill)
        return run(scheduled, most)

    drafted._runner._run_draft_model = watch  # type: ignore[method-assign]
    try:
        close(submit(drafted, again, 12), submit(plain, again, 12))
        assert drafted.stats().cached_tokens >= 36
        assert 0 < sum(filled) < 16, "it computes what it has from the request before"
        assert drafted.stats().accepted_tokens == drafted.stats().drafted_tokens
    finally:
        drafted._runner._run_draft_model = run  # type: ignore[method-assign]


def test_drafts_survive_preemption(engine: Make) -> None:
    few, plain = engine(kv_tokens=64), engine(None)
    close_all(*([submit(e, prompt(9, seed=i), 30) for i in range(4)] for e in (few, plain)))
    stats = few.stats()
    assert stats.preemptions > 0
    assert stats.accepted_tokens == stats.drafted_tokens > 0


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_drafts_that_are_aborted_leave_nothing(engine: Make, noise: float) -> None:
    drafted, plain = engine(TINY, noise), engine(None)
    for _ in range(3):
        gone = [submit(drafted, prompt(9, seed=i), 50) for i in range(4)]
        gone[0].wait_for_tokens(3)
        for each in gone[:3]:
            drafted.abort(each.request.id)
        close(gone[3], submit(plain, prompt(9, seed=3), 50))
        assert {each.finish_reason for each in gone[:3]} == {"abort"}


def test_a_paused_request_goes_on_as_before(engine: Make) -> None:
    drafted, plain = engine(), engine(None)
    again = submit(drafted, prompt(9), 40)
    again.wait_for_tokens(3)
    drafted.pause(again.request.id)
    drafted.resume(again.request.id)
    close(again, submit(plain, prompt(9), 40))


@pytest.mark.parametrize("most", [1, 2, 3, 7])
def test_no_more_tokens_come_than_were_asked_for(engine: Make, most: int) -> None:
    drafted = engine()
    whole = submit(drafted, prompt(9), 30).tokens
    assert submit(drafted, prompt(9), most).tokens == whole[:most]
    stop = whole[most]
    got = submit(drafted, prompt(9), 30, stop_token_ids=frozenset({stop}))
    assert got.tokens == whole[: whole.index(stop) + 1]


def test_a_draft_model_with_a_shorter_context_stops_where_it_ends(engine: Make) -> None:
    short = dataclasses.replace(TINY, context_length=32)
    drafted, plain = engine(short), engine(None)
    close(submit(drafted, prompt(9), 50), submit(plain, prompt(9), 50))
    stats = drafted.stats()
    assert 0 < stats.accepted_tokens == stats.drafted_tokens <= 32 - 9


def test_drafts_of_every_rank_of_a_mesh(engine: Make) -> None:
    mesh = MeshShape(data=2, model=4)
    config = dataclasses.replace(EIGHT_SLOTS, mesh=mesh)
    sharded = _runner(dataclasses.replace(config, speculation="model", draft_rows=8), TINY, 0.0)
    drafted, plain = Engine(sharded), engine(None)
    try:
        close_all(_outputs(drafted, together=True), _outputs(plain, together=True))
        stats = drafted.stats()
        assert stats.accepted_tokens > 0.9 * stats.drafted_tokens > 0
    finally:
        drafted.stop()
        assert drafted.stats().pages_used == 0


def test_a_failed_step_leaves_no_stale_cache(engine: Make) -> None:
    drafted, plain = engine(), engine(None)
    execute = drafted._runner.execute
    failed = submit(drafted, prompt(9), 40)
    failed.wait_for_tokens(2)

    def fail(*_: Any) -> Any:
        drafted._runner.execute = execute  # type: ignore[method-assign]
        raise RuntimeError("the device is on fire")

    drafted._runner.execute = fail  # type: ignore[method-assign]
    failed.wait()
    close(submit(drafted, prompt(9), 40), submit(plain, prompt(9), 40))


def test_with_auto_drafts_are_made_where_they_pay(engine: Make) -> None:
    """Of two models of one size, drafting costs more than it brings; an equal text is looked up."""
    drafted, plain = engine(speculation="auto"), engine(None)
    sampled = SamplingParams(temperature=1.0, seed=4)
    for fields in ({"sampling": GREEDY}, {"sampling": sampled}):
        close(submit(drafted, prompt(9), 50, **fields), submit(plain, prompt(9), 50, **fields))
    assert drafted.stats().compiles_after_ready == 0


def test_the_length_of_a_draft_follows_costs_and_acceptance() -> None:
    cheap, dear = StepCosts(1.2, draft=0.05), StepCosts(1.2, draft=0.9)
    good, poor = AcceptanceRate(9.0, 10.0), AcceptanceRate(1.0, 10.0)
    assert good.best(5, cheap)[0] == 5
    assert good.best(5, dear) == poor.best(5, cheap) == (0, 1.0)
    assert 0 < AcceptanceRate(5.0, 10.0).best(5, cheap)[0] < 5
    assert good.best(1, cheap) == (1, pytest.approx(1.9 / 1.25))


def test_a_draft_model_that_does_not_pay_rests_ever_longer() -> None:
    costs, rate, rests = StepCosts(1.2, draft=0.2), AcceptanceRate().inherit(), []
    for _ in range(100):
        if rate.best(5, costs)[0]:
            rate.update(5, 0)
        else:
            rate.rest()
            rests.append(rate.cooldown)
    assert rests == sorted(rests)
    assert rests[0] < rests[-1] == 256
    for _ in range(8):
        rate.update(5, 5)
    assert rate.best(5, costs)[0] == 5


def _loaded(tmp_path: Path, draft: str, **changes: Any) -> Model:
    """A model of files, with another one of them to draft."""
    folder = convert(FAMILIES / "llama-tied", tmp_path / "target")
    other = convert(FAMILIES / draft, tmp_path / draft)
    config = dataclasses.replace(DRAFTED, **changes)
    return load_model(folder, config, name="target", draft=other)


def test_a_checkpoint_drafts_for_another(tmp_path: Path) -> None:
    model = _loaded(tmp_path, "qwen2")
    try:
        assert isinstance(model, LanguageModel)
        assert model.info.draft_model == "qwen2"
        alone = load_model(tmp_path / "target", PLAIN, name="target")
        assert isinstance(alone, LanguageModel)
        assert model.info.weight_bytes > alone.info.weight_bytes
        assert model.max_len == alone.max_len
        close(submit(model.engine, (5, 70, 3), 20), submit(alone.engine, (5, 70, 3), 20))
        assert model.stats().model_drafted_tokens  # type: ignore[union-attr]
        alone.stop()
    finally:
        model.stop()


@pytest.mark.parametrize(
    ("draft", "speculation", "said"),
    [
        ("bert", "auto", "draft_model is bert, which makes embeddings and no text"),
        ("qwen2", "off", "draft_model is qwen2, but speculation is off"),
        ("qwen2", "ngram", "draft_model is qwen2, but speculation is ngram"),
    ],
)
def test_what_cannot_draft_is_refused(
    tmp_path: Path, draft: str, speculation: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        _loaded(tmp_path, draft, speculation=speculation)


def test_a_draft_model_with_another_vocabulary_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(FAMILIES / "qwen2", source)
    content = json.loads((source / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    one, two = sorted(vocab, key=vocab.get)[40:42]
    vocab[one], vocab[two] = vocab[two], vocab[one]
    (source / "tokenizer.json").write_text(json.dumps(content))
    other = convert(source, tmp_path / "other")
    folder = convert(FAMILIES / "llama-tied", tmp_path / "target")
    said = "draft_model is other, whose vocabulary is not that of target: token 40 is b"
    with pytest.raises(ConfigError, match=said):
        load_model(folder, DRAFTED, name="target", draft=other)


def test_model_drafts_need_a_model(tmp_path: Path) -> None:
    folder = convert(FAMILIES / "llama-tied", tmp_path / "target")
    with pytest.raises(ConfigError, match="speculation is model, which needs a draft_model"):
        load_model(folder, DRAFTED, name="target")


def test_the_memory_of_the_draft_model_counts() -> None:
    config = dataclasses.replace(PLAIN, kv_tokens=None, slots=2, row_buckets=(2,))
    backend = tiny_backend(config)
    one = make_programs(backend, config, lambda: 10**9)
    both = make_programs(backend, config, lambda: 10**9, backend)
    assert both.token_bytes == 2 * one.token_bytes
    assert make_programs(backend, config, lambda: one.cache_bytes).num_pages == one.num_pages
    less = make_programs(backend, config, lambda: one.cache_bytes, backend)
    assert less.num_pages <= one.num_pages // 2 + 1
