"""Black-box attacks on every mechanism: an adversary must show less of ε than is proven.

Many releases of two neighbouring inputs are made, and the likelihood ratio is thresholded: for an
event A, ε >= ln((P[A] - δ) / P'[A]), with Clopper-Pearson limits for both. The same attack must
show more than the proven ε where the noise is cut to two thirds, the clip is doubled, or a layer's
noise is what it would be if the layer were all that is accounted for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from aadp_kernels import Layout, NoiseKey, _dispatch
from fl_lightning import PrivacyConfig
from fl_lightning.accounting.composition import compose_epsilon
from fl_lightning.local.batches import Batch
from fl_lightning.privacy.clipping import clipped_sums
from fl_lightning.privacy.history import ReleasedHistory
from fl_lightning.privacy.mechanism import PrivateRecordGradient, release_updates
from fl_lightning.privacy.noised_sum import NoisedSum
from fl_lightning.privacy.weights import event_multiplier
from fl_lightning.values.event import NoiseEvent
from fl_lightning.values.round import LayerPolicy

DELTA = 0.05
MULTIPLIER = 0.7
CLIP = [0.7, 1.6]
Policy = Callable[[LayerPolicy], LayerPolicy]
LAYOUT = Layout.build({"a.w": torch.empty(2), "b.w": torch.empty(1)})
DIRECTION = {"a.w": torch.tensor([1.0, 0.0]), "b.w": torch.tensor([1.0])}
ROOT = NoiseKey.from_seed(7)
VOTERS = 40.0  # so many that noisy votes stay within what the quantile rule reads


def built(policy: LayerPolicy) -> LayerPolicy:
    return policy


def less_noise(policy: LayerPolicy) -> LayerPolicy:
    votes = policy.vote_noise_scale
    return replace(
        policy,
        noise_scale=policy.noise_scale * 2 / 3,
        vote_noise_scale=None if votes is None else votes * 2 / 3,
    )


def double_clip(policy: LayerPolicy) -> LayerPolicy:
    return replace(policy, clip_norm=policy.clip_norm * 2)


@dataclass
class Forgotten:
    """The noise that a calibration without the layer of the largest share would give."""

    mechanism: str

    def __call__(self, policy: LayerPolicy) -> LayerPolicy:
        rest = 1 - policy.shares.amax(1, keepdim=True)
        factor = rest.sqrt() if self.mechanism == "gaussian" else rest
        return replace(policy, noise_scale=policy.noise_scale * factor)


class Changed(ReleasedHistory):
    """A history whose policies are changed on the way to the mechanism."""

    change: Policy = staticmethod(built)

    def policy(self, clients: Tensor, multiplier: Tensor) -> LayerPolicy:
        return self.change(super().policy(clients, multiplier))


def history_of(config: PrivacyConfig, rows: int, change: Policy, dims: tuple[int, ...]) -> Changed:
    history = Changed(config, rows, dims)
    history.change = change
    return history


def lower_bound(one: NDArray[np.float64], other: NDArray[np.float64], delta: float) -> float:
    """What the statistic shows of ε with confidence 0.999, by a threshold chosen on a quarter."""
    best = 0.0
    for a, b, sign in ((one, other, 1), (other, one, -1)):
        (a1, a2), (b1, b2) = (np.split(sign * v, [len(v) // 4]) for v in (a, b))
        thresholds = np.quantile(b1, np.linspace(0.3, 0.999, 140))
        chosen = max(thresholds, key=lambda t: _shown(a1, b1, t, delta))
        best = max(best, _shown(a2, b2, chosen, delta))
    return best


def _shown(a: NDArray[np.float64], b: NDArray[np.float64], t: float, delta: float) -> float:
    """ln((P[a >= t] - δ) / P[b >= t]) at the bad ends of the intervals of both probabilities."""
    hits_a, hits_b = int((a >= t).sum()), int((b >= t).sum())
    low = stats.beta.ppf(0.0005, hits_a, len(a) - hits_a + 1) if hits_a else 0.0
    high = stats.beta.ppf(0.9995, hits_b + 1, len(b) - hits_b) if hits_b < len(b) else 1.0
    return math.log((low - delta) / high) if low > delta else 0.0


def log_ratio(released: Tensor, shift: Tensor, back: Tensor, scale: Tensor, mechanism: str):
    """Log-likelihood of `shift` against `back`, both [n, d], for the noise that is stated."""
    if mechanism == "gaussian":
        terms = ((released - back) ** 2 - (released - shift) ** 2) / (2 * scale**2)
    else:
        terms = ((released - back).abs() - (released - shift).abs()) / scale
    return terms.sum(1).numpy()


def config_of(setting: str, mechanism: str, **options: object) -> PrivacyConfig:
    return PrivacyConfig(
        setting=setting, mechanism=mechanism, epsilon=None, clip_norm=CLIP, allocation="abstract",
        **({"noise_multiplier": MULTIPLIER, "thresholds": "fixed"} | options),
    )  # fmt: skip


# --- one release of many clients: every client is a trial ---


def local_clients(config: PrivacyConfig, change: Policy, n: int) -> tuple[NDArray, NDArray, float]:
    """client+local: one client's update against the opposite one."""
    layout = Layout.build({"a.w": torch.empty(2), "b.w": torch.empty(1)})
    direction = {"a.w": torch.tensor([1.0, -1.0]), "b.w": torch.tensor([1.0])}
    ratios, clients = [], torch.arange(n)
    multiplier = torch.full((n,), MULTIPLIER, dtype=torch.float64)
    known = history_of(config, n, change, layout.dims).policy(clients, multiplier)
    for sign in (1.0, -1.0):
        history = history_of(config, n, change, layout.dims)
        update = {m: (1e3 * sign * v).expand(n, -1).clone() for m, v in direction.items()}
        release = release_updates(
            update, history.policy(clients, multiplier), history, layout,
            key=NoiseKey.from_seed(int(sign) + 5), clients=clients, multiplier=multiplier,
        )  # fmt: skip
        shift, scale = [], []
        for layer, v in enumerate(direction.values()):
            norm = v.norm(p=config.p)
            shift.append(v * float(known.clip_norm[0, layer]) / norm)
            scale.append(known.noise_scale[:, layer, None].expand(-1, len(v)))
        u = torch.cat(shift)
        got = torch.cat([release.update[m].double() for m in direction], 1)
        ratios.append(log_ratio(got, u, -u, torch.cat(scale, 1), config.mechanism))
    event = NoiseEvent(config.mechanism, MULTIPLIER, 1.0, config.resolved_adjacency)
    return ratios[0], ratios[1], compose_epsilon({event: 1}, DELTA)


class TwoLayers(nn.Module):
    """Two layers of one parameter each; the gradient of a record is its label times 1000."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.a.weight)
        nn.init.ones_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def signed_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return 1e3 * labels * outputs[:, 0]


def local_records(
    config: PrivacyConfig, change: Policy, n: int, rate: float
) -> tuple[NDArray, NDArray, float]:
    """record+local: one record, in the batch by a coin, against none or the opposite one."""
    torch.manual_seed(0)
    network = TwoLayers()
    layout = Layout.build(dict(network.named_parameters()))
    params = {m: p.detach() for m, p in network.named_parameters()}
    clients = torch.arange(n)
    multiplier = torch.full((n,), MULTIPLIER, dtype=torch.float64)
    replaced = config.resolved_adjacency == "replace_one"
    x = torch.ones(n, 1, 1)
    sums = clipped_sums(
        network, signed_loss, layout, p=config.p, vectorize=True, max_examples=2**40, example=x[0],
        clipping=config.clipping, mechanism=config.mechanism,
    )  # fmt: skip
    known = history_of(config, n, change, layout.dims).policy(clients, multiplier)
    ratios = []
    for world in (1.0, -1.0 if replaced else 0.0):
        coins = torch.rand(n, generator=torch.Generator().manual_seed(int(world) + 9)) < rate
        history = history_of(config, n, change, layout.dims)
        hook = PrivateRecordGradient(
            sums, history, layout, key=NoiseKey.from_seed(int(world) + 3), clients=clients,
            multiplier=multiplier,
        )  # fmt: skip
        mask = (coins & (world != 0)).float()[:, None]
        labels = torch.full((n, 1), world)
        batch = Batch(x, labels, mask, torch.ones(n), torch.ones(n, dtype=torch.bool))
        before = history.l1_norm.clone()
        released = hook(0, params, True, batch)
        u = known.clip_norm[0]
        if config.clipping == "joint":
            # Equal gradients of both layers, on the edge of the bound.
            inverse = known.shares[0] ** (0.5 if config.mechanism == "gaussian" else 1.0) / u
            u = (1 / inverse.norm(p=2 if config.mechanism == "gaussian" else 1)).expand(2)
        got = torch.cat([released[m].double().view(n, 1) for m in layout.names], 1)
        back = -u if replaced else torch.zeros(2, dtype=torch.float64)
        ratio = log_ratio(got, u, back, known.noise_scale, config.mechanism)
        if known.vote_noise_scale is not None:
            # The votes as the released history shows them; a huge gradient votes -1/2.
            votes = config.quantile - (history.l1_norm / before).log() / -config.quantile_lr
            votes = -(votes - 2 * config.quantile) - 0.5
            scale = known.vote_noise_scale[:, None]
            half = torch.full((2,), -0.5, dtype=torch.float64)
            ratio = ratio + log_ratio(votes, half, 0 * half, scale, config.mechanism)
        ratios.append(ratio)
    event = NoiseEvent(config.mechanism, MULTIPLIER, rate, config.resolved_adjacency)
    return ratios[0], ratios[1], compose_epsilon({event: 1}, DELTA)


# --- sums: every release is a trial ---


@dataclass
class Attack:
    """An attack on one client of a sum; a trial is a release.

    Args:
        config: the privacy configuration.
        multiplier: noise multiplier of a client of weight 1; it and delta are those for which few
            trials tell a broken mechanism.
        delta: at which epsilon is shown.
        trials: releases in each world.
        rate: probability that the client takes part.
        weight: of the attacked client.
    """

    config: PrivacyConfig
    multiplier: float = 1.0
    delta: float = 0.2
    trials: int = 1800
    rate: float = 1.0
    weight: float = 1.0

    def __call__(self, change: Policy) -> tuple[NDArray, NDArray, float]:
        """Log-likelihood ratios of releases with and without the client, and the proven ε."""
        row, z = torch.zeros(1, dtype=torch.int64), torch.tensor([self.multiplier]).double()
        known = history_of(self.config, 1, change, LAYOUT.dims).policy(row, z)
        coins = np.random.default_rng(0).random((2, self.trials)) < self.rate
        ratios = []
        for world in (1, 0):
            released = [
                self.release(change, bool(world and coins[world, trial]), (world, trial))
                for trial in range(self.trials)
            ]
            values, votes = (torch.stack(v) for v in zip(*released, strict=True))
            ratios.append(self.log_ratio(values, votes, known))
        claimed = event_multiplier(
            self.weight, self.multiplier,
            mechanism=self.config.mechanism, vote_share=self.config.votes,
        )  # fmt: skip
        event = NoiseEvent(
            self.config.mechanism, float(claimed), self.rate, self.config.resolved_adjacency
        )
        return ratios[0], ratios[1], compose_epsilon({event: 1}, self.delta)

    def release(self, change: Policy, there: bool, names: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """One sum of two clients, one of which sends nothing; and the votes it shows."""
        history = history_of(self.config, 1, change, LAYOUT.dims)
        total = NoisedSum(
            history, LAYOUT, multiplier=self.multiplier, key=ROOT.derive(*names),
            survivors=2 if self.config.setting == "client+secure_sum" else None,
        )  # fmt: skip
        # Who is zeroed out contributes zeros and votes 0, as a client that is not finite does.
        own = 1e3 if there else math.nan
        update = {m: torch.stack([0 * v, own * v]) for m, v in DIRECTION.items()}
        before = history.l1_norm[0].clone()
        total.add(update, torch.arange(2), torch.tensor([1.0, self.weight]))
        release = total.release(divisor=1.0, expected_votes=VOTERS)
        moved = (history.l1_norm[0] / before).log() / -self.config.quantile_lr
        votes = (moved + self.config.quantile - 0.5) * VOTERS
        return torch.cat([release.update[m][0].double() for m in DIRECTION]), votes - 0.5

    def log_ratio(self, values: Tensor, votes: Tensor, known: LayerPolicy) -> NDArray:
        """What a release says for a client that was there, by the noise that is stated."""
        parts = list(enumerate(DIRECTION.values()))
        norms = [v.norm(p=self.config.p) for _, v in parts]
        shift = torch.cat([v * known.clip_norm[0, i] / norms[i] for i, v in parts]) * self.weight
        scale = torch.cat([known.noise_scale[0, i].expand(len(v)) for i, v in parts])
        ratio = log_ratio(values, shift, 0 * shift, scale, self.config.mechanism)
        if known.vote_noise_scale is None:
            return ratio
        half = torch.full((LAYOUT.num_layers,), -0.5, dtype=torch.float64)
        stated = known.vote_noise_scale[0].expand_as(half)
        return ratio + log_ratio(votes, half, 0 * half, stated, self.config.mechanism)


def sum_attacks() -> Iterator[tuple[str, Attack]]:
    """Every setting that releases sums, with each mechanism, coin, vote and weight."""
    for setting in ("client+aggregator", "client+secure_sum"):
        gaussian, laplace = (config_of(setting, m) for m in ("gaussian", "laplace"))
        voting = config_of(
            setting, "gaussian", thresholds="quantile", vote_share=0.2, clip_factor=1.0
        )
        yield f"{setting}-gaussian", Attack(gaussian)
        yield f"{setting}-gaussian-votes", Attack(voting)
        yield f"{setting}-laplace", Attack(laplace, 0.7, delta=0.01, trials=2900)
        if setting == "client+aggregator":
            light = Attack(gaussian, multiplier=0.5, weight=0.5)
            yield f"{setting}-gaussian-weighted", light
            yield f"{setting}-gaussian-q0.4", Attack(gaussian, 0.5, trials=2300, rate=0.4)
            often = Attack(laplace, 0.4, delta=0.01, trials=4600, rate=0.4)
            yield f"{setting}-laplace-q0.4", often


def cases() -> Iterator[tuple[str, Callable[[Policy], tuple[NDArray, NDArray, float]], str]]:
    for mechanism in ("gaussian", "laplace"):
        config = config_of("client+local", mechanism)
        yield (
            f"client+local-{mechanism}",
            lambda c, p=config: local_clients(p, c, 20_000),
            mechanism,
        )
        for adjacency in ("zero_out", "replace_one"):
            if (mechanism, adjacency) == ("laplace", "replace_one"):
                continue
            for thresholds in ("fixed", "quantile"):
                config = config_of(
                    "record+local", mechanism, adjacency=adjacency, thresholds=thresholds,
                    vote_share=0.2, clip_factor=1.0,
                )  # fmt: skip
                for rate in (1.0, 0.4):
                    name = f"record+local-{mechanism}-{adjacency}-{thresholds}-q{rate}"
                    if thresholds == "quantile" and rate < 1:
                        continue
                    yield (
                        name,
                        lambda c, p=config, q=rate: local_records(p, c, 20_000, q),
                        mechanism,
                    )


def joint_cases() -> Iterator[tuple[str, Callable[[Policy], tuple[NDArray, NDArray, float]], str]]:
    """One factor a record; client after client, hence fewer trials."""
    for mechanism in ("gaussian", "laplace"):
        for rate in (1.0, 0.4):
            config = config_of("record+local", mechanism, clipping="joint")
            trials = 18_000 if (mechanism, rate) == ("laplace", 0.4) else 9_000
            yield (
                f"record+local-{mechanism}-joint-q{rate}",
                lambda c, p=config, q=rate, n=trials: local_records(p, c, n, q),
                mechanism,
            )


CASES = {name: (run, mechanism, DELTA) for name, run, mechanism in (*cases(), *joint_cases())}
CASES |= {name: (attack, attack.config.mechanism, attack.delta) for name, attack in sum_attacks()}


@pytest.fixture
def _compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits in a fifth of the time: small noise too is drawn by numba where it is there."""
    monkeypatch.setattr(_dispatch, "AUTO_ELEMENTS", 0)


@pytest.mark.slow
@pytest.mark.usefixtures("_compiled")
@pytest.mark.parametrize("name", CASES)
def test_an_attack_shows_less_than_is_proven_and_more_of_a_broken_mechanism(name: str) -> None:
    run, mechanism, delta = CASES[name]
    one, other, epsilon = run(built)
    assert lower_bound(one, other, delta) <= epsilon
    for change in (less_noise, double_clip, Forgotten(mechanism)):
        one, other, _ = run(change)
        assert lower_bound(one, other, delta) > epsilon, change


def test_the_attack_itself_on_a_known_mechanism() -> None:
    generator = np.random.default_rng(1)
    for scale, broken in ((1.0, False), (2 / 3, True)):
        one, other = (scale * generator.standard_normal(40_000) + m for m in (1, 0))
        epsilon = compose_epsilon({NoiseEvent("gaussian", 1.0): 1}, DELTA)
        shown = lower_bound(one, other, DELTA)
        assert (shown > epsilon) == broken
        assert shown > 0.8 * epsilon
