"""What is known of one forward of a watched model."""

from __future__ import annotations

# Ids of the layers that were called with one record, with two, and with one row for two.
Tried = tuple[set[int], set[int], set[int]]


class Forward:
    """One forward of the model: its number of records, and what was called and gave gradients.

    Attributes:
        records: number of records; None: not known, for the reason `why`.
        called: ids of the layers that were called.
        given: names of the parameters that backward gave a gradient.
        tried: `Tried`; None: not asked for.
        sharing: ids of the layers that may get one row for all records.
        kind: shapes of its inputs without the records.
    """

    __slots__ = ("called", "given", "kind", "records", "sharing", "tried", "why")

    def __init__(
        self, records: int | None, *, why: str = "", tried: Tried | None = None, kind: object = None
    ) -> None:
        self.records, self.why, self.tried, self.kind = records, why, tried, kind
        self.called: set[int] = set()
        self.given: set[str] = set()
        self.sharing: set[int] = set() if tried is None else tried[2]

    def untried(self) -> set[int]:
        """Layers that were called and not yet tried with one record and with two."""
        return set() if self.tried is None else self.called - (self.tried[0] & self.tried[1])
