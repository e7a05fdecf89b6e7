"""One audit of one run: canaries in copies of it, an attack on all their releases, and a verdict.

Canary i is there by a fair coin, and else its opposite (`replace_one`) or nothing (`zero_out`). The
attacker is the adversary of the statement: it sees every release, knows all else, and knows the
canary.
"""

from __future__ import annotations

import secrets
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fl_lightning.audit.family import Family
from fl_lightning.audit.findings import Bound, Floats, independent, last_model, one_run
from fl_lightning.audit.finished import Finished, read_finished
from fl_lightning.audit.local_copy import Seen, local_trials
from fl_lightning.audit.readings import log_ratios
from fl_lightning.audit.sum_copy import sum_trials
from fl_lightning.kernel_choice import kernels_for

CANARIES, CONFIDENCE, MINUTES = 1000, 0.99, 10.0


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Args:
        setting, mechanism: of the run.
        client: whose promise was tried: the one with the largest proven ε.
        proven: ε by the run's own ledger, at the client's δ.
        family: of its mechanism.
        seen: coins and readings of the canaries.
        scores: the attacker's statistic [n].
        bounds: ways of counting, the one for the verdict first.
        confidence: of every bound.
        seed: of the copies, None: secret.
        seconds: wall-clock time.
    """

    setting: str
    mechanism: str
    client: int
    proven: float
    family: Family
    seen: Seen
    scores: Floats
    bounds: list[Bound]
    confidence: float
    seed: int | None
    seconds: float

    @property
    def main(self) -> Bound:
        """The bound that decides."""
        return self.bounds[0]

    @property
    def passed(self) -> bool:
        """Whether no more is shown than is proven."""
        return self.main.shown <= self.proven

    @property
    def noise_seen(self) -> list[float | None]:
        """Noise by layer (votes last) as a multiple of what is stated, None: could not be seen."""
        noise = self.seen.readings.noise
        with np.errstate(invalid="ignore"):
            means = [noise[..., p][np.isfinite(noise[..., p])] for p in range(noise.shape[-1])]
        power = 0.5 if self.mechanism == "gaussian" else 1.0
        return [round(float(m.mean()) ** power, 4) if len(m) else None for m in means]


def audit(
    run: str | Path,
    *,
    canaries: int = CANARIES,
    confidence: float = CONFIDENCE,
    minutes: float = MINUTES,
    seed: int | None = None,
) -> Audit:
    """Audit a finished run.

    Args:
        run: its folder, which is only read.
        canaries: trials, at least 20.
        confidence: of the ε shown, in [0.5, 1).
        minutes: after which no further trial of a setting with sums is begun.
        seed: makes coins and noise of the audit repeatable; None: secret.

    Raises:
        ValueError: an argument out of range, or a run that cannot be audited.
        OSError: a file cannot be read.
        LedgerError: the run's ledger cannot be trusted.

    Guarantees:
        If each canary's releases keep what the ledger charges them with, `passed` is False with
        probability at most 1 - confidence.
    """
    if canaries < 20:
        raise ValueError(f"canaries={canaries} must be at least 20")
    if not 0.5 <= confidence < 1:
        raise ValueError(f"confidence={confidence} must be in [0.5, 1)")
    if not minutes > 0:
        raise ValueError(f"minutes={minutes} must be positive")
    if seed is not None and seed < 0:
        raise ValueError(f"seed={seed} must be at least 0")
    finished = read_finished(Path(run))
    return judge(finished, canaries=canaries, confidence=confidence, minutes=minutes, seed=seed)


def judge(
    finished: Finished, *, canaries: int, confidence: float, minutes: float, seed: int | None
) -> Audit:
    """As `audit`, of a run that was read already."""
    started = time.perf_counter()
    client, account = finished.worst()
    coins = np.random.default_rng(secrets.randbits(128) if seed is None else [seed, 18])
    seen = _see(finished, client, coins.random(canaries) < 0.5, seed=seed, minutes=minutes)
    mechanism = finished.header["mechanism"]
    scores = log_ratios(
        seen.readings,
        rate=seen.rate,
        replaced=finished.header["adjacency"] == "replace_one",
        mechanism=mechanism,
    )
    family = Family.of(account)
    bounds = [independent(family, scores, seen.coins, confidence)]
    bounds += one_run(family, scores, seen.coins, confidence)
    if seen.last is not None:
        bounds.append(last_model(family, seen.last, seen.coins, confidence))
    return Audit(
        setting=finished.header["setting"],
        mechanism=mechanism,
        client=client,
        proven=account.epsilon(),
        family=family,
        seen=seen,
        scores=scores,
        bounds=bounds,
        confidence=confidence,
        seed=seed,
        seconds=time.perf_counter() - started,
    )


def _see(
    finished: Finished, client: int, coins: np.ndarray, *, seed: int | None, minutes: float
) -> Seen:
    """The copies, in a folder that is gone afterwards with their secrets and ledgers.

    They are computed by the kernels that the run was computed by.
    """
    sizes, layout = finished.data.client_sizes, finished.module.layout
    kernels = kernels_for(finished.rules, layout, sizes, finished.planned)
    with kernels, tempfile.TemporaryDirectory() as folder:
        if finished.rules.privacy.summed:
            return sum_trials(
                finished, client, coins, seed=seed, folder=Path(folder), seconds=60 * minutes
            )
        return local_trials(finished, client, coins, seed=seed, folder=Path(folder))
