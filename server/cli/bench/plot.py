"""A plot of throughput and latency against load."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from server.cli.bench.errors import BenchError

_QUANTILES = {"p50": "-", "p99": ":"}
_COLOURS = ("#1f5fa8", "#d1662b", "#2f8f4e", "#8a4fa3")


def require() -> None:
    """Raise BenchError if plots cannot be drawn, before a long run instead of after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise BenchError(
            "--plot needs matplotlib: pip install 'inferneo-jax[plot]', or pip install matplotlib"
        ) from None


def draw(file: Path, series: Mapping[str, Sequence[Mapping[str, Any]]], title: str) -> None:
    """Plot the levels of each series as PNG, SVG or PDF, by the suffix of the file.

    Raises:
        BenchError: matplotlib is not installed, or the file cannot be written.
    """
    require()
    from matplotlib.figure import Figure

    rows = next(iter(series.values()))
    key = "clients" if rows[0]["clients"] is not None else "rate"
    unit = "clients at once" if key == "clients" else "arrivals per second"
    generates = any(row["output_tokens"] for row in rows)
    panels: list[tuple[str, str | None]] = [(f"throughput, {'output ' * generates}tokens/s", None)]
    named = (("ttft", "time to first token"), ("itl", "inter-token latency"), ("e2e", "end to end"))
    panels += [(f"{text}, ms", name) for name, text in named if rows[0][name] is not None]
    height = -(-len(panels) // 2)
    figure = Figure(figsize=(9.0, 3.6 * height + 0.4), layout="constrained")
    axes = figure.subplots(height, 2, squeeze=False).flatten()
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, (heading, name) in zip(axes, panels, strict=False):
        for (label, levels), colour in zip(series.items(), _COLOURS, strict=False):
            loads = [level[key] for level in levels]
            if name is None:
                rates = [
                    level["output_tokens_per_second"] or level["total_tokens_per_second"]
                    for level in levels
                ]
                axis.plot(loads, rates, "o-", color=colour, label=label)
                continue
            for quantile, line in _QUANTILES.items():
                known = [(x, level[name]) for x, level in zip(loads, levels, strict=True)]
                points = [(x, 1000 * figures[quantile]) for x, figures in known if figures]
                axis.plot(
                    *zip(*points, strict=True),
                    "o" + line,
                    color=colour,
                    markersize=4,
                    label=f"{label} {quantile}" if len(series) > 1 else quantile,
                )
        axis.set_title(heading, fontsize=11)
        axis.set_xlabel(unit)
        axis.set_xscale("log", base=2)
        axis.set_xticks(loads, [f"{x:g}" for x in loads])
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        if name is not None or len(series) > 1:
            axis.legend(fontsize=9)
    figure.suptitle(title)
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise BenchError(f"{file} cannot be drawn: {error}") from None
