"""A loaded model, with one interface for all tasks, wherever its engine runs.

Nothing here needs jax: an engine may run in another process (``remote.py``).
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from inferneo_jax.request import EngineStats, GenerationRequest, OutputSink
from inferneo_jax.runner.model_info import DeviceMemory, ModelInfo, device_memory
from inferneo_jax.text.grammar import GrammarCompiler
from inferneo_jax.text.tokenizer import Tokenizer

Task = Literal["generate", "embed"]
_COMPILE_SECONDS = 10.0
"""How long the end waits for the program that is being compiled."""


class GenerationEngine(Protocol):
    """What a server needs of an engine that generates; see :class:`~.engine.Engine`."""

    def submit(self, request: GenerationRequest, sink: OutputSink) -> None:
        """Queue a request."""

    def abort(self, request_id: str) -> None:
        """End a request."""

    def pause(self, request_id: str) -> None:
        """Decode no further tokens of a request until ``resume``."""

    def resume(self, request_id: str) -> None:
        """Undo ``pause``."""

    def forecast(self, requests: list[GenerationRequest]) -> float | None:
        """Seconds until these would have finished, if they were submitted now."""

    def stats(self) -> EngineStats:
        """The engine's numbers."""

    def stuck(self) -> float:
        """Seconds by which the current step has exceeded its limit."""

    def ended(self) -> bool:
        """Whether the engine will never serve again."""

    def stop(self) -> None:
        """End every request, and the engine."""


class EmbeddingEngine(Protocol):
    """What a server needs of an engine that embeds; see :class:`~.embedder.Embedder`.

    Attributes:
        hidden_size: length of a vector.
        max_tokens: maximum length of a text, in tokens.
    """

    hidden_size: int
    max_tokens: int

    def embed(
        self, texts: Sequence[Sequence[int]], owner: str = ""
    ) -> "Future[np.ndarray[Any, np.dtype[np.float32]]]":
        """Queue texts; the future's result is float32 ``[texts, hidden_size]``."""

    def stuck(self) -> float:
        """Seconds by which the current batches have exceeded their limit."""

    def ended(self) -> bool:
        """Whether the engine will never serve again."""

    def stop(self) -> None:
        """End every request, and the engine."""


@dataclass(frozen=True, kw_only=True)
class Model(ABC):
    """A loaded model, whatever it does: what a server needs to know of any of them.

    Attributes:
        kind: of its checkpoint.
        task: that it serves.
        name: under which it was loaded.
        created: when it was converted, in seconds since 1970.
        tokenizer: of its texts.
        max_len: of the longest sequence in tokens: prompt and output, or a text to be embedded.
        info: what it is made of.
        device_memory: tells the memory of the accelerators that it runs on, other models included.
    """

    kind: ClassVar[Literal["decoder", "encoder"]]
    task: ClassVar[Task]

    name: str
    created: int
    tokenizer: Tokenizer
    max_len: int
    info: ModelInfo
    device_memory: Callable[[], list[DeviceMemory]] = field(default=device_memory, repr=False)

    @abstractmethod
    def ready(self) -> bool:
        """Whether it serves requests now."""

    @abstractmethod
    def stuck(self) -> float:
        """Seconds by which its current step has exceeded its limit; 0.0 if it has not."""

    @abstractmethod
    def ended(self) -> bool:
        """Whether it will never serve again."""

    @abstractmethod
    def stats(self) -> EngineStats | None:
        """What a generating engine does now; None: the model generates nothing."""

    @abstractmethod
    def stop(self) -> None:
        """End all its requests and its thread."""


@dataclass(frozen=True, kw_only=True)
class LanguageModel(Model):
    """A causal model, ready to generate."""

    kind = "decoder"
    task = "generate"

    engine: GenerationEngine
    grammars: GrammarCompiler
    """Compiles the grammars that requests bring, to know whether the engine can."""
    compiling: threading.Thread | None = None
    """Compiles programs beside the first requests, until the engine has ended."""

    def ready(self) -> bool:
        """Whether the engine runs, and no step hangs."""
        return self.engine.stats().ready

    def stuck(self) -> float:
        """Seconds by which the current step has exceeded its limit."""
        return self.engine.stuck()

    def ended(self) -> bool:
        """Whether the engine has failed for good."""
        return self.engine.ended()

    def stats(self) -> EngineStats:
        """The engine's figures."""
        return self.engine.stats()

    def stop(self) -> None:
        """End all its requests and its threads."""
        self.engine.stop()
        if self.compiling:
            self.compiling.join(_COMPILE_SECONDS)


@dataclass(frozen=True, kw_only=True)
class EmbeddingModel(Model):
    """An encoder, ready to embed."""

    kind = "encoder"
    task = "embed"

    embedder: EmbeddingEngine

    def ready(self) -> bool:
        """Whether no batch hangs."""
        return self.embedder.stuck() == 0.0

    def stuck(self) -> float:
        """Seconds by which the current round of batches has exceeded its limit."""
        return self.embedder.stuck()

    def ended(self) -> bool:
        """Whether the process that embeds is gone; a failed batch ends its own request only."""
        return self.embedder.ended()

    def stats(self) -> None:
        """None: it generates nothing."""

    def stop(self) -> None:
        """End all its requests and its thread."""
        self.embedder.stop()
