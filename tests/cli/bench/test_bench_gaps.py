"""The plot of gaps between tokens, and the load with long prompts that it is made for."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from server.cli.bench.errors import BenchError
from server.cli.bench.gaps import Panel, svg, write
from server.cli.bench.stats import Sample

_NAMESPACE = "{http://www.w3.org/2000/svg}"


def sample(start: float, *arrivals: float, error: str | None = None) -> Sample:
    made = Sample(start=start, arrivals=list(arrivals), end=arrivals[-1], error=error)
    made.output_tokens = len(arrivals)
    return made


def paths(text: str, title: str) -> list[str]:
    """What is drawn under a title, panel by panel."""
    found = ET.fromstring(text).iter(f"{_NAMESPACE}path")
    return [
        path.attrib["d"] for path in found if title in (path.findtext(f"{_NAMESPACE}title") or "")
    ]


def test_every_gap_is_a_dot_and_every_long_prompt_a_bar() -> None:
    streams = [sample(0, 1.0, 1.1, 1.5), sample(0, 1.0, 1.2), sample(0, 1.0, 9.0, error="cut")]
    panel = Panel("load <2>", streams, [sample(0.5, 2.0), sample(0.5, 3.0)])
    text = svg([panel, Panel("nothing", [], [])])
    (dots, none), (bars, _) = paths(text, "between tokens"), paths(text, "long prompts")
    assert (dots.count("h0"), none.count("h0"), bars.count("H")) == (3, 0, 2)
    heights = [float(y) for y in re.findall(r"M[\d.]+ ([\d.]+)h0", dots)]
    floor = 34 + 200
    # From the stream of two gaps, and of the one: 0.1, 0.4 (the longest) and 0.2 seconds.
    assert heights == pytest.approx([floor - 50, floor - 200, floor - 100], abs=0.1)
    texts = [each.text for each in ET.fromstring(text).iter(f"{_NAMESPACE}text")]
    assert texts[0] == "load <2>: p50 200, p99 400, max 400 ms"


def test_a_plot_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"gaps\.svg cannot be written"):
        write(tmp_path / "none" / "gaps.svg", [])
