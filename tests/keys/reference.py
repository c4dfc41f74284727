"""What stores must do, said in the plainest way: a list of calls, counted anew every time."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from server.keys.key import Limits
from server.keys.store.store import QuotaStatus, Reservation, Usage, UsageRow


@dataclass
class Entry:
    key: str
    reservation: Reservation
    at: float
    lease: float
    tokens: int
    usage: Usage | None = None  # None: it runs


class ReferenceStore:
    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def sweep(self, now: float) -> None:
        for entry in self.entries:
            if entry.usage is None and entry.lease <= now:
                entry.usage = Usage(
                    prompt=entry.reservation.prompt, completion=entry.reservation.completion
                )

    def quota_status(self, key: str, now: float) -> QuotaStatus:
        mine = [entry for entry in self.entries if entry.key == key]
        recent = [entry for entry in mine if entry.at > now - 60]
        return QuotaStatus(
            now=now,
            requests=len(recent),
            tokens=sum(entry.tokens for entry in recent),
            day_requests=sum(entry.at // 86400 == now // 86400 for entry in mine),
            running=sum(entry.usage is None and entry.lease > now for entry in mine),
            reset=max((entry.at + 60 for entry in recent), default=now),
        )

    def reserve(
        self, key: str, limits: Limits, reservation: Reservation, now: float
    ) -> QuotaStatus:
        self.sweep(now)
        before = self.quota_status(key, now)
        recent = [entry for entry in self.entries if entry.key == key and entry.at > now - 60]
        tokens = reservation.prompt + reservation.completion
        if limits.tokens is not None:
            tokens = min(tokens, limits.tokens)
        if limits.day_requests is not None and before.day_requests >= limits.day_requests:
            return replace(before, refusal="day", retry=86400 - now % 86400)
        if limits.concurrent is not None and before.running >= limits.concurrent:
            return replace(before, refusal="concurrent", retry=1.0)
        if limits.requests is not None and before.requests >= limits.requests:
            left = [e.at + 60 - now for i, e in enumerate(recent, 1)]
            wait = left[len(recent) - limits.requests] if limits.requests else 60.0
            return replace(before, refusal="requests", retry=wait)
        if limits.tokens is not None and before.tokens + tokens > limits.tokens:
            wait = 60.0
            for i, entry in enumerate(recent, 1):
                if sum(e.tokens for e in recent[i:]) + tokens <= limits.tokens:
                    wait = entry.at + 60 - now
                    break
            return replace(before, refusal="tokens", retry=wait)
        self.entries.append(Entry(key, reservation, now, now + 60, tokens))
        return self.quota_status(key, now)

    def _running(self, key: str, reservation_id: str) -> Entry | None:
        for entry in self.entries:
            if (entry.key, entry.reservation.id) == (key, reservation_id) and entry.usage is None:
                return entry
        return None

    def settle(self, key: str, reservation_id: str, usage: Usage | None, now: float) -> None:
        self.sweep(now)
        if (entry := self._running(key, reservation_id)) is None:
            return
        if usage is None:
            self.entries.remove(entry)
        else:
            entry.usage, entry.tokens = usage, usage.prompt + usage.completion

    def renew(self, calls: Iterable[tuple[str, str]], now: float) -> None:
        self.sweep(now)
        for key, reservation_id in calls:
            if (entry := self._running(key, reservation_id)) is not None:
                entry.lease = now + 60

    def usage(self, key: str) -> list[UsageRow]:
        days: dict[int, list[Entry]] = {}
        for entry in self.entries:
            if entry.key == key:
                days.setdefault(int(entry.at // 86400), []).append(entry)
        rows = []
        for day, entries in sorted(days.items()):
            ended = [entry.usage for entry in entries if entry.usage is not None]
            prompt, completion = sum(s.prompt for s in ended), sum(s.completion for s in ended)
            cached = sum(s.cached for s in ended)
            rows.append(UsageRow(key, day, "m", len(entries), prompt, completion, cached))
        return rows
