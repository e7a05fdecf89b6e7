"""The run's own mechanism with its noise scaled: the curves that an audit chooses among.

Every member has the steps, coins, δ and inexactness of a client's account. A member is excluded
when so good an attack would be too improbable under it; the ε shown is that of the most private
member that is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from fl_lightning.accounting.composition import compose_epsilon
from fl_lightning.accounting.risk import Risk, risk_of
from fl_lightning.ledger.accounts import Account
from fl_lightning.values.event import NoiseEvent

# Between so little and so much of the proven noise a member is looked for.
LEAST, MOST = 2.0**-5, 2.0**8
_FINE = 1e-2


@lru_cache(maxsize=256)
def _risk_of(
    events: tuple[tuple[NoiseEvent, int], ...], delta: float, inflation: float, tails: float
) -> Risk:
    return risk_of(dict(events), delta, inflation, tails)


@dataclass(frozen=True)
class Family:
    """Members by the factor of their noise; 1 is what is proven.

    Args:
        counts: how often each event is charged.
        delta: of the client, tails included.
        inflation, tails: what inexact noise costs on top.
    """

    counts: Mapping[NoiseEvent, int]
    delta: float
    inflation: float
    tails: float

    @classmethod
    def of(cls, account: Account) -> Family:
        """The family of a client's account."""
        return cls(account.counts(), account.delta, *account.on_top())

    def scaled(self, factor: float) -> dict[NoiseEvent, int]:
        """The events with `factor` times the noise."""
        return {
            replace(event, noise_multiplier=event.noise_multiplier * factor): times
            for event, times in self.counts.items()
        }

    def risk(self, factor: float) -> Risk:
        """What a member allows every attack."""
        events = tuple(self.scaled(factor).items())
        return _risk_of(events, self.delta, self.inflation, self.tails)

    def epsilon(self, factor: float) -> float:
        """ε of a member at the client's δ."""
        left = self.delta - self.tails
        if left < 0:
            return math.inf
        return compose_epsilon(self.scaled(factor), left) + self.inflation

    def shown(self, possible: Callable[[Risk], bool]) -> float:
        """ε of the most private member that is possible: 0 where noise without end is.

        Args:
            possible: whether a member may be; with more noise never more so.

        Returns:
            A lower bound: ε of an excluded member a hundredth of the noise away.
        """
        excluded = self._boundary(possible)[1]
        return 0.0 if excluded is None else self.epsilon(excluded)

    def needed(self, possible: Callable[[Risk], bool]) -> float:
        """As `shown`, from above: ε of a possible member; infinite where none is."""
        found = self._boundary(possible)[0]
        return math.inf if found is None else self.epsilon(found)

    def _boundary(self, possible: Callable[[Risk], bool]) -> tuple[float | None, float | None]:
        """Factors next to each other of a possible member and an excluded one."""
        low = high = 1.0
        if possible(self.risk(1.0)):
            while possible(self.risk(high := high * 2)):
                if high >= MOST:
                    return high, None
                low = high
        else:
            while not possible(self.risk(low := low / 2)):
                if low <= LEAST:
                    return None, low
                high = low
        while high / low > 1 + _FINE:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if possible(self.risk(middle)) else (low, middle)
        return low, high
