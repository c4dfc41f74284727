"""Owners share the engine evenly, whatever they ask for."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from inferneo_jax.request import GenerationOutput, GenerationRequest
from inferneo_jax.scheduler.sequence import Sequence
from tests.scheduler.house import House
from tests.support.tiny_model import Collected, MakeEngine, prompt, submit


def steps_until_first_token(house: House, sequence: Sequence) -> int:
    for step in range(1000):
        if sequence.output:
            return step
        house.step()
    raise AssertionError("it never got a token")


def test_a_flood_of_one_owner_does_not_starve_another() -> None:
    house = House()
    for _ in range(50):
        house.add("flood", 1000)
    house.step(200)
    assert len(house.scheduler.running) == 4
    assert steps_until_first_token(house, house.add("other", 10)) <= 4


def test_slots_come_to_be_shared_evenly_and_stay_so() -> None:
    house = House(slots=6, blocks=10_000)
    for owner in "aaaaaaaaaabbbbbbcccc":
        house.add(owner, 3000)
    house.step(200)
    before = house.scheduler.num_preemptions
    house.step(1000)
    slots = Counter(sequence.request.owner for sequence in house.scheduler.running)
    assert slots == {"a": 2, "b": 2, "c": 2}
    assert before <= 6
    assert house.scheduler.num_preemptions == before


def test_two_who_always_ask_get_as_many_tokens_whatever_their_requests() -> None:
    house = House(slots=2)
    for _ in range(150):
        house.add("short", 10)
        house.add("long", 100)
    house.step(1500)
    assert 0.8 < house.tokens["short"] / house.tokens["long"] < 1.25


def test_who_comes_late_gets_no_credit_for_its_absence() -> None:
    house = House(slots=2)
    for _ in range(300):
        house.add("early", 20)
    house.step(2000)
    for _ in range(300):
        house.add("late", 20)
    house.tokens.clear()
    house.step(1000)
    assert 0.8 < house.tokens["early"] / house.tokens["late"] < 1.25


def test_priority_orders_an_owners_own_requests_only() -> None:
    house = House(slots=1)
    house.add("a", 5)
    house.step(3)
    usual = [house.add("a", 5), house.add("b", 5)]
    first = [house.add("a", 5, priority=-3), house.add("b", 5, priority=-5)]
    ended: list[Sequence] = []
    for _ in range(200):
        house.step()
        ended += [s for s in house.sequences[1:] if s.finished and s not in ended]
    assert [s.request.owner for s in ended] in (["b", "a", "b", "a"], ["b", "a", "a", "b"])
    for important, other in zip(first, usual, strict=True):
        assert ended.index(important) < ended.index(other)


def test_one_owner_is_served_in_order_of_arrival() -> None:
    house = House(slots=3)
    for _ in range(40):
        house.add("", 7)
    house.run()
    assert house.scheduler.num_preemptions == 0
    first = [sequence.order for sequence in house.sequences]
    assert first == sorted(first)


def test_memory_is_taken_from_the_owner_who_holds_most() -> None:
    house = House(slots=8, blocks=64)
    small = house.add("small", 100)
    house.step(3)
    for _ in range(7):
        house.add("large", 100)
    house.run()
    assert house.scheduler.num_preemptions > 0
    assert small.finished


MOVES = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"),
            st.sampled_from(["a", "a", "b", "c"]),
            st.integers(1, 60),
            st.integers(1, 40),
            st.integers(-1, 1),
        ),
        st.tuples(st.just("end"), st.integers(0, 1000)),
        st.tuples(st.just("pause"), st.integers(0, 1000)),
        st.tuples(st.just("step"), st.integers(1, 30)),
    ),
    max_size=60,
)


@given(moves=MOVES, slots=st.integers(1, 5), blocks=st.integers(27, 120))
@settings(max_examples=150, deadline=None)
def test_whatever_happens_all_is_served_and_comes_back(
    moves: list[tuple[object, ...]], slots: int, blocks: int
) -> None:
    house = House(slots, blocks)
    for move, *values in moves:
        living = [s for s in house.sequences if not s.finished]
        if move == "add":
            owner, tokens, length, priority = values
            house.add(owner, tokens, length, priority)  # type: ignore[arg-type]
        elif move == "step":
            house.step(values[0])  # type: ignore[arg-type]
        elif living:
            sequence = living[values[0] % len(living)]  # type: ignore[operator]
            if move == "pause":
                sequence.paused = not sequence.paused
            else:
                house.end(sequence)
                sequence.deliver(reason="abort")
    for sequence in house.sequences:
        sequence.paused = False
    house.run()
    counts = house.scheduler.counts()
    assert (counts["slots_used"], counts["pages_used"], counts["waiting"]) == (0, 0, 0)
    assert not house.scheduler._share._sequences, "it counts owners that have nothing left"
    assert counts["slots"] == slots


def test_who_is_put_off_for_another_owner_gets_the_same_tokens(tiny_engine: MakeEngine) -> None:
    engine = tiny_engine(slots=3, kv_tokens=240)
    expected = [submit(engine, prompt(9, seed=i), 50).tokens for i in range(6)]
    before = engine.stats().preemptions
    flood = [submit(engine, prompt(9, seed=i), 50, owner="flood") for i in range(6)]
    flood[2].wait_for_tokens(3)
    order: list[str] = []

    class Noted(Collected):
        def __call__(self, output: GenerationOutput) -> None:
            if output.finish_reason:
                order.append(self.request.owner)
            super().__call__(output)

    request = GenerationRequest(
        id="other",
        prompt=prompt(9, seed=1),
        max_tokens=4,
        owner="other",
        sampling=flood[0].request.sampling,
    )
    other = Noted(request)
    engine.submit(request, other)
    assert other.tokens == expected[1][:4]
    assert not flood[5].outputs
    assert [collected.tokens for collected in flood] == expected
    assert engine.stats().preemptions == before + 1
