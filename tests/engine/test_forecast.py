"""What is estimated of requests that would have to wait."""

import time

import pytest

from inferneo_jax.engine.forecast import Forecast
from inferneo_jax.request import EngineTotals, GenerationRequest
from inferneo_jax.scheduler.sequence import Sequence
from tests.support.tiny_model import MakeEngine, prompt, submit

SLOTS, ALLOWANCE = 4, 16
STEP = 0.01
NOTHING_SPARED = EngineTotals(prompt_tokens=100, output_tokens=100)


def asked(
    max_tokens: int = 100, *, length: int = 1, owner: str = "", priority: int = 0
) -> GenerationRequest:
    return GenerationRequest(
        id="", prompt=(1,) * length, max_tokens=max_tokens, owner=owner, priority=priority
    )


def live(request: GenerationRequest, written: int = 0) -> Sequence:
    sequence = Sequence(request, lambda _: None, 0)
    if written:
        sequence.num_computed, sequence.num_sampled = len(request.prompt), written
    return sequence


@pytest.fixture
def forecast() -> Forecast:
    """Of an engine whose steps take 10 ms, and whose requests write 100 tokens if they may."""
    made = Forecast(SLOTS)
    for _ in range(100):
        made.stepped(STEP, steps=1)
        made.finished(100)
    return made


def seconds(
    forecast: Forecast,
    running: list[Sequence],
    *requests: GenerationRequest,
    totals: EngineTotals = NOTHING_SPARED,
) -> float:
    found = forecast.seconds(running, list(requests), totals, ALLOWANCE)
    assert found is not None
    return found


def test_nothing_is_said_of_what_need_not_wait(forecast: Forecast) -> None:
    three = [live(asked())] * 3
    assert forecast.seconds(three, [asked()], NOTHING_SPARED, ALLOWANCE) is None
    assert forecast.seconds([], [asked(10_000)] * 50, NOTHING_SPARED, ALLOWANCE) is None
    assert forecast.seconds(three, [asked()] * 2, NOTHING_SPARED, ALLOWANCE) is not None


def test_nothing_is_said_before_anything_is_known() -> None:
    forecast, full = Forecast(SLOTS), [live(asked())] * 9
    assert forecast.seconds(full, [asked()], EngineTotals(), ALLOWANCE) is None
    forecast.stepped(STEP, steps=1)
    for _ in range(7):
        forecast.finished(100)
        assert forecast.seconds(full, [asked()], EngineTotals(), ALLOWANCE) is None
    forecast.finished(100)
    assert forecast.seconds(full, [asked()], EngineTotals(), ALLOWANCE) is not None


def test_what_is_ahead_is_shared_by_the_slots(forecast: Forecast) -> None:
    half_done = [live(asked(), written=50)] * 4
    waiting = [live(asked())] * 6
    # 4 * 50 + 6 * 100 tokens in 4 slots, then 100 of its own, and a prompt of one token.
    assert seconds(forecast, half_done + waiting, asked()) == pytest.approx(3.0, abs=0.01)
    assert seconds(forecast, half_done, asked(), asked(), asked()) == pytest.approx(2.0, abs=0.01)


def test_requests_are_taken_to_be_as_long_as_those_before(forecast: Forecast) -> None:
    full = [live(asked(4000))] * 8
    assert seconds(forecast, full, asked(4000)) == pytest.approx(3.0, abs=0.01)
    assert seconds(forecast, full, asked(20)) == pytest.approx(2.2, abs=0.01)
    longer_than_expected = [live(asked(4000), written=3000)] * 8
    assert seconds(forecast, longer_than_expected, asked()) == pytest.approx(1.0, abs=0.01)


def test_prompts_take_steps_too(forecast: Forecast) -> None:
    full = [live(asked(1, length=1600))] * 8
    assert seconds(forecast, full, asked(1, length=160)) == pytest.approx(8.11, abs=0.01)


def test_it_follows_a_machine_that_gets_slower_and_recovers(forecast: Forecast) -> None:
    full = [live(asked())] * 8
    quick = seconds(forecast, full, asked())
    for _ in range(200):
        forecast.stepped(10 * STEP, steps=1)
    assert seconds(forecast, full, asked()) == pytest.approx(10 * quick, rel=0.05)
    for _ in range(1000):
        forecast.stepped(STEP, steps=1)
    assert seconds(forecast, full, asked()) == pytest.approx(quick, rel=0.5)


def test_cached_prefixes_and_drafts_save_steps(forecast: Forecast) -> None:
    totals = EngineTotals(
        prompt_tokens=100, cached_tokens=300, output_tokens=200, accepted_tokens=100
    )
    full = [live(asked(length=1600))] * 8
    # 200 prompt tokens a step beside 50 * 8 outputs in 4 slots; then its own.
    expected = STEP * (8 * 400 / ALLOWANCE + 400 / ALLOWANCE + 50)
    found = seconds(forecast, full, asked(length=1600), totals=totals)
    assert found == pytest.approx(expected, rel=0.01)


def test_an_owner_waits_for_its_share_and_not_for_a_flood(forecast: Forecast) -> None:
    flood = [live(asked(owner="flood"))] * 1000
    assert seconds(forecast, flood, asked(owner="flood")) > 200
    assert seconds(forecast, flood, asked(owner="other")) == pytest.approx(1.0, abs=0.01)
    own = [live(asked(owner="other"))] * 8
    assert seconds(forecast, flood + own, asked(owner="other")) == pytest.approx(5.0, abs=0.05)


def test_an_urgent_request_does_not_wait_for_the_others_of_its_owner(forecast: Forecast) -> None:
    full = [live(asked(priority=5))] * 40
    assert seconds(forecast, full, asked(priority=1)) == pytest.approx(1.0, abs=0.01)
    assert seconds(forecast, full, asked(priority=5)) == pytest.approx(11.0, abs=0.05)


def test_paused_sequences_take_no_steps(forecast: Forecast) -> None:
    full = [live(asked()) for _ in range(8)]
    for sequence in full:
        sequence.paused = True
    assert seconds(forecast, full, asked()) == pytest.approx(1.0, abs=0.01)


def test_an_engine_expects_what_then_happens(tiny_engine: MakeEngine) -> None:
    engine = tiny_engine()
    assert engine.forecast([asked()]) is None
    crowd = [submit(engine, prompt(5, seed=i), 50) for i in range(24)]
    for collected in crowd[:12]:
        collected.wait()
    began = time.monotonic()
    found = engine.forecast([asked(50)])
    submit(engine, prompt(5, seed=99), 50).wait()
    assert found is not None
    assert 0 < found < 10 * (time.monotonic() - began)
    for collected in crowd:
        collected.wait()
    assert engine.forecast([asked(50)]) is None
