"""Rounds that share noise: what a whole run costs each client, and that the noise is of that kind.

The exact attack of one run: its noise matrix D is measured from the models and the keys, and what
the best adversary sees of a client follows from its inverse by linear algebra. The ledger must
charge no less, and no more where every planned round was released.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aadp_kernels import NoiseKey, factorization, noise_scales, sample_noise
from fl_lightning import PrivacyConfig
from fl_lightning.accounting.budget import Budget
from fl_lightning.accounting.cohort import cohort_schedule
from fl_lightning.accounting.correlated import CorrelatedPlan, best_for, moves, whole_run
from fl_lightning.accounting.exactness import SamplerCost, charged_epsilon
from fl_lightning.accounting.group_privacy import in_correlated_sums
from fl_lightning.accounting.sum_costs import client_multipliers
from fl_lightning.export import export
from fl_lightning.keys.released_noise import FILE, ReleasedNoise
from fl_lightning.keys.run_key import public_name, run_key
from fl_lightning.ledger import read
from fl_lightning.ledger.accounts import accounts
from fl_lightning.ledger.statement import privacy_statement
from fl_lightning.ledger.statement_groups import client_steps
from fl_lightning.output.summary import final_table, run_summary
from fl_lightning.privacy.history import ReleasedHistory
from fl_lightning.privacy.mechanism import noised_votes
from fl_lightning.privacy.named_options import named_options
from fl_lightning.privacy.noised_sum import SharedNoise
from fl_lightning.server.optimizer import weights_in_last_model
from fl_lightning.values.event import NoiseEvent
from fl_lightning.values.release import ALL_CLIENTS, Release, parse_release, release_entry
from tests.fl_lightning.resuming import CLIENTS, go

BANDED = {
    "setting": "client+aggregator",
    "cohort_sampling": "fixed",
    "correlation": "banded",
    "delta": 0.1,
    "clip_norm": 1.0,
}


def dense(coefficients: tuple[float, ...], horizon: int) -> np.ndarray:
    """D of a whole run."""
    back = np.subtract.outer(np.arange(horizon), np.arange(horizon))
    d = np.zeros((horizon, horizon))
    for j, value in enumerate(coefficients):
        d[back == j] = value
    return d


# --- what a run costs ---


@pytest.mark.parametrize("power", [0.5, 0.94])
@pytest.mark.parametrize("bands", [2, 4])
def test_moves_are_those_of_the_inverse_matrix(power: float, bands: int) -> None:
    horizon, generator = 40, np.random.default_rng(0)
    coefficients = factorization.power_coefficients(power, bands)
    there = generator.random((5, horizon)) < 0.2
    there[4] = False
    sizes = generator.random((5, horizon)) * there
    clients, rounds = np.nonzero(there)
    found = moves(
        coefficients, horizon, count=5, clients=clients, rounds=rounds, sizes=sizes[there]
    )
    exact = np.linalg.solve(dense(coefficients, horizon), sizes.T)
    np.testing.assert_allclose(found.whole, np.linalg.norm(exact, axis=0), rtol=1e-8)
    np.testing.assert_allclose(found.largest, exact.max(0), rtol=1e-8)
    plain = moves(coefficients, horizon, count=5, clients=clients, rounds=rounds)
    schedules = [np.flatnonzero(row).tolist() for row in there]
    known = factorization.sensitivities(coefficients, horizon, schedules)
    np.testing.assert_allclose(plain.whole, known, rtol=1e-8)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_leaving_terms_or_rounds_out_moves_nobody_further(data: st.DataObject) -> None:
    horizon = data.draw(st.integers(2, 12))
    power, bands = data.draw(st.floats(0.1, 0.95)), data.draw(st.integers(2, 6))
    draw_bits = st.lists(st.booleans(), min_size=horizon, max_size=horizon)
    there = np.array(data.draw(draw_bits))
    coefficients = factorization.power_coefficients(power, bands)
    d, rounds = dense(coefficients, horizon), np.flatnonzero(there)
    planned = moves(
        coefficients, horizon, count=1, clients=np.zeros(len(rounds), int), rounds=rounds
    ).whole[0]
    kept = np.random.default_rng(data.draw(st.integers(0, 99))).random(d.shape) < 0.6
    fewer = np.where(kept | np.eye(horizon, dtype=bool), d, 0)
    released = np.array(data.draw(draw_bits))
    fewer = fewer[np.ix_(released, released)]
    left = there[released].astype(float)
    assert np.linalg.norm(np.linalg.solve(fewer, left)) <= planned + 1e-12


def test_what_the_proof_does_not_cover_is_refused() -> None:
    one = np.zeros(1, dtype=np.int64)
    for wrong in ((), (2.0,), (1.0, 0.5), (1.0, math.nan), (1.0, -math.inf)):
        with pytest.raises(ValueError, match="coefficients must be 1"):
            moves(wrong, 3, count=1, clients=one, rounds=one)
    with pytest.raises(ValueError, match="round 3 is not one of the 3 planned"):
        moves((1.0,), 3, count=1, clients=one, rounds=one + 3)
    with pytest.raises(ValueError, match="client 1 is not one of 1"):
        moves((1.0,), 3, count=1, clients=one + 1, rounds=one)


def test_a_client_is_charged_for_the_rounds_after_its_last() -> None:
    event, nothing = NoiseEvent("gaussian", 1.0), lambda _: SamplerCost()
    one = np.zeros(1, dtype=np.int64)
    charged = []
    for horizon in (1, 5, 50):
        found = moves((1.0, -0.9), horizon, count=1, clients=one, rounds=one)
        run, _ = whole_run(event, found.whole[0], found.largest[0], horizon, nothing)
        charged.append(run.noise_multiplier)
    assert charged == sorted(charged, reverse=True)
    exact = [1 / math.sqrt(sum(0.81**t for t in range(n))) for n in (1, 5, 50)]
    assert charged == pytest.approx(exact, rel=1e-8)


def test_inexact_noise_costs_what_the_largest_move_does_in_every_planned_round() -> None:
    def cost(event: NoiseEvent) -> SamplerCost:
        return SamplerCost(1 / event.noise_multiplier, 2 / event.noise_multiplier)

    _, extra = whole_run(NoiseEvent("gaussian", 1.0), 5.0, 0.25, 7, cost)
    assert (extra.epsilon, extra.delta) == (7 * 0.25, 7 * 0.5)


@pytest.mark.parametrize("form", ["wide", "fast"])
def test_no_client_passes_its_own_target_and_the_strictest_reaches_it(form: str) -> None:
    config = PrivacyConfig(
        **BANDED | {"epsilon": [2.0, 0.7], "delta": 1e-3}, noise_form=form, thresholds="fixed"
    )
    schedule = cohort_schedule(12, 3, 24, seed=1, one_order=True)
    plan = CorrelatedPlan.of((1.0, -0.8, -0.05), schedule, 12)
    budget = Budget(config, [6] * 12, 1.0, (40, 3), None, plan)
    budget.calibrate(1)
    z = budget.multiplier.numpy()
    assert len(set(z.tolist())) == 2
    spent = []
    for k in range(12):
        sizes = plan.sizes_of_one
        run, extra = whole_run(
            NoiseEvent("gaussian", 1.0), sizes.whole[k] / z[k], sizes.largest[k] / z[k], 24,
            lambda e: budget.sampler_cost_at(e, 1e-3),
        )  # fmt: skip
        assert extra.delta > 0
        spent.append(charged_epsilon(run, 1, 1e-3, extra))
    for target, mine in ((2.0, spent[::2]), (0.7, spent[1::2])):
        assert max(mine) <= target
        assert max(mine) > 0.99 * target
    # Independent rounds of the same multiplier would be charged much less: a wrong account shows.
    assert plan.sizes_of_one.whole.min() > 2 * math.sqrt(6)


def test_coefficients_come_from_the_servers_optimizer_and_schedule() -> None:
    schedule = cohort_schedule(100, 5, 60, seed=0, one_order=True)

    def sgd(momentum: float):
        return lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=momentum)

    def decay(optimizer: torch.optim.Optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.5)

    last = weights_in_last_model(sgd(0.9), decay, 60)
    rates = [0.5 * 0.5 ** (t // 10) for t in range(60)]
    np.testing.assert_allclose(last, factorization.last_of_sgd(rates, momentum=0.9))
    by = {
        name: best_for(2, weights_in_last_model(make, None, 60), schedule, 100)
        for name, make in (
            ("plain", sgd(0.0)),
            ("momentum", sgd(0.9)),
            ("adam", lambda parameters: torch.optim.Adam(parameters, lr=0.1)),
        )
    }
    assert by["momentum"][1] < by["plain"][1] < -0.5
    assert by["adam"] == by["momentum"]
    everyone = np.broadcast_to(np.arange(4), (10, 4))
    assert best_for(2, np.ones((1, 10)), everyone, 4) == (1.0,)


def test_one_order_gives_equal_gaps() -> None:
    schedule = cohort_schedule(20, 6, 23, seed=3, one_order=True)
    for client in range(20):
        gaps = np.diff(np.nonzero((schedule == client).any(1))[0])
        assert set(gaps.tolist()) <= {3, 4}
    assert all(len(set(row)) == 6 for row in schedule.tolist())


# --- the noise of a run ---


class Models(pl.Callback):
    """The model before and after every round, as one vector each."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer, module, *_) -> None:
        self.on_train_batch_end(trainer, module) if not self.seen else None

    def on_train_batch_end(self, trainer, module, *_) -> None:
        flat = [p.detach().double().flatten() for p in module.network.parameters()]
        self.seen.append(torch.cat(flat))


def measured(folder: Path, models: Models) -> tuple[np.ndarray, list[int]]:
    """D as a run had it: [released, released]; and the rounds that were released."""
    header, releases = read(folder)
    moved = [a - b for a, b in zip(models.seen, models.seen[1:], strict=False)]
    rounds = [r.round for r in releases]
    noise = ReleasedNoise(run_key(folder, seed=None, rng="chacha20", resume=True), folder)
    y, z, before = [], [], torch.zeros_like(moved[0])
    for release in releases:
        step = moved[release.round]
        gradient, before = step - 0.9 * before, step  # momentum of `fed_avg_m`
        scales = noise_scales(
            torch.tensor(release.clip_norm, dtype=torch.float64),
            torch.tensor(release.shares, dtype=torch.float64),
            mechanism="gaussian", noise_multiplier=release.noise_multiplier, adjacency="zero_out",
        )  # fmt: skip
        wide = torch.cat([s.expand(n) for s, n in zip(scales, header["dims"], strict=True)])
        y.append(-gradient * len(release.members(CLIENTS)) / wide)
        key, parts = noise.find(release.binding), []
        for layer, n in enumerate(header["dims"]):
            parts.append(
                sample_noise(
                    (n,), mechanism="gaussian", scale=1.0, key=key, step=0, layer=layer,
                    dtype=torch.float64,
                )
            )  # fmt: skip
        z.append(torch.cat(parts))
    z, y = torch.stack(z).numpy(), torch.stack(y).numpy()
    return np.linalg.lstsq(z.T, y.T, rcond=None)[0].T, rounds


HUGE = {"epsilon": None, "noise_multiplier": 1e6, "thresholds": "fixed", "allocation": "uniform"}


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_best_adversary_of_a_run_sees_what_the_ledger_charges(
    tmp_path: Path, dropout: float
) -> None:
    models = Models()
    go(
        tmp_path, 12, privacy=BANDED | HUGE | {"bands": 3, "seed": None}, clients_per_round=1,
        planned_rounds=12, dropout=dropout, weighting="uniform", callbacks=[models],
    )  # fmt: skip
    header, releases = read(tmp_path)
    d, rounds = measured(tmp_path, models)
    wanted = dense(tuple(header["coefficients"]), 12)[np.ix_(rounds, rounds)]
    assert header["coefficients"][2] < -0.005
    np.testing.assert_allclose(d, wanted, atol=2e-4)
    assert (len(rounds) < 12) == bool(dropout)
    assert [r.combined for r in releases] == [
        tuple(r for r in (t - 1, t - 2) if r in rounds) for t in rounds
    ]
    inverse = np.linalg.inv(wanted)
    charged = accounts(header, releases)
    for client in range(CLIENTS):
        took_part = [i for i, r in enumerate(releases) if client in r.members(CLIENTS)]
        seen = np.linalg.norm(inverse[:, took_part].sum(1)) / 1e6
        (charge,) = charged[client].charges
        paid = 1 / charge.event.noise_multiplier
        assert seen <= paid
        if not dropout:
            assert paid == pytest.approx(seen, rel=1e-6)
        assert charged[client].releases == len(took_part)


def test_the_statement_says_what_is_charged_and_how_groups_fare(tmp_path: Path) -> None:
    privacy = BANDED | {"epsilon": 2.0, "thresholds": "fixed"}
    module = go(tmp_path, 6, privacy=privacy, clients_per_round=2, planned_rounds=6)
    assert module.ledger is not None
    text = privacy_statement(module.ledger)
    assert re.search(r"Composition: none: rounds share noise \(coefficients 1, -0\.\d+\)", text)
    assert "as one Gaussian over all 6 planned rounds" in text
    assert "no more than the 6 planned rounds" in text
    assert "in a round; in the run, the L2 norm of what its rounds move in all planned ones" in text
    words = "shared by 2 rounds; charged at once for all 6 planned rounds"
    summary = run_summary(module.trainer, module, 1.0)
    assert summary["noise"] == words
    assert words in list(final_table(summary).columns[1].cells)
    (tmp_path / "summary.json").write_text("{}")
    assert f"| noise | {words} |" in (export(tmp_path, tmp_path / "out") / "README.md").read_text()
    header, releases = read(tmp_path)
    found = client_steps(header, releases)
    pair = in_correlated_sums(list(found.values()), 2, horizon=6)
    d = np.linalg.inv(dense(tuple(header["coefficients"]), 6))
    multipliers = [client_multipliers(header, r) for r in releases]
    moved = []
    for client in range(CLIENTS):
        a = np.zeros(6)
        for r, own in zip(releases, multipliers, strict=True):
            if client in r.members(CLIENTS):
                a[r.round] = 1 / own[r.members(CLIENTS).tolist().index(client)]
        moved.append(d @ a)
    together = [a + b for i, a in enumerate(moved) for b in moved[:i]]
    assert pair.joint is not None
    assert max(np.linalg.norm(v) for v in together) <= pair.joint
    assert max(v.max() for v in together) <= max(m.shifts[0] for m in pair.counts)
    assert pair.joint == pytest.approx(max(np.linalg.norm(v) for v in together), rel=0.2)
    assert not pair.exact


def test_votes_share_noise_as_layers_do() -> None:
    config = PrivacyConfig(**BANDED, noise_multiplier=2.0, epsilon=None, thresholds="quantile")
    history = ReleasedHistory(config, 1, (3, 2))
    row = torch.zeros(1, dtype=torch.int64)
    policy = history.policy(row, torch.tensor([2.0], dtype=torch.float64))
    keys = [NoiseKey.from_seed(s) for s in (1, 2, 3)]
    shared = SharedNoise((-0.8, -0.1), (keys[1], keys[2]), lambda _: keys[0])
    votes = noised_votes(
        torch.zeros(1, 2, dtype=torch.float64), policy, config, keys[0], 0, row,
        correlation=shared.correlation,
    )  # fmt: skip
    z = [
        sample_noise(
            (1, 2),
            mechanism="gaussian",
            scale=1.0,
            key=NoiseKey.from_seed(s),
            step=0,
            client=row,
            layer=2,
            dtype=torch.float64,
        )
        for s in (1, 2, 3)
    ]
    scale = policy.vote_noise_scale
    torch.testing.assert_close(votes, (scale * (z[0] - 0.8 * z[1] - 0.1 * z[2])).float())
    assert shared.deviation == pytest.approx(math.sqrt(1 + 0.64 + 0.01))


def test_a_line_says_which_rounds_it_combined() -> None:
    values = {
        "client": ALL_CLIENTS, "round": 5, "steps": 1, "mechanism": "gaussian",
        "noise_multiplier": 2.0, "sampling_rate": 1.0, "adjacency": "zero_out", "num_layers": 1,
        "clip_norm": (1.0,), "shares": (1.0,), "binding": "", "digest": "", "largest_weight": 1.0,
        "spent": "",
    }  # fmt: skip
    for combined in (None, (), (4,), (4, 2)):
        release = Release(**values, combined=combined)
        assert parse_release(json.loads(json.dumps(release_entry(release)))) == release
        assert ("combined" in release_entry(release)) == (combined is not None)
    for wrong in ((5,), (2, 4), (4, 4), (-1,)):
        with pytest.raises(ValueError, match="combined must be rounds before 5"):
            Release(**values, combined=wrong)
    single = {n: v for n, v in values.items() if n not in ("largest_weight", "spent")}
    with pytest.raises(ValueError, match="client must be -1 in a sum"):
        Release(**single | {"client": 0}, combined=(4,))


# --- keys of released noise ---


def test_noise_is_found_again_and_bound_to_what_it_hides(tmp_path: Path) -> None:
    key, values = NoiseKey.random(), [torch.ones(3), 2.0]
    noise, of_round = ReleasedNoise(key, tmp_path), key.derive("round", 1)
    one = noise.keep(of_round, values)
    again = ReleasedNoise(key, tmp_path)
    assert again.find(public_name(one)) == one == again.keep(of_round, values)
    others = [
        noise.keep(of_round, [torch.zeros(3), 2.0]),
        noise.keep(key.derive("round", 2), values),
    ]
    assert len({one, *others}) == 3
    assert all(ReleasedNoise(key, tmp_path).find(public_name(k)) == k for k in (one, *others))
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600
    text = (tmp_path / FILE).read_text()
    (tmp_path / FILE).write_text(text[:-20])  # a crash tore the last line
    torn = ReleasedNoise(key, tmp_path)
    with pytest.raises(ValueError, match="does not know the noise"):
        torn.find(public_name(others[1]))
    assert torn.keep(key.derive("round", 2), values) == others[1]
    assert ReleasedNoise(key, tmp_path).find(public_name(others[1])) == others[1]
    (tmp_path / FILE).write_text(text.replace(text.split()[1], "0" * 64))
    with pytest.raises(ValueError, match="was changed"):
        ReleasedNoise(key, tmp_path).find(public_name(one))
    (tmp_path / FILE).chmod(0o644)
    with pytest.raises(ValueError, match="others can read it"):
        ReleasedNoise(key, tmp_path)


def test_noise_that_cannot_be_kept_is_not_drawn(tmp_path: Path) -> None:
    """By whichever process the file is written: all of them hear of it."""

    def full(work):
        raise OSError(28, "No space left on device")

    noise = ReleasedNoise(NoiseKey.random(), tmp_path, once=full)
    for _ in range(2):  # nor is it remembered as if it had been
        with pytest.raises(OSError, match="No space left"):
            noise.keep(NoiseKey.random().derive("round", 1), [1.0])


def test_noise_of_a_public_seed_is_that_of_the_round_alone(tmp_path: Path) -> None:
    key = NoiseKey.from_seed(3)
    noise = ReleasedNoise(key, tmp_path, once=lambda work: None)  # another process writes
    one, other = (noise.keep(key.derive("round", 1), [float(i)]) for i in range(2))
    assert one == other
    assert one.simulated
    assert not (tmp_path / FILE).exists()


# --- what is refused ---


REFUSED = {
    "setting": {"setting": "client+secure_sum"},
    "setting='client+local'": {"setting": "client+local"},
    "setting='record+local'": {"setting": "record+local", "cohort_sampling": "default"},
    "setting='none'": {"setting": "none"},
    "mechanism": {"mechanism": "laplace"},
    "noise_form": {"noise_form": "grid"},
    "cohort_sampling='poisson'": {"cohort_sampling": "poisson"},
    "cohort_sampling='default'": {"cohort_sampling": "default"},
    "noise_multiplier=2.0": {"noise_multiplier": 2.0, "epsilon": 3.0},
    "noise_multiplier=0": {"noise_multiplier": 0, "epsilon": None},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_proof_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(name)}.*with correlation='banded'"):
        PrivacyConfig(**BANDED | REFUSED[name])


@pytest.mark.parametrize("bands", [1, 65, True])
def test_bands_have_a_range(bands: int) -> None:
    with pytest.raises(ValueError, match=rf"bands={bands} must be in \[2, 64\]"):
        PrivacyConfig(**BANDED, bands=bands)


def test_bands_without_correlation_are_refused() -> None:
    with pytest.raises(ValueError, match="bands=3 with correlation='none'"):
        PrivacyConfig(bands=3)
    assert "bands" not in named_options(PrivacyConfig())
    assert "correlation='banded', seed=None" in named_options(PrivacyConfig(**BANDED))
