"""A scheduler without an engine."""

from collections import Counter

from inferneo_jax.request import GenerationRequest
from inferneo_jax.scheduler.block_pool import BlockPool
from inferneo_jax.scheduler.prefill import PrefillPlanner, PrefillShapes
from inferneo_jax.scheduler.scheduler import Scheduler, SchedulerOutput
from inferneo_jax.scheduler.sequence import Sequence
from inferneo_jax.scheduler.speculation import Speculator

BLOCK = 4
SHAPES = PrefillShapes.of((4, 8), slots=5, overhead=2)


class House:
    """A scheduler, and steps that take no time: every token is 1."""

    def __init__(self, slots: int = 4, blocks: int = 1000) -> None:
        self.planner = PrefillPlanner(SHAPES)
        self.scheduler = Scheduler(slots, BlockPool(blocks, BLOCK), self.planner, Speculator(None))
        self.slots = slots
        self.sequences: list[Sequence] = []
        self.tokens: Counter[str] = Counter()
        self.rows: list[int] = []
        self.chunks: list[int] = []
        self._in_flight: SchedulerOutput | None = None

    def add(
        self,
        owner: str,
        tokens: int,
        length: int = 5,
        priority: int = 0,
        prompt: tuple[int, ...] | None = None,
    ) -> Sequence:
        number = len(self.sequences)
        request = GenerationRequest(
            id=str(number),
            prompt=prompt or tuple(range(number * 7, number * 7 + length)),
            max_tokens=tokens,
            owner=owner,
            priority=priority,
            cache_salt=owner.encode(),
        )
        sequence = Sequence(request, lambda _: None, number)
        self.sequences.append(sequence)
        self.scheduler.add(sequence)
        return sequence

    def step(self, times: int = 1) -> None:
        """As the engine does it: a step is read when the next one is on its way."""
        for _ in range(times):
            self.planner.begin_step(decoding=self.scheduler.num_decoding() > 0)
            output = self.scheduler.schedule()
            self._check(output)
            if self._in_flight:
                self._commit(self._in_flight)
            self._in_flight = output

    def _check(self, output: SchedulerOutput) -> None:
        """What is prefilled fits its shape."""
        self.rows.append(len(output.decode))
        self.chunks.append(len(output.prefill))
        assert sum(chunk.length for chunk in output.prefill) <= SHAPES.max_tokens
        if output.prefill:
            assert output.shape in SHAPES.shapes
            rows, tokens = output.shape
            assert len(output.prefill) <= rows
            assert all(0 < chunk.length <= tokens for chunk in output.prefill)

    def _commit(self, output: SchedulerOutput) -> None:
        rows = [row.sequence for row in output.decode]
        rows += [chunk.sequence for chunk in output.prefill if chunk.sample]
        for sequence in rows:
            if not sequence.finished:
                self.tokens[sequence.request.owner] += 1
                _, reason = self.scheduler.commit(sequence, (1,))
                if reason:
                    self.end(sequence)
                    sequence.deliver((1,), reason=reason)

    def end(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)

    def run(self, steps: int = 20_000) -> None:
        """Until everything is done."""
        for _ in range(steps):
            if all(sequence.finished for sequence in self.sequences):
                return
            self.step()
        raise AssertionError("it does not end")
