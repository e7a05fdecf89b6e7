"""How independent canaries are best counted, chosen before anything of them is seen.

Either every coin is guessed, or alarms are raised above a threshold: many right guesses say little
where secret coins leave most canaries out of most steps. What the proven law of the statistic would
show decides; it is simulated, along the one direction that matters.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fl_lightning.accounting.risk import Risk
from fl_lightning.audit.bounds import accuracy_limits
from fl_lightning.values.event import NoiseEvent

_NUMBERS, _MOST = 4_000_000, 20_000
_FALSE_RATES = np.geomspace(0.002, 0.5, 24)


def best_threshold(
    counts: Mapping[NoiseEvent, int], risk: Risk, canaries: int, confidence: float
) -> float | None:
    """The threshold above which to raise alarms; None: guess every coin.

    Args:
        counts: events of the canary's account.
        risk: what they allow.
        canaries: how many there will be, half of them there.
        confidence: of the limits.
    """
    from scipy import special

    there, away = (simulated(counts, world) for world in (True, False))
    half = canaries // 2
    right = (float((there > 0).mean()) + float((away <= 0).mean())) / 2
    low, _ = accuracy_limits(round(right * canaries), canaries, confidence)
    best = special.ndtri(low) / special.ndtri((1 + risk.advantage()) / 2)
    found = None
    for threshold in np.quantile(away, 1 - _FALSE_RATES):
        true, false = float((there > threshold).mean()), float((away > threshold).mean())
        hit = accuracy_limits(round(true * half), half, (1 + confidence) / 2)[0]
        alarm = accuracy_limits(round(false * half), half, (1 + confidence) / 2)[1]
        if not 0 < hit < 1 or not 0 < alarm < 1:
            continue
        most = float(risk.power(alarm))
        apart = special.ndtri(min(most, 1 - 1e-12)) - special.ndtri(alarm)
        share = (special.ndtri(hit) - special.ndtri(alarm)) / apart
        if share > best:
            best, found = share, float(threshold)
    return found


def simulated(counts: Mapping[NoiseEvent, int], there: bool) -> np.ndarray:
    """The attacker's statistic of canaries that are there, or not, under the proven noise, [n]."""
    steps = sum(counts.values())
    size = max(500, min(_MOST, _NUMBERS // max(1, steps)))
    generator = np.random.default_rng([18, int(there)])
    total = np.zeros(size)
    for event, times in counts.items():
        for _ in range(times):
            total += _one_step(event, there, size, generator)
    return total


def _one_step(
    event: NoiseEvent, there: bool, size: int, generator: np.random.Generator
) -> np.ndarray:
    """Log-likelihood ratios of a step, in units of the noise: a shift of 1 over the multiplier."""
    shift, rate = 1 / event.noise_multiplier, event.sampling_rate
    if event.sampled_replacement:
        shift /= 2
    laplace = event.mechanism == "laplace"
    noise = generator.laplace(size=size) if laplace else generator.standard_normal(size)
    taken = generator.random(size) < rate
    sign = 1.0 if there else -1.0 if event.sampled_replacement else 0.0
    seen = noise + sign * shift * taken

    def ratio(by: float) -> np.ndarray:
        value = np.abs(seen) - np.abs(seen - by) if laplace else seen * by - by**2 / 2
        return value if rate == 1 else np.logaddexp(np.log1p(-rate), np.log(rate) + value)

    return ratio(shift) - (ratio(-shift) if event.sampled_replacement else 0.0)
