"""The laws of the engine, on a tiny random model."""

import dataclasses
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from inferneo_jax.errors import ContextLengthError, EngineStoppedError, RequestError
from inferneo_jax.kernels.cpu.build import library
from inferneo_jax.kernels.cpu.linear import BlockQuantized
from inferneo_jax.layers.quantization import Int8
from inferneo_jax.request import SamplingParams
from inferneo_jax.runner.backends import resolve_decoder
from inferneo_jax.runner.runner import PendingStep, Runner
from inferneo_jax.scheduler.scheduler import DataParallelScheduler, Scheduler, SchedulerOutputs
from inferneo_jax.sharding.mesh import make_mesh
from tests.support.tiny_model import (
    EIGHT_SLOTS,
    MIXED,
    ONE_DEVICE,
    TINY,
    Collected,
    MakeEngine,
    close,
    close_all,
    close_when_preempted,
    mixed,
    prompt,
    running_engine,
    submit,
)

needs_compiler = pytest.mark.skipif(library() is None, reason="needs a C++ compiler")
with_kernels = pytest.mark.parametrize("kernels", ["xla", "native"])


def _prompt_scores(collected: Collected) -> list[float]:
    scores = collected.wait().outputs[0].prompt_logprobs
    assert scores is not None
    assert scores[0] is None
    return [entry.logprob for entry in scores[1:] if entry is not None]


@with_kernels
@pytest.mark.parametrize("fields", MIXED)
def test_alone_equals_in_any_batch(
    tiny_engine: MakeEngine, fields: dict[str, object], kernels: str
) -> None:
    engine = tiny_engine(kernels=kernels)
    alone = submit(engine, prompt(9), **fields).wait()
    crowd = [submit(engine, prompt(5 + i, seed=i), **MIXED[i]) for i in range(len(MIXED))]
    among = submit(engine, prompt(9), **fields)
    crowd += [submit(engine, prompt(30, seed=9), **MIXED[1])]
    close(alone, among)
    assert all(len(other.tokens) == 12 for other in crowd)


@pytest.mark.parametrize(
    ("numerics", "method"),
    [
        pytest.param({"quantization": "int8", "kv_dtype": "float32"}, Int8, id="int8 weights"),
        pytest.param({"quantization": "int8", "kv_dtype": "int8"}, Int8, id="int8 cache too"),
        pytest.param({"dtype": "auto"}, BlockQuantized, id="blocks", marks=needs_compiler),
    ],
)
def test_alone_equals_together_in_quantized_numbers(numerics: dict[str, Any], method: type) -> None:
    config = dataclasses.replace(EIGHT_SLOTS, **({"dtype": "float32"} | numerics))
    quantization = resolve_decoder(TINY, config, make_mesh(ONE_DEVICE), {}).quantization
    assert type(quantization.linear) is method
    with running_engine(config, quantization=quantization) as engine:
        close_all(mixed(engine), mixed(engine, together=False))


@with_kernels
def test_chunked_prefill_equals_whole(tiny_engine: MakeEngine, kernels: str) -> None:
    chunked = tiny_engine(kernels=kernels)
    whole = tiny_engine(kernels=kernels, prefill_chunks=(64,))
    for length in (1, 3, 4, 5, 8, 9, 16, 31, 52):
        fields = {"logprobs": 2, "prompt_logprobs": 1}
        a, b = (submit(engine, prompt(length), **fields) for engine in (chunked, whole))
        close(a, b)
        assert _prompt_scores(a) == pytest.approx(_prompt_scores(b), abs=1e-4)


def test_a_late_request_changes_no_other(tiny_engine: MakeEngine) -> None:
    engine = tiny_engine()
    fields = {"logprobs": 1, "sampling": SamplingParams(seed=4)}
    undisturbed = submit(engine, prompt(7), 40, **fields).wait()
    early = submit(engine, prompt(7), 40, **fields)
    for count in (1, 5, 9):
        early.wait_for_tokens(count)
        submit(engine, prompt(40, seed=count), 4)
    close(undisturbed, early)


def test_seeds_repeat_and_differ(tiny_engine: MakeEngine) -> None:
    engine = tiny_engine()
    runs = [
        submit(engine, prompt(6), 24, sampling=SamplingParams(seed=seed)).tokens
        for seed in (1, 2, 1, 2**32 + 1)
    ]
    assert runs[0] == runs[2]
    assert len({tuple(run) for run in runs}) == 3


@with_kernels
def test_preempted_equals_undisturbed(tiny_engine: MakeEngine, kernels: str) -> None:
    close_when_preempted(*(tiny_engine(kernels=kernels, kv_tokens=tokens) for tokens in (160, 64)))


def test_the_least_urgent_is_preempted(tiny_engine: MakeEngine) -> None:
    engine = tiny_engine(kv_tokens=64)
    low = submit(engine, prompt(10), 40, priority=1)
    low.wait_for_tokens(1)
    high = submit(engine, prompt(10, seed=1), 40, priority=0)
    assert high.wait().ended_at < low.wait().ended_at
    assert engine.stats().preemptions > 0


@with_kernels
def test_shared_prefix_equals_fresh(tiny_engine: MakeEngine, kernels: str) -> None:
    engine = tiny_engine(kernels=kernels)
    start = prompt(21)
    submit(engine, start, 5).wait()
    for tail in (prompt(3, seed=1), prompt(17, seed=2)):
        a = submit(engine, start + tail, logprobs=2)
        b = submit(engine, start + tail, logprobs=2, cache_salt=bytes(tail))
        close(a, b)
        assert a.outputs[0].cached_tokens == (20 if kernels == "xla" else 16)
        assert b.outputs[0].cached_tokens == 0
    again = submit(engine, start + prompt(3, seed=1), 1, cache_salt=bytes(prompt(3, seed=1)))
    assert again.wait().outputs[0].cached_tokens == (20 if kernels == "xla" else 16)


def test_a_chats_next_turn_reuses_the_answer(tiny_engine: MakeEngine) -> None:
    engine = tiny_engine()
    first = submit(engine, prompt(10), 11)
    turn = submit(engine, (*prompt(10), *first.tokens, 5, 6), 2)
    # 10 + 11 tokens; the last was sampled and never fed, so five pages of four are full.
    assert turn.wait().outputs[0].cached_tokens == 20


def test_prefixes_are_counted_right_while_pages_are_evicted(tiny_engine: MakeEngine) -> None:
    engine = tiny_engine()
    random = np.random.default_rng(5)
    # Stems of five pages each, six of them: more than the 40 pages hold beside what runs.
    stems = [prompt(20, seed=seed) for seed in range(6)]
    ids = [
        stems[random.integers(6)][: random.integers(4, 21)] + prompt(int(random.integers(1, 9)), 99)
        for _ in range(40)
    ]
    shared = [submit(engine, each, 6, logprobs=1) for each in ids]
    cached = [each.wait().outputs[0].cached_tokens for each in shared]
    stats = engine.stats()
    assert stats.cached_tokens == sum(cached)
    assert all(n % 4 == 0 and n < len(each) for n, each in zip(cached, ids, strict=True))
    assert 0 < sum(cached) < sum(len(each) for each in ids)
    # What was not cached was computed, and nothing twice but for those who gave way.
    computed = stats.prompt_tokens
    assert computed + sum(cached) == sum(map(len, ids)) or stats.preemptions
    assert computed + sum(cached) >= sum(map(len, ids))
    for each, found in zip(ids[::5], shared[::5], strict=True):
        close(found, submit(engine, each, 6, logprobs=1, cache_salt=bytes(each)))


def test_prompt_scores_equal_the_generations_own(tiny_engine: MakeEngine) -> None:
    engine = tiny_engine()
    generated = submit(engine, prompt(9), 10, logprobs=2)
    whole = (*prompt(9), *generated.tokens)
    scored = submit(engine, whole, 0, prompt_logprobs=2)
    assert scored.tokens == []
    assert scored.finish_reason == "length"
    own = [entry.logprob for entry in generated.logprobs]
    assert _prompt_scores(scored)[-10:] == pytest.approx(own, abs=1e-4)


def test_scores_reach_the_host_only_when_a_request_asks(
    tiny_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine()
    runner, found = engine._runner, set()
    run = runner.run

    def note(scheduled: SchedulerOutputs) -> PendingStep:
        step = run(scheduled)
        for _, sampled in filter(None, (step.decode, step.prefill)):
            found.add((sampled.scores is not None, sampled.prompt_scores is not None))
        return step

    monkeypatch.setattr(runner, "run", note)
    submit(engine, prompt(9), 4).wait()
    assert found == {(False, False)}
    found.clear()
    submit(engine, prompt(9), 4, logprobs=1).wait()
    assert found == {(True, False)}
    found.clear()
    submit(engine, prompt(9), 0, prompt_logprobs=1).wait()
    assert found == {(False, True)}


def test_a_stop_token_ends_and_is_reported(tiny_engine: MakeEngine) -> None:
    engine = tiny_engine()
    free = submit(engine, prompt(9), 12).tokens
    stop = free[5]
    stopped = submit(engine, prompt(9), 12, stop_token_ids=frozenset({stop}))
    assert stopped.tokens == free[: free.index(stop) + 1]
    assert stopped.finish_reason == "stop"


def test_min_tokens_postpones_the_stop(tiny_engine: MakeEngine) -> None:
    engine = tiny_engine()
    stops = frozenset(range(0, 97, 2)) & frozenset(range(60))
    late = submit(engine, prompt(9), 20, stop_token_ids=stops, min_tokens=7).tokens
    assert not stops & set(late[:7])


def test_random_aborts_leave_no_trace(tiny_engine: MakeEngine) -> None:
    engine = tiny_engine(kv_tokens=64)
    rng = np.random.default_rng(3)
    for _ in range(40):
        crowd = [
            submit(engine, prompt(int(rng.integers(1, 30))), int(rng.integers(1, 30)))
            for _ in range(6)
        ]
        victim = crowd[int(rng.integers(6))]
        victim.wait_for_tokens(int(rng.integers(0, 4)))
        for collected in crowd:
            if rng.random() < 0.6:
                engine.abort(collected.request.id)
                engine.abort(collected.request.id)
        for collected in crowd:
            assert collected.finish_reason in ("abort", "length")
    running = [submit(engine, prompt(5, seed=i), 50) for i in range(3)]
    for collected in running:
        collected.wait_for_tokens(2)
        engine.abort(collected.request.id)
    assert {collected.finish_reason for collected in running} == {"abort"}
    stats = engine.stats()
    assert (stats.slots_used, stats.pages_used, stats.running, stats.waiting) == (0, 0, 0, 0)
    engine.abort("never heard of")
    assert len(submit(engine, prompt(4)).tokens) == 12


def test_a_paused_request_waits_and_harms_nobody(
    tiny_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine()
    fields = {"sampling": SamplingParams(seed=3)}
    undisturbed = submit(engine, prompt(6), 40, **fields).tokens
    paused = submit(engine, prompt(6), 40, **fields)
    paused.wait_for_tokens(3)
    engine.pause(paused.request.id)
    engine.pause(paused.request.id)
    for seed in range(3):  # many steps, in which a running request would have finished
        assert len(submit(engine, prompt(5, seed=seed), 50).tokens) == 50
    assert paused.count() < 40
    scheduled = []
    schedule = Scheduler.schedule
    monkeypatch.setattr(
        Scheduler, "schedule", lambda s, *a, **k: (scheduled.append(1), schedule(s, *a, **k))[1]
    )
    time.sleep(0.1)
    assert len(scheduled) < 20, "an engine that has nothing but paused requests spins"
    assert engine.stats().slots_used == 1
    engine.resume(paused.request.id)
    assert paused.tokens == undisturbed


@pytest.mark.parametrize("change", ["resume", "abort", "submit"])
def test_what_is_asked_while_a_step_is_scheduled_is_not_forgotten(
    tiny_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    engine = tiny_engine()
    paused = submit(engine, prompt(6), 40)
    paused.wait_for_tokens(1)
    schedule, asked, late = DataParallelScheduler.schedule, threading.Event(), []

    def ask_late(scheduler: DataParallelScheduler, **fields: Any) -> SchedulerOutputs | None:
        scheduled = schedule(scheduler, **fields)
        if scheduled is None and engine._in_flight is None and not asked.is_set():
            if change == "submit":
                late.append(submit(engine, prompt(5)))
            else:
                getattr(engine, change)(paused.request.id)
            asked.set()
        return scheduled

    monkeypatch.setattr(DataParallelScheduler, "schedule", ask_late)
    engine.pause(paused.request.id)
    assert asked.wait(60)
    reason = {"resume": "length", "abort": "abort"}
    for collected in late or [paused]:
        collected.wait(60)
        assert collected.finish_reason == reason.get(change, "length")
    engine.abort(paused.request.id)


def test_nobody_waits_for_a_step_to_be_scheduled(
    tiny_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine()
    long = submit(engine, prompt(6), 50)
    schedule, asked, go_on = DataParallelScheduler.schedule, threading.Event(), threading.Event()

    def schedule_slowly(scheduler: DataParallelScheduler, **fields: Any) -> SchedulerOutputs | None:
        asked.set()
        assert go_on.wait(120)
        return schedule(scheduler, **fields)

    monkeypatch.setattr(DataParallelScheduler, "schedule", schedule_slowly)
    with ThreadPoolExecutor(1) as pool:
        try:
            other = submit(engine, prompt(5))
            assert asked.wait(60)
            third = pool.submit(submit, engine, prompt(5)).result(60)
            for method in (engine.pause, engine.resume, engine.abort):
                pool.submit(method, long.request.id).result(60)
            assert pool.submit(engine.stats).result(60).waiting >= 1
        finally:
            go_on.set()
    assert len(other.tokens) == len(third.tokens) == 12
    assert long.finish_reason in ("abort", "length")


def test_no_step_is_run_after_the_engine_has_failed(
    tiny_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine()
    schedule, run, late = DataParallelScheduler.schedule, Runner.run, []

    def fail_first(scheduler: DataParallelScheduler, **fields: Any) -> SchedulerOutputs | None:
        engine.fail("the device is gone")
        return schedule(scheduler, **fields)

    def note(runner: Runner, scheduled: SchedulerOutputs) -> PendingStep:
        late.append(scheduled)
        return run(runner, scheduled)

    monkeypatch.setattr(DataParallelScheduler, "schedule", fail_first)
    monkeypatch.setattr(Runner, "run", note)
    assert submit(engine, prompt(5)).finish_reason == "error"
    engine.stop()
    assert not late


def test_nothing_compiles_after_ready(tiny_engine: MakeEngine) -> None:
    engine = tiny_engine()
    for i, fields in enumerate(MIXED):
        submit(engine, prompt(3 + 7 * i), **fields)
    submit(engine, prompt(50), 14, stop_token_ids=frozenset({1}), min_tokens=3).wait()
    assert engine.stats().compiles_after_ready == 0


def test_requests_that_cannot_be_served_name_the_field(tiny_engine: MakeEngine) -> None:
    engine = tiny_engine()
    wrong: list[tuple[dict[str, object], str]] = [
        ({"ids": ()}, "prompt"),
        ({"ids": (1, 97)}, "prompt"),
        ({"ids": (-1,)}, "prompt"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"min_tokens": 13}, "min_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"stop_token_ids": frozenset({97})}, "stop_token_ids"),
        ({"stop_token_ids": frozenset(range(40))}, "stop_token_ids"),
        ({"sampling": SamplingParams(logit_bias={97: 1.0})}, "logit_bias"),
    ]
    for fields, param in wrong:
        with pytest.raises(RequestError) as caught:
            submit(engine, fields.pop("ids", (1, 2)), **fields)  # type: ignore[arg-type]
        assert caught.value.param == param
    with pytest.raises(ContextLengthError, match=r"60 tokens.* 72 in all.* holds 64"):
        submit(engine, prompt(60))
    assert len(submit(engine, prompt(52)).tokens) == 12


def test_an_id_in_use_is_refused(tiny_engine: MakeEngine) -> None:
    engine = tiny_engine()
    first = submit(engine, prompt(4), 40, id="same")
    with pytest.raises(RequestError, match="same"):
        submit(engine, prompt(4), id="same")
    assert len(first.tokens) == 40
    assert len(submit(engine, prompt(4), id="same").tokens) == 12


def test_stop_ends_every_request(tiny_engine: MakeEngine) -> None:
    engine = tiny_engine()
    crowd = [submit(engine, prompt(5), 50) for _ in range(6)]
    engine.stop()
    for collected in crowd:
        assert collected.finish_reason in ("error", "length")
    with pytest.raises(EngineStoppedError):
        submit(engine, prompt(5))
