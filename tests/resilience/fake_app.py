"""The application on the fake engine, which writes a token a millisecond."""

import time
from typing import Any

from server.app import create_app
from server.config.settings import Settings
from tests.support.fake_engine import FakeEmbedder, FakeEngine, writes
from tests.support.fake_server import make_tokenizer, models_of


class PacedEngine(FakeEngine):
    """Some time passes with every token."""

    def _step(self, job: Any) -> None:
        time.sleep(0.001)
        super()._step(job)


tokenizer = make_tokenizer()
models = models_of(PacedEngine(writes(tokenizer, "x", end=False)), FakeEmbedder(), tokenizer)
app = create_app(Settings(models=tuple(models)), lambda source, *_: models[source.id]())
