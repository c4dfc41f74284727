"""What the figures of a benchmark mean."""

import pytest

from server.cli.bench.compare import pair_up
from server.cli.bench.errors import BenchError
from server.cli.bench.stats import (
    Sample,
    meets,
    parse_goodput,
    percentiles,
    steady_decode,
    summarize,
)


def sample(*arrivals: float, tokens: int | None = None, **fields: object) -> Sample:
    made = Sample(start=0.0, arrivals=list(arrivals), end=arrivals[-1] if arrivals else 1.0)
    made.output_tokens = len(arrivals) if tokens is None else tokens
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_a_percentile_is_a_measured_value_that_enough_do_not_exceed() -> None:
    values = [float(i) for i in range(1, 101)]
    assert percentiles(values) == {
        "p50": 50.0,
        "p90": 90.0,
        "p99": 99.0,
        "max": 100.0,
        "mean": 50.5,
    }
    assert percentiles([7.0]) == {"p50": 7.0, "p90": 7.0, "p99": 7.0, "max": 7.0, "mean": 7.0}
    assert percentiles([]) is None
    # A value of weight three counts as three.
    assert percentiles([1.0, 5.0], [3.0, 1.0]) == percentiles([1.0, 1.0, 1.0, 5.0])


def test_the_first_token_is_no_gap() -> None:
    one = sample(10.0, 10.5, 11.5)
    assert one.ttft == 10.0
    assert one.gaps() == ([0.5, 1.0], [1.0, 1.0])
    assert one.itl == 0.75 == (one.e2e - one.ttft) / 2  # with one token a chunk, vLLM's TPOT
    assert sample(10.0).itl is None
    assert sample().ttft is None


def test_a_gap_that_brings_four_tokens_is_four_short_ones() -> None:
    known = sample(1.0, 3.0, 3.5, chunk_tokens=[2, 4, 1])
    assert known.gaps() == ([0.5, 0.5], [4, 1])
    unknown = sample(1.0, 3.0, 5.0, tokens=12)
    assert unknown.gaps() == ([0.5, 0.5], [4.0, 4.0])


def test_throughput_counts_what_succeeded_over_the_whole_time() -> None:
    good = sample(1.0, 2.0, prompt_tokens=10)
    late = sample(7.0, 8.0, prompt_tokens=10, start=4.0)
    bad = sample(1.0, error="HTTP 503", end=3.0, prompt_tokens=10, output_tokens=1)
    figures = summarize([good, late, bad])
    assert figures["seconds"] == 8.0
    assert (figures["requests"], figures["completed"]) == (3, 2)
    assert figures["errors"] == {"HTTP 503": 1}
    assert figures["output_tokens_per_second"] == 4 / 8
    assert figures["total_tokens_per_second"] == 24 / 8
    assert figures["requests_per_second"] == 2 / 8
    assert figures["ttft"]["p99"] == 3.0
    of_none = summarize([])
    assert (of_none["output_tokens_per_second"], of_none["ttft"]) == (0.0, None)


def test_goodput_counts_failures_as_not_good() -> None:
    fast, slow = sample(0.4, 0.44), sample(0.6, 0.64)
    failed = sample(0.1, error="timeout")
    limits = parse_goodput("ttft=500, itl=50")
    assert limits == {"ttft": 0.5, "itl": 0.05}
    assert [meets(each, limits) for each in (fast, slow, failed)] == [True, False, False]
    goodput = summarize([fast, slow, failed], limits)["goodput"]
    assert goodput["share"] == pytest.approx(1 / 3)
    assert goodput["requests_per_second"] == pytest.approx(1 / 0.64)


@pytest.mark.parametrize("limit", ["ttft=0.1", "itl=0.1", "e2e=0.1"])
def test_each_limit_is_looked_at(limit: str) -> None:
    assert not meets(sample(0.4, 0.8), parse_goodput(limit))
    assert meets(sample(0.4), parse_goodput("itl=1"))  # a single token has none


@pytest.mark.parametrize("text", ["ttft", "ttft=x", "speed=3", "ttft=-1", "itl=inf", "itl=nan"])
def test_wrong_limits_are_named(text: str) -> None:
    with pytest.raises(BenchError, match="--goodput holds"):
        parse_goodput(text)


def test_turns_have_times_to_first_token_of_their_own() -> None:
    figures = summarize([sample(2.0, 3.0), sample(0.5, 1.0, turn=2)])
    first, second = figures["ttft_of_turns"]
    assert (first["p50"], second["p50"]) == (2.0, 0.5)


def test_steady_decode_looks_only_at_the_time_when_all_were_decoding() -> None:
    early = sample(0.0, 1.0, 2.0, 3.0, 4.0)
    late = sample(2.0, 3.0, 4.0, 5.0, 6.0)
    figures = steady_decode([early, late])
    assert figures == {"tokens_per_second": 2.0, "step_seconds": 1.0, "seconds": 2.0}
    assert steady_decode([sample(0.0, 1.0), sample(5.0, 6.0)]) is None


def test_ratios_are_taken_within_a_round() -> None:
    def levels(rate: float, ttft: float | None) -> list[dict[str, object]]:
        figures = ttft and {"p50": ttft, "p99": ttft}
        row = {"level": "1", "clients": 1, "output_tokens_per_second": rate}
        return [row | {"ttft": figures, "itl": None}]

    rounds = [
        {"a": levels(10.0, 0.1), "b": levels(5.0, 0.2)},
        {"a": levels(100.0, 0.1), "b": levels(100.0, 0.1)},
        {"a": levels(30.0, 0.3), "b": levels(10.0, 0.1)},
    ]
    (row,) = pair_up(rounds, "a", "b")
    rate = row["output_tokens_per_second"]
    assert (rate["a"], rate["b"]) == (30.0, 10.0)
    assert (rate["ratio"], rate["ratio_min"], rate["ratio_max"]) == (2.0, 1.0, 3.0)
    assert row["ttft_p50"]["ratio"] == 1.0
    assert "itl_p50" not in row
