"""How the owners of requests, or of sockets, share a number of permits."""

from collections import Counter


class FairShare:
    """A number of permits, counted by the key that holds them.

    A key may hold at most as many permits as remain free (the dynamic threshold of Choudhury and
    Hahne, IEEE/ACM Transactions on Networking 6(2), 1998), but always one request's, so that a
    flood of one key never shuts out another. Requests without a key share all permits.

    Attributes:
        capacity: how many permits there are. A key's only request may exceed it.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._held: Counter[str | None] = Counter()
        self._total = 0

    @property
    def in_use(self) -> int:
        """Permits that are held now."""
        return self._total

    def held_by(self, owner: str | None) -> int:
        """Permits that a key of this id holds, or, for None, all requests without a key."""
        return self._held[owner]

    def acquire(self, owner: str | None, number: int = 1, *, held: int = 0) -> bool:
        """Acquire permits, all of them or none.

        Args:
            owner: the id of the caller's key; None: it needed none.
            number: of permits.
            held: how many the same request holds already.

        Returns:
            Whether they were acquired.
        """
        mine, free = self._held[owner], self.capacity - self._total
        fits = (number if owner is None else mine + number) <= free
        # What never fits could only be sent in vain, so an owner's only request may be too large.
        only = mine == held and self._total < 2 * self.capacity
        if fits or only:
            self._held[owner] += number
            self._total += number
        return fits or only

    def release(self, owner: str | None, number: int = 1) -> None:
        """Release permits that ``owner`` holds."""
        self._total -= number
        self._held[owner] -= number
        if not self._held[owner]:
            del self._held[owner]
