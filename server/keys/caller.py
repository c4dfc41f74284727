"""On whose behalf a request is served: made where it enters, and handed down."""

from dataclasses import dataclass

from server.keys.key import Key
from server.keys.store.store import QuotaStatus


@dataclass(slots=True)
class Caller:
    """Whoever sent a request, or opened a WebSocket.

    Attributes:
        key: None if none was needed.
        quota_status: that of the key when a request was last counted; None if none was yet.
    """

    key: Key | None = None
    quota_status: QuotaStatus | None = None

    @property
    def id(self) -> str | None:
        """The id of the key, by which the server is shared between callers; None without a key."""
        return None if self.key is None else self.key.id

    def cache_salt(self, wanted: str) -> bytes:
        """The salt of a request's cached prompts, which two keys never share."""
        # No id holds a colon, so nothing that is wanted makes two callers' salts equal.
        return f"{self.id or ''}:{wanted}".encode()
