"""A program that runs `inferneo serve` with fake models; a model named ``broken`` fails."""

import os

import structlog

from inferneo_jax import CheckpointError
from server.cli.main import main
from server.cli.serve import run
from server.config.settings import Settings
from tests.support.fake_engine import FakeEmbedder, FakeEngine, writes
from tests.support.fake_server import make_tokenizer, models_of

tokenizer = make_tokenizer()
engine = FakeEngine(writes(tokenizer, "x", end=False), limit=1)
models = models_of(engine, FakeEmbedder(), tokenizer)


def load(source, settings, progress):
    if source.id == "broken":
        structlog.get_logger().info("pulling", model="broken", what="9 MB; from a hub", bytes=9)
        raise CheckpointError("its weights cannot be read; pull it again")
    progress("compile", 1, 2)
    return models[source.id]()


def serve() -> None:
    run(Settings.load({"models": os.environ.get("FAKES", ",".join(models))}), load)


main(serve)
