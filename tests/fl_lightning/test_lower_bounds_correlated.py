"""A black-box attack on whole runs of rounds that share noise; see `test_lower_bounds`.

A trial is a run. The adversary knows coefficients, scales and the client's rounds, and thresholds
the likelihood ratio of all releases. It must show less than is proven, and more than a client would
be charged by an account that ends at its last round, takes another column, or forgets a band.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from aadp_kernels import _dispatch
from fl_lightning.accounting.composition import compose_epsilon
from fl_lightning.accounting.correlated import moves
from fl_lightning.keys.released_noise import ReleasedNoise
from fl_lightning.privacy.noised_sum import NoisedSum, SharedNoise
from fl_lightning.values.event import NoiseEvent
from tests.fl_lightning.test_lower_bounds import (
    DIRECTION,
    LAYOUT,
    ROOT,
    Policy,
    built,
    config_of,
    history_of,
    less_noise,
    lower_bound,
)

COEFFICIENTS = (1.0, -0.1, -0.9)
HORIZON, ROUNDS = 5, (0,)
MULTIPLIER, DELTA, TRIALS = 1.0, 0.2, 1600
CONFIG = config_of("client+aggregator", "gaussian")


def claimed(
    coefficients: tuple[float, ...] = COEFFICIENTS,
    horizon: int = HORIZON,
    rounds: tuple[int, ...] = ROUNDS,
) -> float:
    """ε of the run by an account that takes these."""
    one = np.zeros(len(rounds), dtype=np.int64)
    found = moves(coefficients, horizon, count=1, clients=one, rounds=np.array(rounds))
    event = NoiseEvent("gaussian", MULTIPLIER / float(found.whole[0]))
    return compose_epsilon({event: 1}, DELTA)


def a_run(change: Policy, there: bool, trial: int, folder: Path) -> torch.Tensor:
    """All releases of a run [rounds, elements] of one client, or of nobody's updates."""
    key = ROOT.derive(int(there), trial)
    noise, kept, released = ReleasedNoise(key, folder, writes=False), [], []
    for t in range(HORIZON):
        earlier = tuple(reversed(kept))[: len(COEFFICIENTS) - 1]

        of_round = key.derive("round", t)

        def own(values: object, of_round=of_round):
            kept.append(noise.keep(of_round, values))
            return kept[-1]

        total = NoisedSum(
            history_of(CONFIG, 1, change, LAYOUT.dims), LAYOUT, multiplier=MULTIPLIER,
            survivors=None, key=key,
            shared=SharedNoise(COEFFICIENTS[1 : 1 + len(earlier)], earlier, own),
        )  # fmt: skip
        if there and t in ROUNDS:
            update = {m: 1e3 * v[None] for m, v in DIRECTION.items()}
            total.add(update, torch.arange(1), torch.ones(1))
        release = total.release(divisor=1.0, expected_votes=1.0)
        released.append(torch.cat([release.update[m][0].double() for m in DIRECTION]))
    return torch.stack(released)


def ratios(change: Policy, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihood ratios of runs with and without the client, by the noise that is stated."""
    row, z = torch.zeros(1, dtype=torch.int64), torch.tensor([MULTIPLIER]).double()
    policy = history_of(CONFIG, 1, built, LAYOUT.dims).policy(row, z)
    parts = list(enumerate(DIRECTION.values()))
    scale = torch.cat([policy.noise_scale[0, i].expand(len(v)) for i, v in parts])
    shift = torch.cat([v * policy.clip_norm[0, i] / v.norm() for i, v in parts]) / scale
    back = np.subtract.outer(np.arange(HORIZON), np.arange(HORIZON))
    d = np.array(COEFFICIENTS + (0.0,) * HORIZON)[np.clip(back, 0, HORIZON)] * (back >= 0)
    inverse = torch.from_numpy(np.linalg.inv(d))
    move = inverse[:, list(ROUNDS)].sum(1)[:, None] * shift
    found = []
    for there in (True, False):
        runs = torch.stack([a_run(change, there, trial, folder) for trial in range(TRIALS)])
        drawn = torch.einsum("st,ntd->nsd", inverse, runs / scale)
        found.append(((drawn * move).sum((1, 2)) - move.square().sum() / 2).numpy())
    return found[0], found[1]


@pytest.mark.slow
def test_an_attack_on_runs_shows_what_is_charged_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_dispatch, "AUTO_ELEMENTS", 0)
    epsilon = claimed()
    shown = lower_bound(*ratios(built, tmp_path), DELTA)
    assert shown <= epsilon
    wrong = {
        "up to the last participation": claimed(horizon=ROUNDS[-1] + 1),
        "another column": claimed(rounds=(3,)),
        "a band less": claimed(COEFFICIENTS[:2]),
        "rounds of their own": claimed((1.0,)),
    }
    for name, account in wrong.items():
        assert shown > account, (name, shown, account)
    assert lower_bound(*ratios(less_noise, tmp_path), DELTA) > epsilon
