"""Settings of replicas; Ray is not needed for them."""

import os

import pytest

from inferneo_jax import ConfigError
from server.config.replica_settings import ReplicaSettings


@pytest.mark.parametrize("store", [None, "/data/keys.db", "unix:///run/redis.sock"])
def test_several_replicas_need_a_store_that_all_reach(
    store: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFERNEO_REPLICAS", "2")
    if store is not None:
        monkeypatch.setenv("INFERNEO_KEYS_DB", store)
    with pytest.raises(ConfigError, match="INFERNEO_REPLICAS is 2, and INFERNEO_KEYS_DB is no URL"):
        ReplicaSettings.load()


def test_replicas_get_the_servers_settings_and_ask_for_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in os.environ if name.startswith("INFERNEO_")]:
        monkeypatch.delenv(name)
    given = {"INFERNEO_KEYS_DB": "redis://host/0", "INFERNEO_SLOTS": "4"}
    for name, value in (given | {"INFERNEO_REPLICAS": "2", "INFERNEO_REPLICA_TPUS": "4"}).items():
        monkeypatch.setenv(name, value)
    settings = ReplicaSettings.load()
    assert settings.environment() == given | {"INFERNEO_REQUIRE_KEY": "true"}
