"""Load on an engine, without HTTP: the same requests and the same figures as over HTTP."""

import itertools
import queue
import random
import time
from collections.abc import Callable, Iterable
from statistics import median
from typing import TYPE_CHECKING, Any

from inferneo_jax import GenerationRequest, SamplingParams
from server.cli.bench.errors import BenchError
from server.cli.bench.stats import Sample, steady_decode, summarize

if TYPE_CHECKING:
    from inferneo_jax import GenerationOutput, LanguageModel

WAIT_SECONDS = 120.0
"""An engine that has requests but is silent for this long is considered stuck."""
_PREFILL_ROUNDS = 5
_DECODE_PROMPT, _DECODE_TOKENS = 16, 64

Wanted = tuple[int, int]
"""The number of prompt tokens of a request, and of tokens to generate."""


class EngineLoad:
    """Clients of one engine that send the next request as soon as they have an answer."""

    def __init__(self, model: "LanguageModel", seed: int = 0) -> None:
        self._engine, self._vocab_size = model.engine, model.tokenizer.vocab_size
        self._max_len = model.max_len
        self._rng = random.Random(seed)
        self._ids = itertools.count()

    def run(self, wanted: Iterable[Wanted], clients: int) -> list[Sample]:
        """Run all requests with this many clients, and return a sample of each request.

        Raises:
            BenchError: a request failed, or the engine does not answer.
            RequestError: a request is longer than the model's context.
        """
        ended: queue.SimpleQueue[Sample] = queue.SimpleQueue()
        rest, samples, running = iter(wanted), [], 0
        for want in itertools.islice(rest, clients):
            self._submit(want, ended)
            running += 1
        while running:
            try:
                sample = ended.get(timeout=WAIT_SECONDS)
            except queue.Empty:
                raise BenchError(f"the engine said nothing for {WAIT_SECONDS:g} s") from None
            if sample.error is not None:
                raise BenchError(f"the engine failed: {sample.error}")
            samples.append(sample)
            running -= 1
            for want in itertools.islice(rest, 1):
                self._submit(want, ended)
                running += 1
        return samples

    def _submit(self, want: Wanted, ended: "queue.SimpleQueue[Sample]") -> None:
        num_prompt, num_output = want
        prompt = tuple(self._rng.choices(range(self._vocab_size), k=num_prompt))
        sample = Sample(start=0.0, chunk_tokens=[], prompt_tokens=num_prompt)
        counts = sample.chunk_tokens
        assert counts is not None

        def sink(output: "GenerationOutput") -> None:
            now = time.perf_counter()
            if output.token_ids:
                sample.arrivals.append(now)
                counts.append(len(output.token_ids))
            sample.cached_tokens = max(sample.cached_tokens, output.cached_tokens)
            if output.finish_reason is not None:
                sample.end, sample.output_tokens = now, sum(counts)
                if output.finish_reason != "length":
                    sample.error = str(output.error or output.finish_reason)
                ended.put(sample)

        request = GenerationRequest(
            id=f"bench-{next(self._ids)}",
            prompt=prompt,
            max_tokens=num_output,
            sampling=SamplingParams(temperature=0.0),
        )
        sample.start = time.perf_counter()
        self._engine.submit(request, sink)

    def prefill(self, tokens: int) -> dict[str, Any]:
        """Measure single prompts: the median time to first token, and tokens per second."""
        tokens = min(tokens, self._max_len - 1)
        samples = self.run([(tokens, 1)] * (_PREFILL_ROUNDS + 1), clients=1)[1:]
        seconds = median(sample.e2e for sample in samples)
        return {
            "prompt_tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
        }

    def decode(self, rows: int) -> dict[str, Any]:
        """Measure ``rows`` requests that all decode: tokens per second, and the time of a step."""
        # The first request must still run when the last one's prompt has been computed.
        output = min(_DECODE_TOKENS + 2 * rows, self._max_len - _DECODE_PROMPT)
        samples = self.run([(_DECODE_PROMPT, output)] * rows, clients=rows)
        figures = steady_decode(samples)
        if figures is None:
            raise BenchError(
                f"{rows} requests never ran at once: --concurrency is above INFERNEO_SLOTS, or the "
                "KV cache is too small"
            )
        return {"rows": rows, **figures}

    def sweep(
        self,
        clients: Iterable[int],
        work: Wanted,
        requests: Callable[[int], int],
        limits: dict[str, float] | None = None,
    ) -> list[dict[str, Any]]:
        """Run the same load as ``inferneo bench serve`` and return the same figures."""
        rows = []
        for number in clients:
            spent = time.process_time()
            samples = self.run([work] * requests(number), number)
            figures = summarize(samples, limits)
            spent = time.process_time() - spent
            rows.append(
                {
                    "level": str(number),
                    "clients": number,
                    "rate": None,
                    **figures,
                    "process_cpu_seconds": spent,
                }
            )
        return rows
