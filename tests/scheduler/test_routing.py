"""Where requests go: a router that knows prefixes finds more of them, and overloads nobody."""

import functools

import pytest

from tests.tools.routing import ROUTERS, Device, Figures, Load, Simulation, roofline

DEVICE = Device(
    weights=0.005, position=1e-7, token=1e-4, pair=0.0, pages=1500, page_len=16, slots=32
)
LOAD = Load(
    rate=120.0,
    systems=12,
    system_tokens=256,
    user_tokens=32,
    answer_tokens=8,
    turns=4.0,
    think_seconds=0.5,
)
PREFIX_AWARE = [name for name in ROUTERS if name not in ("round robin", "fewest in flight")]


@functools.cache
def figures(name: str) -> Figures:
    return Simulation(ROUTERS[name], DEVICE, 4, LOAD).run(warm=2.0, seconds=3.0)


@pytest.mark.parametrize("name", PREFIX_AWARE)
def test_knowing_prefixes_beats_round_robin_and_keeps_the_balance(name: str) -> None:
    blind, aware = figures("round robin"), figures(name)
    assert len(aware.ttft) > 150
    assert aware.unanswered < 5  # those that had just arrived when it ended
    assert aware.hit_rate > blind.hit_rate + 0.08
    assert aware.imbalance < 2
    assert aware.percentile(0.99) < blind.percentile(0.99)


def test_round_robin_gives_everybody_as_many() -> None:
    requests = figures("round robin").requests
    assert max(requests) - min(requests) <= 1


def test_a_step_takes_the_longer_of_reading_and_computing() -> None:
    device = Device(weights=1.0, position=0.01, token=0.1, pair=0.001, pages=1, page_len=1, slots=1)
    assert device.seconds([100]) == pytest.approx(2.0)  # reads the weights and 100 positions
    assert device.seconds([], [(100, 40)]) == pytest.approx(4.0 + 0.001 * 40 * 120)  # computes


def test_an_h100_reads_8_billion_weights_in_5_ms() -> None:
    device = roofline("meta-llama/Llama-3.1-8B", "h100", "none", page_len=16, slots=256)
    assert device.weights == pytest.approx(15e9 / 3350e9, rel=0.05)
    assert device.position == pytest.approx(131_072 / 3350e9, rel=0.01)
    assert device.token == pytest.approx(15e9 / 989e12, rel=0.05)
    assert device.pages * device.page_len > 300_000
