"""What the dashboard computes, held against Python and against Prometheus' definitions."""

import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Page
from prometheus_client.parser import text_string_to_metric_families

from tests.support.fake_server import Rig
from tests.web.browsing import Visit
from tests.web.dashboards import metrics


@pytest.fixture
def page(rig: Rig, visit: Callable[..., Visit]) -> Page:
    """One whose modules can be called."""
    return visit(rig.url + "/dashboard").page


def reference(q: float, bounds: list[float], counts: list[int]) -> float:
    """Prometheus' definition; ``counts`` are of each bucket alone, the last without a bound."""
    rank, seen = q * sum(counts), 0
    for bound, low, count in zip(bounds, [0.0, *bounds], counts, strict=False):
        if seen + count >= rank:
            return low + (bound - low) * (rank - seen) / count
        seen += count
    return bounds[-1]


def test_quantiles_are_those_of_prometheus(page: Page) -> None:
    rng = random.Random(5)
    cases, expected = [], []
    for _ in range(300):
        bounds = sorted(rng.sample(range(1, 1000), rng.randint(1, 15)))
        counts = [rng.choice((0, 0, 1, 2, rng.randint(0, 1000))) for _ in (*bounds, None)]
        q = rng.choice((0.5, 0.95, 0.99, rng.uniform(0.001, 0.999)))
        if not sum(counts):
            continue
        rising = list(itertools.accumulate(counts))
        cases.append([q, list(zip([*bounds, None], rising, strict=True))])
        expected.append(reference(q, [float(b) for b in bounds], counts))
    found = page.evaluate(
        """async (cases) => {
          const { quantile } = await import("/pages/dashboard-metrics.js");
          return cases.map(([q, buckets]) =>
            quantile(q, buckets.map(([bound, count]) => [bound ?? Infinity, count])));
        }""",
        cases,
    )
    assert len(found) > 250
    assert found == pytest.approx(expected, rel=1e-12)
    nothing = page.evaluate(
        """async () => {
          const { quantile } = await import("/pages/dashboard-metrics.js");
          return [quantile(0.5, [[1, 0], [Infinity, 0]]), quantile(0.5, [])];
        }"""
    )
    assert all(math.isnan(value) for value in nothing)


def test_the_text_is_read_as_prometheus_own_parser_reads_it(rig: Rig, page: Page) -> None:
    hard = (
        "# HELP odd Of \\n everything.\n# TYPE odd gauge\n"
        'odd{path="a\\\\b",said="\\"{,}\\"",line="\\n",name="\u2028}\r"} -1.5e-07\nodd +Inf\n'
        "# TYPE plain_total counter\nplain_total 12\n"
    )
    text = metrics(rig) + hard
    found: list[dict[str, Any]] = page.evaluate(
        """async (text) => {
          const { parse } = await import("/pages/dashboard-metrics.js");
          return parse(text);
        }""",
        text,
    )
    expected = [
        (sample.name, sample.labels, sample.value, family.type in ("counter", "histogram"))
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]
    read = [(each["name"], each["labels"], each["value"], each["grows"]) for each in found]
    assert read == expected


HISTORY = """async (answers) => {
  const { History } = await import("/pages/dashboard-history.js");
  const h = new History(1000);
  for (const answer of answers) {
    if (!answer) { h.gap(); continue; }
    const [time, start, counts, gauge] = answer;
    const sample = (name, value, grows) => ({ name, key: name, labels: {}, value, grows });
    h.add(time, [
      ...Object.entries(counts).map(([name, value]) => sample(name, value, true)),
      sample("process_start_time_seconds", start, false),
      sample("gauge", gauge, false),
    ]);
  }
  return ASKED;
}"""


def history(page: Page, answers: list[Any], asked: str) -> Any:
    """``asked`` of a history ``h``; an answer is (time, start, counts, gauge), or None: a gap."""
    return page.evaluate(HISTORY.replace("ASKED", asked), answers)


def test_a_rate_survives_a_restart(page: Page) -> None:
    answers = [
        (0, 1, {"c": 1000}, 1),
        (2, 1, {"c": 1010}, 1),
        (4, 9, {"c": 6}, 1),  # it began anew, and counted 6
        (6, 9, {"c": 16}, 1),
        (8, 20, {"c": 40}, 1),  # again, though it is more than it was
    ]
    rates = "[1, 2, 3, 4].map((i) => h.rate(i, 2, 'c'))"
    assert history(page, answers, rates) == [5, 3, 5, 20]
    assert history(page, answers, "h.increase(4, 60, 'c')") == 10 + 6 + 10 + 40


def test_nothing_is_computed_across_a_gap(page: Page) -> None:
    answers = [(0, 1, {"c": 5}, 3), (2, 1, {"c": 9}, 4), None, (60, 1, {"c": 90}, 5)]
    answers += [(62, 1, {"c": 94}, 6)]
    asked = "[0, 1, 2, 3].map((i) => [h.rate(i, 600, 'c'), h.sum(i, 'gauge'), h.stretches[i]])"
    found = history(page, answers, asked)
    assert [(gauge, stretch) for _, gauge, stretch in found] == [(3, 0), (4, 0), (5, 2), (6, 2)]
    rates = [rate for rate, *_ in found]
    assert [rates[1], rates[3]] == [2, 2]
    assert math.isnan(rates[0])
    assert math.isnan(rates[2])


def test_a_counter_that_appears_has_counted_from_zero(page: Page) -> None:
    answers = [(0, 1, {"c": 5}, 3), (2, 1, {"c": 5, "new": 4}, 4), (4, 1, {"c": 6, "new": 4}, 4)]
    assert history(page, answers, "[1, 2].map((i) => h.increase(i, 2, 'new'))") == [4, 0]
    assert history(page, answers, "h.increase(2, 60, 'none')") == 0


def test_what_is_old_is_forgotten(page: Page) -> None:
    answers = [(t, 1, {"c": t}, t) for t in range(0, 4000, 10)]
    length, first, rate, stretch = history(
        page, answers, "[h.length, h.times[0], h.rate(h.length - 1, 20, 'c'), h.stretches.at(-1)]"
    )
    assert 100 <= length < 115
    assert first >= 4000 - 1000 - 150
    assert (rate, stretch) == (1, 0)
