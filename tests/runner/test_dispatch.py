"""The host never waits in the middle of a step, neither for a value nor for a branch."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import pytest

from inferneo_jax.engine.engine import Engine
from inferneo_jax.runner.runner import PendingStep, Runner
from inferneo_jax.scheduler.scheduler import SchedulerOutputs
from inferneo_jax.text.grammar import GrammarCompiler, regex_constraint
from tests.support.instant_device import INSTANT_ENGINE, instant_runner
from tests.support.tiny_model import MIXED, make_runner, prompt, submit
from tests.support.walks import tiny_speller


@dataclass
class Watch:
    """What the host reads of the results of its programs.

    Attributes:
        steps: number of steps that were dispatched so far.
        dispatching: whether one is being dispatched.
        reads: for each read, the step that it belongs to, and how many had been dispatched.
        early: reads while a step was being dispatched.
        unannounced: reads of arrays whose copy was not started when they were dispatched.
    """

    steps: int = 0
    dispatching: bool = False
    reads: list[tuple[int, int]] = field(default_factory=list)
    early: int = 0
    unannounced: int = 0

    def results(self, _: Any, results: Any) -> Any:
        """The results of a program, watched."""
        return jax.tree.map(lambda array: Watched(array, self, self.steps), results)

    def runner(self, **fields: Any) -> Runner:
        """A runner that tells this watch when it dispatches a step."""
        runner = instant_runner(note=self.results, slots=16, **fields)
        run = runner.run

        def note(scheduled: SchedulerOutputs) -> PendingStep:
            self.dispatching = True
            step = run(scheduled)
            self.dispatching = False
            self.steps += 1
            return step

        runner.run = note  # type: ignore[method-assign]
        return runner


class Watched:
    """An array of the device that knows when the host reads it, in whatever way."""

    def __init__(self, array: jax.Array, watch: Watch, step: int) -> None:
        self._array, self._watch, self._step = array, watch, step
        self._copied = False
        self.shape, self.dtype = array.shape, array.dtype

    def copy_to_host_async(self) -> None:
        self._copied = True

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray[Any, Any]:
        self._watch.reads.append((self._step, self._watch.steps))
        self._watch.early += self._watch.dispatching
        self._watch.unannounced += not self._copied
        return np.asarray(self._array)

    def __bool__(self) -> bool:
        raise AssertionError("the host decides something by a result")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # numpy asks for other ways to read an array
        raise AssertionError(f"the host calls {name} of a result")


@pytest.mark.parametrize("decode_steps", [1, 4])
def test_the_host_reads_one_array_a_step_after_the_next_is_dispatched(decode_steps: int) -> None:
    watch = Watch()
    engine = Engine(watch.runner(decode_steps=decode_steps))
    try:
        requests = [submit(engine, prompt(9, seed=i), 50) for i in range(8)]
        assert [len(each.tokens) for each in requests] == [50] * 8
        steps = engine.stats().steps
    finally:
        engine.stop()
    assert (watch.early, watch.unannounced) == (0, 0)
    assert all(dispatched >= step + 2 for step, dispatched in watch.reads[:-decode_steps])
    prefills = 8
    assert steps <= len(watch.reads) <= steps + prefills
    assert max(Counter(step for step, _ in watch.reads).values()) <= 1 + decode_steps


def test_what_grammars_allow_is_asked_while_the_forward_pass_runs() -> None:
    watch, speller = Watch(), tiny_speller()
    engine = Engine(watch.runner(decode_steps=4), GrammarCompiler(speller, 4))
    try:
        forever = regex_constraint(f"{speller.token_text(0)}{{60,}}")
        fields = [{"constraint": forever}, {}] * 4
        requests = [submit(engine, prompt(9, seed=i), 50, **fields[i]) for i in range(8)]
        assert [len(each.tokens) for each in requests] == [50] * 8
    finally:
        engine.stop()
    assert (watch.early, watch.unannounced) == (0, 0)
    # They are sampled, and so counted, after their step was dispatched.
    assert all(dispatched >= step + 1 for step, dispatched in watch.reads[:-1])
    assert sum(dispatched == step + 1 for step, dispatched in watch.reads) > 40


def test_nothing_is_read_early_whatever_requests_ask_for() -> None:
    watch = Watch()
    engine = Engine(watch.runner())
    try:
        requests = [submit(engine, prompt(9, seed=i), 20, **MIXED[i]) for i in range(len(MIXED))]
        assert all(len(each.tokens) == 20 for each in requests)
        assert any(each.logprobs for each in requests)
    finally:
        engine.stop()
    assert (watch.early, watch.unannounced) == (0, 0)


def test_no_program_branches_on_the_device() -> None:
    """A GPU's host would wait for the value that a branch depends on, and dispatch nothing more."""
    programs = make_runner(INSTANT_ENGINE)._programs
    for key in programs.all_keys():
        text = programs.lower(key).as_text()
        assert "stablehlo." in text
        assert "stablehlo.case" not in text, key
        assert "stablehlo.if" not in text, key
