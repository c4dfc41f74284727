"""The dashboard: what it shows is what `/metrics` says, as it moves under load."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import expect
from prometheus_client.parser import text_string_to_metric_families

from inferneo_jax import Tokenizer
from tests.support.fake_engine import writes
from tests.support.fake_server import CHAT, EMBED, Rig
from tests.support.paths import ROOT
from tests.web.browsing import Visit
from tests.web.dashboards import (
    metrics,
    number,
    open_dashboard,
    streams,
    tile,
    value,
    values,
    wait_for,
)

FRAME = "new Promise(requestAnimationFrame)"
"""Waits for what was drawn."""
DOCS = ROOT / "docs"


@pytest.fixture
def endless(rig: Rig, tokenizer: Tokenizer) -> Rig:
    """Its engine writes as much as it is asked for, once it is released."""
    rig.engine.script = writes(tokenizer, "abc", end=False)
    rig.engine.limit = 5
    return rig


def samples(rig: Rig) -> dict[str, float]:
    """By name alone; the values of several series are added."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(metrics(rig)):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def test_figures_move_with_the_load(endless: Rig, visit: Callable[..., Visit]) -> None:
    visited = open_dashboard(visit, endless.url)
    page = visited.page
    assert number(page, "Requests", 2) == "4"  # slots
    wait_for(lambda: value(page, "Requests") == 0 and value(page, "Output") == 0)
    before = samples(endless)
    with streams(endless, 3):
        wait_for(lambda: value(page, "Requests") == 3 and value(page, "Output") > 0)
        assert number(page, "Slots and places") == "75 %"
        held = round(100 * samples(endless)["vllm:kv_cache_usage_perc"], 2)
        wait_for(lambda: value(page, "KV cache") == pytest.approx(held, abs=0.02))
    wait_for(lambda: value(page, "Requests") == 0)
    after = samples(endless)
    grown = after["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"]
    assert grown == 3 * 60
    # All of them are within the ten seconds that a rate is of, but for those of the first sample.
    wait_for(lambda: value(page, "Finished sequences", 1) > 0)
    told = page.evaluate(
        """async () => {
          const { FIGURES } = await import("/pages/dashboard-figures.js");
          return FIGURES.map(({ title }) => title);
        }"""
    )
    assert told == [each.get_attribute("aria-label") for each in page.locator(".tile").all()]
    assert 0 < value(page, "Responses") <= 15
    assert number(page, "Time to first token") != "\N{EN DASH}"
    visited.shot("dashboard-after-load")
    visited.assert_accessible()


def test_numbers_are_those_of_metrics(rig: Rig, visit: Callable[..., Visit]) -> None:
    page = open_dashboard(visit, rig.url).page
    page.get_by_label("Percentiles over").select_option("5 min")
    wait_for(
        lambda: (
            value(page, "Cache hits and drafts") == -1 or value(page, "Cache hits and drafts") >= 0
        )
    )
    before = samples(rig)
    for prompt in ("abc", "abcdef", "abcdefghi"):
        body = {"model": CHAT, "prompt": prompt, "max_tokens": 4}
        assert rig.client.post("/v1/completions", json=body).status_code == 200
    rig.client.post("/v1/embeddings", json={"model": EMBED, "input": "abcd"})
    after = samples(rig)
    hits = after["vllm:prefix_cache_hits_total"] - before.get("vllm:prefix_cache_hits_total", 0)
    assert hits == 1 + 3 + 4
    share = round(100 * hits / 18)
    wait_for(lambda: value(page, "Cache hits and drafts") == share)
    rates: list[float] = []

    def received_and_embedded() -> bool:
        rates[:] = values(page, "Prompts")
        return min(rates[0], rates[2]) > 0

    wait_for(received_and_embedded)
    assert rates[0] / rates[2] == pytest.approx(18 / 4, rel=0.02)
    page.get_by_label("Model", exact=True).select_option(EMBED)
    wait_for(lambda: value(page, "Prompts", 0) == -1 or value(page, "Prompts", 0) == 0)
    assert value(page, "Prompts", 2) > 0
    assert number(page, "Requests") == "\N{EN DASH}"  # an embedding model has no slots
    assert value(page, "Memory") > 0  # of the whole server


@pytest.mark.parametrize(("width", "height", "dark"), [(390, 844, False), (1920, 1080, True)])
def test_it_fits_phones_and_walls(
    rig: Rig, visit: Callable[..., Visit], width: int, height: int, dark: bool
) -> None:
    viewport = {"width": width, "height": height}
    visited = open_dashboard(visit, rig.url, viewport=viewport, dark=dark)
    page = visited.page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    visited.shot(f"dashboard-{width}{'-dark' if dark else ''}")
    visited.assert_accessible()


def test_a_moment_is_told_in_all_plots(endless: Rig, visit: Callable[..., Visit]) -> None:
    page = open_dashboard(visit, endless.url).page
    page.get_by_label("Show", exact=True).select_option("1 min")
    with streams(endless, 2):
        wait_for(lambda: value(page, "Requests") == 2)
        page.wait_for_timeout(1000)  # more than a step of the slider
    wait_for(lambda: value(page, "Requests") == 0)
    page.get_by_role("button", name="Pause").click()
    slider = page.get_by_role("slider", name="Moment")
    expect(slider).to_have_attribute("aria-valuetext", "now")
    slider.focus()
    for _ in range(150):
        page.keyboard.press("ArrowLeft")
        page.evaluate(FRAME)
        if value(page, "Requests") == 2:
            break
    assert value(page, "Slots and places") == 50
    assert re.search(r"\d\d:\d\d:\d\d, \d+ s ago", slider.get_attribute("aria-valuetext") or "")
    assert page.locator(".cursor").count() > 5
    page.keyboard.press("Escape")
    expect(slider).to_have_attribute("aria-valuetext", "now")
    wait_for(lambda: value(page, "Requests") == 0)
    tile(page, "Requests").locator("svg.plot").hover()
    wait_for(lambda: page.locator(".cursor").count() > 5)
    page.mouse.move(0, 0)
    wait_for(lambda: page.locator(".cursor").count() == 0)


def test_what_is_served_is_told_and_a_plot_is_a_table_too(
    rig: Rig, visit: Callable[..., Visit]
) -> None:
    visited = open_dashboard(visit, rig.url)
    page = visited.page
    card = page.get_by_role("article").filter(has_text=CHAT)
    for words in ("float32, 1 KiB", "xla on cpu", "data=1, model=1", "512 tokens", "1,024 tokens"):
        expect(card).to_contain_text(words)
    expect(page.get_by_role("article").filter(has_text=EMBED)).to_contain_text("32 tokens")
    expect(page.get_by_text(re.compile(r"^up .* version 0.1.0 . as of"))).to_be_visible()
    summary = tile(page, "Requests").locator("summary")
    summary.focus()
    page.keyboard.press("Enter")
    table = tile(page, "Requests").get_by_role("table")
    expect(table.get_by_role("columnheader")).to_have_text(["time", "running", "waiting", "slots"])
    row = table.get_by_role("row").nth(1)
    expect(row.get_by_role("cell")).to_have_text(["0", "0", "4"])
    label = tile(page, "Requests").get_by_role("img").get_attribute("aria-label") or ""
    assert label.startswith("Requests, 5 minutes, scale to 4: running 0, from 0 to 0;")
    visited.assert_accessible()


def test_the_manual_names_what_is_plotted(rig: Rig, visit: Callable[..., Visit]) -> None:
    page = visit(rig.url + "/dashboard").page
    figures: list[dict[str, Any]] = page.evaluate(
        """async () => {
          const { FIGURES } = await import("/pages/dashboard-figures.js");
          return FIGURES.map(({ title, lines }) => [
            title, lines.map(({ name }) => name), lines.flatMap(({ metrics }) => metrics)
          ]);
        }"""
    )
    manual = (DOCS / "dashboard.md").read_text(encoding="utf-8")
    rows = {
        cells[0]: cells
        for line in manual.splitlines()
        if line.startswith("| ") and len(cells := [c.strip() for c in line[1:-1].split("|")]) == 3
    }
    known = set(re.findall(r"`([a-z_:0-9]+)`", (DOCS / "metrics.md").read_text(encoding="utf-8")))
    for title, names, of in figures:
        _, lines, told = rows.pop(title)
        assert lines.split(", ") == names, title
        assert re.findall(r"`([a-z_:0-9]+)`", told) == list(dict.fromkeys(of)), title
        for name in of:
            assert name in known or name.startswith("process_"), name
    assert set(rows) == {"plot"}, "the manual tells of what is not plotted"
