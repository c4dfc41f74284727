"""Prompts are prefilled several at a time, none twice, in the shape that is worth most."""

import math
from typing import Any

import jax
import numpy as np
import pytest

from inferneo_jax.config import MeshShape
from inferneo_jax.runner.capacity import make_programs
from inferneo_jax.runner.programs import Admit, Called, Constrain, Decode, Mixed, Prefill, Verify
from inferneo_jax.runner.runner import Runner
from inferneo_jax.scheduler.prefill import PrefillShapes, Shape
from tests.scheduler.house import House
from tests.support.tiny_model import (
    GREEDY,
    MIXED,
    TINY_ENGINE,
    MakeEngine,
    close,
    close_all,
    prompt,
    submit,
    tiny_backend,
)


def chosen(shapes: PrefillShapes, lengths: list[int]) -> Shape:
    """The shape for prompts of these lengths while nothing limits it."""
    return shapes.choose(lengths, {(rows, chunk): rows * chunk for rows, chunk in shapes.shapes})


def test_each_chunk_has_one_row_or_as_many_as_the_longest_holds() -> None:
    shapes = PrefillShapes.of((32, 128, 256), slots=32, overhead=32, padding=0.125)
    assert shapes.shapes == ((1, 32), (1, 128), (1, 256), (2, 128), (8, 32))
    assert (shapes.max_tokens, shapes.max_rows) == (256, 8)
    assert PrefillShapes.of((32, 256), slots=4, overhead=32).shapes == ((1, 32), (4, 32), (1, 256))


def test_rows_that_cost_as_much_empty_are_had_in_fewer_numbers_too() -> None:
    shapes = PrefillShapes.of((256, 1024, 2048), slots=256, overhead=256)
    assert shapes.shapes == ((1, 256), (1, 1024), (4, 256), (1, 2048), (2, 1024), (8, 256))
    # Where 2,048 tokens would take too long beside decoding, short prompts still go four at a time.
    few = {shape: math.prod(shape) for shape in shapes.shapes if math.prod(shape) <= 1024}
    assert shapes.choose([200] * 16, few) == (4, 256)
    assert chosen(shapes, [200] * 16) == (8, 256)


@pytest.mark.parametrize(
    ("lengths", "shape"),
    [
        ([20], (1, 32)),
        ([105], (1, 128)),
        ([200], (1, 256)),
        ([105] * 16, (2, 128)),
        ([20] * 16, (8, 32)),
        ([130] * 16, (8, 32)),
        ([20] * 7 + [300], (8, 32)),
        ([20, 20], (1, 32)),
        ([3000], (1, 256)),
        ([3000, 20, 20], (1, 256)),
        ([20, 3000], (2, 128)),
    ],
)
def test_the_shape_computes_most_for_its_cost(lengths: list[int], shape: Shape) -> None:
    assert chosen(PrefillShapes.of((32, 128, 256), slots=32, overhead=32), lengths) == shape


@pytest.mark.parametrize(
    ("lengths", "shape"),
    [([20], (1, 32)), ([105] * 16, (2, 128)), ([20, 20], (2, 128)), ([300], (1, 256))],
)
def test_where_padding_is_cheap_a_shape_may_have_more_of_it(
    lengths: list[int], shape: Shape
) -> None:
    shapes = PrefillShapes.of((32, 128, 256), slots=32, overhead=32, padding=0.125)
    assert chosen(shapes, lengths) == shape


def test_short_prompts_that_arrive_together_are_prefilled_together() -> None:
    house = House()
    for _ in range(4):
        house.add("", 3, length=4)
    house.step(2)
    assert house.chunks == [2, 2]


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    house = House(blocks=10_000)
    long = house.add("", 3, length=400)
    house.step(3)
    short = house.add("", 3, length=6)
    house.step(4)
    assert short.output
    assert not long.output


def test_short_prompts_do_not_starve_a_long_one() -> None:
    house = House(slots=8, blocks=10_000)
    long = house.add("", 3, length=400)
    steps = 0
    while not long.output:
        for _ in range(2):
            house.add("", 1, length=8)
        house.step()
        steps += 1
    assert steps <= 2 * 400 / 8 + 4


def test_no_row_is_computed_for_a_request_that_is_sure_to_be_over() -> None:
    house = House()
    tokens = [1, 2, 9, 30]
    for each in tokens:
        house.add("", each)
    house.run()
    assert sum(house.rows) == sum(tokens) - len(tokens)  # the first comes from the prefill


def test_a_prompt_waits_for_the_blocks_that_another_computes() -> None:
    house = House(slots=5)
    start = tuple(range(22))
    for tail in range(4):
        house.add("", 3, prompt=(*start, 50 + tail))
    other = house.add("", 3, length=4)
    house.run()
    assert [sequence.cached_tokens for sequence in house.sequences] == [0, 20, 20, 20, 0]
    assert other.finished


def test_who_waits_for_blocks_goes_on_when_they_do_not_come() -> None:
    house = House()
    start = tuple(range(40))
    first, second = (house.add("", 3, prompt=(*start, 50 + i)) for i in range(2))
    house.step(2)
    assert (first.slot is None, second.slot is None) == (False, True)
    house.end(first)
    first.deliver(reason="abort")
    house.run()
    assert second.finished


def test_prompts_that_begin_alike_and_arrive_together_are_computed_once(
    tiny_engine: MakeEngine,
) -> None:
    engine, alone = tiny_engine(), tiny_engine(prefill_chunks=(64,))
    prompts = [(*prompt(21), *prompt(3, seed=i)) for i in range(4)]
    expected = [
        submit(alone, ids, logprobs=1, cache_salt=bytes([i])) for i, ids in enumerate(prompts)
    ]
    together = [submit(engine, ids, logprobs=1) for ids in prompts]
    for got, wanted in zip(together, expected, strict=True):
        close(got, wanted)
    assert [collected.outputs[0].cached_tokens for collected in together] == [0, 20, 20, 20]
    assert engine.stats().prompt_tokens == 24 + 3 * 4


@pytest.mark.parametrize("mesh", [MeshShape(1, 1), MeshShape(2, 1)], ids=str)
def test_what_is_prefilled_in_the_pass_that_decodes_equals_what_is_alone(
    tiny_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, mesh: MeshShape
) -> None:
    used, execute = [], Runner.execute

    def note(self: Runner, key: Any, arguments: Any) -> Any:
        used.append(key)
        return execute(self, key, arguments)

    monkeypatch.setattr(Runner, "execute", note)
    engine, alone = (
        tiny_engine(mesh=mesh, slots=4 * mesh.data, prefill_chunks=(4, 16)),
        tiny_engine(),
    )
    prompts = [prompt(1 + 3 * i, seed=i) for i in range(len(MIXED))]
    expected = [
        submit(alone, ids, **fields).wait() for ids, fields in zip(prompts, MIXED, strict=True)
    ]
    assert not any(isinstance(key, Mixed) for key in used)
    streams = [submit(engine, prompt(2, seed=i), 60, sampling=GREEDY) for i in range(2)]
    for stream in streams:
        stream.wait_for_tokens(2)
    beside = [submit(engine, ids, **fields) for ids, fields in zip(prompts, MIXED, strict=True)]
    close_all(beside, expected)
    close_all(streams, [submit(alone, prompt(2, seed=i), 60, sampling=GREEDY) for i in range(2)])
    assert sum(isinstance(key, Mixed) for key in used) > 3


def test_prompts_prefilled_together_equal_those_prefilled_alone(tiny_engine: MakeEngine) -> None:
    engine, alone = tiny_engine(prefill_chunks=(4, 16)), tiny_engine()
    prompts = [prompt(1 + 3 * i, seed=i) for i in range(len(MIXED))]
    expected = [
        submit(alone, ids, **fields).wait() for ids, fields in zip(prompts, MIXED, strict=True)
    ]
    together = [submit(engine, ids, **fields) for ids, fields in zip(prompts, MIXED, strict=True)]
    for got, wanted in zip(together, expected, strict=True):
        close(got, wanted)
        if scores := wanted.outputs[0].prompt_logprobs:
            others = got.outputs[0].prompt_logprobs
            assert others is not None
            for a, b in zip(scores[1:], others[1:], strict=True):
                assert a is not None
                assert b is not None
                assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


def test_times_are_taken_with_all_rows_at_work() -> None:
    programs = make_programs(tiny_backend(), TINY_ENGINE, lambda: 0)

    def busy_rows(key: Called) -> Any:
        (busy,) = programs.busy_arguments(key)
        return busy

    for key in programs.keys():  # noqa: SIM118  (no dictionary)
        busy = programs.busy_arguments(key)
        idle = programs.host_arguments(key)
        assert jax.tree.map(np.shape, busy) == jax.tree.map(np.shape, idle)
        if isinstance(key, Admit | Constrain):
            continue
        (busy,) = busy
        if isinstance(key, Mixed):
            assert jax.tree.all(
                jax.tree.map(np.array_equal, busy.decode, busy_rows(Decode(key.rows)))
            )
            assert jax.tree.all(jax.tree.map(np.array_equal, busy.prefill, busy_rows(key.prefill)))
            continue
        assert (busy.slots < TINY_ENGINE.slots).all()
        if not isinstance(key, Prefill):
            assert not busy.pages.any()  # nothing is written that anybody reads
        match key:
            case Verify(_, tokens):
                assert (busy.num_drafted == tokens - 1).all()
            case Prefill(_, tokens):
                assert (busy.length == tokens).all()
