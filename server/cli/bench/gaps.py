"""A plot of the time between tokens over a run, as SVG: what readers waited, and when."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from server.cli.bench.errors import BenchError
from server.cli.bench.stats import Sample, percentiles

_WIDTH, _LEFT, _RIGHT = 960, 56, 16
_PLOT, _BARS, _ABOVE, _BELOW = 200, 14, 34, 40
"""Heights of a panel's parts, in pixels."""
_STREAMS, _PROMPTS, _LINES, _TEXT = "#1f5fa8", "#d1662b", "#8888", "#777"


@dataclass(frozen=True)
class Panel:
    """One level of load.

    Attributes:
        title: what it was.
        streams: the requests whose tokens are plotted.
        prompts: long prompts that arrived beside them.
    """

    title: str
    streams: Sequence[Sample]
    prompts: Sequence[Sample]


def svg(panels: Sequence[Panel]) -> str:
    """Draw each level: a dot for every gap between tokens, a bar from prompt to first token."""
    height = _ABOVE + _PLOT + _BARS + _BELOW
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height * len(panels)}" '
        f'font-family="sans-serif" font-size="12" fill="{_TEXT}">'
    ]
    most = max((gap for panel in panels for _, gap in _gaps(panel)), default=1.0)
    for i, panel in enumerate(panels):
        parts += [f'<g transform="translate(0 {i * height})">', *_panel(panel, most), "</g>"]
    return "\n".join([*parts, "</svg>\n"])


def _gaps(panel: Panel) -> list[tuple[float, float]]:
    """When each token arrived, on the client's clock, and how long after the one before it."""
    return [
        (at, gap)
        for stream in panel.streams
        if stream.error is None
        for at, gap in zip(stream.arrivals[1:], stream.gaps()[0], strict=True)
    ]


def _panel(panel: Panel, most: float) -> list[str]:
    gaps = _gaps(panel)
    begin = min((sample.start for sample in (*panel.streams, *panel.prompts)), default=0.0)
    end = max((sample.end for sample in (*panel.streams, *panel.prompts)), default=1.0)
    end = max(end, begin + 0.001)

    def x(at: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (at - begin) / (end - begin)

    def y(gap: float) -> float:
        return _ABOVE + _PLOT * (1 - gap / most)

    found = percentiles([gap for _, gap in gaps])
    figures = found and f": p50 {1000 * found['p50']:.0f}, p99 {1000 * found['p99']:.0f}, "
    title = f"{panel.title}{figures}max {1000 * found['max']:.0f} ms" if found else panel.title
    parts = [f'<text x="{_LEFT}" y="18">{escape(title)}</text>']
    for tick in _ticks(1000 * most):
        at = y(tick / 1000)
        parts.append(
            f'<path d="M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}" stroke="{_LINES}" stroke-width=".5"/>'
            f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    floor = _ABOVE + _PLOT
    parts += [
        f'<text x="{x(begin + tick):.1f}" y="{floor + _BARS + 18}" text-anchor="middle">'
        f"{tick:g} s</text>"
        for tick in _ticks(end - begin)
    ]
    bars = "".join(
        f"M{x(prompt.start):.1f} {floor + _BARS / 2}H{x(prompt.arrivals[0]):.1f}"
        for prompt in panel.prompts
        if prompt.arrivals
    )
    dots = "".join(f"M{x(at):.1f} {y(gap):.1f}h0" for at, gap in gaps)
    parts.append(
        f'<path d="{bars}" stroke="{_PROMPTS}" stroke-width="8" stroke-opacity=".5" fill="none">'
        "<title>long prompts, from sent to first token</title></path>"
        f'<path d="{dots}" stroke="{_STREAMS}" stroke-width="3" stroke-linecap="round" '
        'stroke-opacity=".5" fill="none"><title>ms between tokens of a stream</title></path>'
    )
    return parts


def _ticks(most: float) -> list[float]:
    """Up to nine round numbers from 0 to ``most``."""
    steps = (digit * 10.0**power for power in range(-3, 8) for digit in (1, 2, 5))
    step = next(step for step in steps if most / step <= 8)
    return [i * step for i in range(int(most / step) + 1)]


def write(file: Path, panels: Sequence[Panel]) -> None:
    """Write the plot.

    Raises:
        BenchError: the file cannot be written.
    """
    try:
        file.write_text(svg(panels), encoding="utf-8")
    except OSError as error:
        raise BenchError(f"{file} cannot be written: {error.strerror}") from None
