"""@"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from aadp_kernels import NoiseKey, noise_scales, sample_noise
from fl_lightning import FederatedDataModule, PrivacyConfig, from_arrays
from fl_lightning.accounting.group_privacy import in_correlated_sums
from fl_lightning.accounting.sum_costs import client_multipliers
from fl_lightning.export import export
from fl_lightning.keys.released_noise import FILE, ReleasedNoise
from fl_lightning.keys.run_key import public_name, run_key
from fl_lightning.ledger import read, report, verify
from fl_lightning.ledger.accounts import accounts
from fl_lightning.ledger.statement import privacy_statement
from fl_lightning.ledger.statement_groups import client_steps
from fl_lightning.output.summary import final_table, run_summary
from fl_lightning.privacy.history import ReleasedHistory
from fl_lightning.privacy.mechanism import noised_votes
from fl_lightning.privacy.named_options import named_options
from fl_lightning.privacy.noised_sum import SharedNoise
from fl_lightning.values.release import ALL_CLIENTS, Release, parse_release, release_entry
from tests.fl_lightning import resuming
from tests.fl_lightning.correlated_values import BANDED, dense
from tests.fl_lightning.resuming import CLIENTS, go

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


def measured(
    folder: Path, models: Models, divisor: float | None = None
) -> tuple[np.ndarray, list[int]]:
    """D as a run had it: [released, released]; and the rounds that were released.

    A round's sum is taken to be divided by its clients; `divisor` is another one.
    """
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
        y.append(-gradient * (divisor or len(release.members(CLIENTS))) / wide)
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


def test_noise_is_taken_back_in_the_scale_it_was_added_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients of very different sizes and ε, one a round."""
    x = torch.randn(90, 6, generator=torch.Generator().manual_seed(3))
    owners = np.repeat(np.arange(3), (60, 20, 10))
    arrays = from_arrays(x, torch.arange(90) % 3, num_classes=3, client=owners)
    data = FederatedDataModule(arrays, CLIENTS, partition="natural")
    monkeypatch.setattr(resuming, "blobs", lambda _: data)
    models = Models()
    different = {"noise_multiplier": None, "epsilon": [2e-3, 4e-3, 8e-3], "delta": 1e-6}
    go(
        tmp_path, 12, privacy=BANDED | HUGE | different | {"seed": None}, clients_per_round=1,
        planned_rounds=12, weighting="records", callbacks=[models],
    )  # fmt: skip
    header, releases = read(tmp_path)
    sizes = data.client_sizes.numpy()
    assert {r.largest_weight for r in releases} == {sizes.max()}
    assert len({r.noise_multiplier for r in releases}) == 1
    assert len({r.members(CLIENTS).tobytes() for r in releases}) == 3
    z = np.array(header["noise_multiplier"])
    weights = np.minimum(sizes / sizes.max(), z.min() / z)
    d, _ = measured(tmp_path, models, weights.mean())
    wanted = dense(tuple(header["coefficients"]), 12)
    np.testing.assert_allclose(d, wanted, atol=0.02)
    assert verify(tmp_path) == []
    spent = {k: account.epsilon for k, account in report(tmp_path).items()}
    assert all(0 < spent[k] <= different["epsilon"][k] for k in range(CLIENTS))


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
