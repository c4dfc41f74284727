"""Opens the key store that a location names."""

from pathlib import Path
from urllib.parse import urlsplit

from inferneo_jax import ConfigError
from server.keys.store.store import Store


def open_store(location: str | Path, setting: str = "INFERNEO_KEYS_DB") -> Store:
    """The store at a path, or at a URL of Redis or Valkey; connects when it is first used.

    ``setting``: where the location comes from, for an error.

    Raises:
        ConfigError: the URL is of another kind.
    """
    scheme = urlsplit(str(location)).scheme if "://" in str(location) else ""
    if not scheme:
        from server.keys.store.sqlite import SqliteStore

        return SqliteStore(Path(location).expanduser().absolute())
    if scheme not in ("redis", "rediss", "unix", "valkey", "valkeys"):
        raise ConfigError(
            f"{setting} begins with {scheme}://; it must be a path, or a URL that begins "
            "with redis://, rediss://, unix://, valkey:// or valkeys://"
        )
    from server.keys.store.redis import RedisStore

    return RedisStore(str(location))
