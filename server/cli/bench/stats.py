"""Statistics from the arrivals of tokens: pure functions, with times in seconds.

The definitions are those of docs/performance.md.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from server.cli.bench.errors import BenchError

QUANTILES = (50, 90, 99)
LIMITS = ("ttft", "itl", "e2e")


@dataclass(slots=True)
class Sample:
    """One request as its client saw it, on one clock.

    Attributes:
        start: when the request was sent, or should have been.
        turn: its turn in the conversation, from 1.
        arrivals: the times of arrival of the chunks that held text.
        chunk_tokens: the numbers of tokens in these chunks, where known.
        end: when the answer was complete, or had failed.
        texts: number of texts embedded.
        error: why the request failed; None if it succeeded.
    """

    start: float
    turn: int = 1
    arrivals: list[float] = field(default_factory=list)
    chunk_tokens: list[int] | None = None
    end: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    texts: int = 0
    error: str | None = None

    @property
    def ttft(self) -> float | None:
        """Time to first token: until the first chunk that held text."""
        return self.arrivals[0] - self.start if self.arrivals else None

    @property
    def e2e(self) -> float:
        """End-to-end latency: until the answer was complete."""
        return self.end - self.start

    @property
    def itl(self) -> float | None:
        """Mean inter-token latency; None with fewer than two chunks."""
        values, weights = self.gaps()
        total = sum(weights)
        return sum(v * w for v, w in zip(values, weights, strict=True)) / total if total else None

    def gaps(self) -> tuple[list[float], list[float]]:
        """Return inter-token latencies, and the number of tokens that each one stands for.

        A gap before k tokens counts as k latencies of a k-th of it. Where the tokens of chunks are
        not known, each chunk has the request's mean number.
        """
        count = len(self.arrivals)
        if count < 2:
            return [], []
        tokens: Sequence[float]
        if self.chunk_tokens is not None:
            tokens = self.chunk_tokens[1:]
        else:
            # A server may send one token in two chunks, but every chunk has at least one.
            tokens = [max(1.0, self.output_tokens / count)] * (count - 1)
        pairs = zip(self.arrivals, self.arrivals[1:], strict=False)
        spans = [after - before for before, after in pairs]
        values = [span / number for span, number in zip(spans, tokens, strict=True)]
        return values, list(tokens)


def percentiles(
    values: Sequence[float], weights: Sequence[float] | None = None
) -> dict[str, float] | None:
    """Return the p50, p90, p99, maximum and mean of measured values; None if there are none.

    A percentile is the smallest measured value that at least this percentage of the weight does
    not exceed.
    """
    if not values:
        return None
    import numpy as np  # imported here, so that the other commands start without it

    array = np.asarray(values, np.float64)
    found = np.percentile(array, QUANTILES, weights=weights, method="inverted_cdf")
    named = {f"p{q}": float(value) for q, value in zip(QUANTILES, found, strict=True)}
    return named | {"max": float(array.max()), "mean": float(np.average(array, weights=weights))}


def parse_goodput(text: str) -> dict[str, float]:
    """Parse ``ttft=500,itl=50``, in milliseconds, into limits in seconds.

    Raises:
        BenchError: the text is not written like this.
    """
    limits: dict[str, float] = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        name, _, value = part.partition("=")
        name = "itl" if name == "tpot" else name
        try:
            limits[name] = float(value) / 1000
        except ValueError:
            limits[name] = 0.0
        if name not in LIMITS or not 0 < limits[name] < float("inf"):
            raise BenchError(
                f"--goodput holds {part!r}; write limits in milliseconds as ttft=500,itl=50, of "
                f"{', '.join(LIMITS)}"
            )
    return limits


def meets(sample: Sample, limits: Mapping[str, float]) -> bool:
    """Return whether a request succeeded within every limit; its mean ITL counts."""
    if sample.error is not None:
        return False
    measured = {"ttft": sample.ttft, "itl": sample.itl, "e2e": sample.e2e}
    # A figure that a request does not have, such as the ITL of one token, exceeds no limit.
    return all((measured[name] or 0.0) <= limit for name, limit in limits.items())


def summarize(
    samples: Sequence[Sample], limits: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Return the figures of one level of load. Times are in seconds, rates per second.

    The duration is from the first request's start to the last one's end; only the tokens of
    successful requests count.
    """
    good = [sample for sample in samples if sample.error is None]
    seconds = max((s.end for s in samples), default=0.0) - min(
        (s.start for s in samples), default=0.0
    )
    prompt, output = sum(s.prompt_tokens for s in good), sum(s.output_tokens for s in good)
    rate = 1 / seconds if seconds > 0 else 0.0
    errors = Counter(sample.error for sample in samples if sample.error is not None)
    figures: dict[str, Any] = {
        "seconds": seconds,
        "requests": len(samples),
        "completed": len(good),
        "errors": dict(errors),
        "prompt_tokens": prompt,
        "cached_tokens": sum(s.cached_tokens for s in good),
        "output_tokens": output,
        "requests_per_second": len(good) * rate,
        "output_tokens_per_second": output * rate,
        "total_tokens_per_second": (prompt + output) * rate,
        "ttft": percentiles(ttfts(good)),
        "itl": percentiles(*_gaps(good)),
        "e2e": percentiles([s.e2e for s in good]),
    }
    if texts := sum(s.texts for s in good):
        figures["texts_per_second"] = texts * rate
    turns = sorted({s.turn for s in samples})
    if len(turns) > 1:
        figures["ttft_of_turns"] = [percentiles(ttfts(good, turn)) for turn in turns]
    if limits:
        met = sum(meets(sample, limits) for sample in samples)
        figures["goodput"] = {
            "limits": dict(limits),
            "share": met / len(samples) if samples else 0.0,
            "requests_per_second": met * rate,
        }
    return figures


def ttfts(samples: Iterable[Sample], turn: int | None = None) -> list[float]:
    """Return the times to first token, of one turn or of all."""
    found = (s.ttft for s in samples if turn in (None, s.turn))
    return [ttft for ttft in found if ttft is not None]


def _gaps(samples: Iterable[Sample]) -> tuple[list[float], list[float]]:
    values: list[float] = []
    weights: list[float] = []
    for sample in samples:
        more, weight = sample.gaps()
        values += more
        weights += weight
    return values, weights


def steady_decode(samples: Sequence[Sample]) -> dict[str, float] | None:
    """Measure decode alone, while all of these requests were generating.

    Between the last first token and the first last token: tokens per second of all requests, and
    the median time between the chunks of one request, which is the time of a step. None if the
    requests never overlapped.
    """
    begin = max(sample.arrivals[0] for sample in samples)
    end = min(sample.arrivals[-1] for sample in samples)
    tokens, gaps = 0, []
    for sample in samples:
        counts = sample.chunk_tokens or [1] * len(sample.arrivals)
        inside = [i for i, at in enumerate(sample.arrivals) if begin < at <= end]
        tokens += sum(counts[i] for i in inside)
        gaps += [
            sample.arrivals[i] - sample.arrivals[i - 1]
            for i in inside
            if sample.arrivals[i - 1] >= begin
        ]
    if not gaps or end <= begin:
        return None
    return {
        "tokens_per_second": tokens / (end - begin),
        "step_seconds": median(gaps),
        "seconds": end - begin,
    }
