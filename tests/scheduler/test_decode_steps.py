"""Several decode steps in one dispatch: when there are some, and that tokens are the same."""

from collections.abc import Iterator
from typing import Any

import pytest

from inferneo_jax.config import MeshShape
from inferneo_jax.engine.engine import Engine
from inferneo_jax.runner.runner import PendingStep, Runner
from inferneo_jax.scheduler.scheduler import SchedulerOutputs
from tests.support.simulated_runner import Simulation, Speed
from tests.support.tiny_model import (
    Collected,
    MakeEngine,
    close_all,
    close_when_preempted,
    mixed,
    prompt,
    submit,
)

UNBOUNDED = 60_000.0
"""An ITL budget, in milliseconds, that any number of steps keeps."""


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many decode steps each dispatch of the test has."""
    counts, run = [], Runner.run

    def note(self: Runner, scheduled: SchedulerOutputs) -> PendingStep:
        counts.append(max(rank.num_steps for rank in scheduled))
        return run(self, scheduled)

    monkeypatch.setattr(Runner, "run", note)
    return counts


@pytest.fixture
def together(tiny_engine: MakeEngine, dispatched: list[int]) -> Iterator[MakeEngine]:
    """Makes engines that dispatch up to five steps; some of them must have."""
    yield lambda **fields: tiny_engine(itl_budget=UNBOUNDED, decode_steps=5, **fields)
    assert max(dispatched) == 5


@pytest.mark.parametrize("kernels", ["xla", "native"])
def test_several_steps_at_once_equal_one_at_a_time(
    tiny_engine: MakeEngine, together: MakeEngine, kernels: str
) -> None:
    several = together(kernels=kernels)
    expected = mixed(tiny_engine(kernels=kernels), together=False)
    close_all(expected, mixed(several))
    close_all(expected, mixed(several, together=False))


@pytest.mark.parametrize("most", [1, 2, 5, 6, 7, 12])
def test_no_more_tokens_come_than_were_asked_for(together: MakeEngine, most: int) -> None:
    engine = together()
    long = submit(engine, prompt(9), 30)
    assert len(submit(engine, prompt(5), most).tokens) == most
    assert len(long.tokens) == 30


@pytest.mark.parametrize("most", [2, 3, 7])
def test_log_probabilities_end_with_the_request_that_wants_them(
    tiny_engine: MakeEngine, together: MakeEngine, most: int
) -> None:
    def answers(engine: Engine) -> list[Collected]:
        long = submit(engine, prompt(9), 30)
        return [submit(engine, prompt(5), most, logprobs=2).wait(), long.wait()]

    scored, plain = answers(together())
    assert len(scored.logprobs) == most
    close_all([scored, plain], answers(tiny_engine()))


def test_a_stop_token_among_them_ends_the_request(together: MakeEngine) -> None:
    engine = together()
    free = submit(engine, prompt(9), 20).tokens
    for stop in dict.fromkeys(free[2:12]):
        stopped = submit(engine, prompt(9), 20, stop_token_ids=frozenset({stop}))
        assert stopped.tokens == free[: free.index(stop) + 1]
        assert stopped.finish_reason == "stop"


def test_where_blocks_are_short_steps_are_fewer_and_tokens_the_same(
    tiny_engine: MakeEngine, together: MakeEngine
) -> None:
    close_when_preempted(tiny_engine(), together(kv_tokens=64))


def test_an_abort_among_them_leaves_no_trace(together: MakeEngine) -> None:
    engine = together()
    for count in (1, 2, 7):
        aborted = submit(engine, prompt(9), 40)
        aborted.wait_for_tokens(count)
        engine.abort(aborted.request.id)
        aborted.wait()
    expected = submit(engine, prompt(9), 20, cache_salt=b"x")
    assert expected.tokens == submit(engine, prompt(9), 20).tokens


def test_ranks_of_a_mesh_run_several_steps_too(tiny_engine: MakeEngine) -> None:
    fields: dict[str, Any] = {"slots": 8, "kv_tokens": 640, "prefill_chunks": (8,)}
    mesh = {"mesh": MeshShape(data=2, model=1), "row_buckets": (4,)}
    several = tiny_engine(**fields, **mesh, itl_budget=UNBOUNDED, decode_steps=5)
    one = tiny_engine(**fields, row_buckets=(8,))
    close_all(mixed(one), mixed(several))


def test_steps_are_as_many_as_half_of_the_budget_holds() -> None:
    """12 ms a step, 100 ms of budget: four; a stream's tokens come in groups of them."""
    run = Simulation(budget=100.0, decode_steps=8, speed=Speed(decode=0.012))
    stream = run.stream(max_tokens=100)
    run.run()
    counts = [max(rank.num_steps for rank in step) for step in run.runner.steps]
    assert max(counts) == 4
    gaps = [gap for gap in stream.gaps if gap]
    assert max(gaps) == pytest.approx(4 * 0.012)
    assert len(gaps) < 40
    assert run.stats.steps == pytest.approx(100, abs=2)


def test_a_prompt_waits_for_the_steps_that_are_dispatched_only() -> None:
    """No more than those that run and those after them, which together keep the budget."""
    run = Simulation(budget=100.0, decode_steps=8, speed=Speed(decode=0.012))
    run.stream(max_tokens=400)
    late = [run.prompt(40, at=0.5 + 0.37 * i) for i in range(5)]
    run.run()
    for each in late:
        assert each.ttft <= 0.100 + 0.012 + Speed().prefill(256)


def test_steps_are_single_while_prompts_are_computed() -> None:
    run = Simulation(budget=100.0, decode_steps=8, speed=Speed(decode=0.012))
    run.stream(max_tokens=200)
    run.prompt(2000, at=0.6)
    run.run()
    for step in run.runner.steps:
        if any(rank.prefill for rank in step):
            assert max(rank.num_steps for rank in step) <= 1


def test_steps_are_single_while_drafts_are_allowed(
    tiny_engine: MakeEngine, dispatched: list[int]
) -> None:
    plain = tiny_engine()
    engine = tiny_engine(itl_budget=UNBOUNDED, decode_steps=5, speculation="ngram")
    assert submit(engine, prompt(9), 30).tokens == submit(plain, prompt(9), 30).tokens
    assert max(dispatched) == 1
