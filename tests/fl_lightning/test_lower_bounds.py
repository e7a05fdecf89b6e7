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

from aadp_kernels import Layout, NoiseKey
from fl_lightning import PrivacyConfig
from fl_lightning.client import Batch
from fl_lightning.privacy.accounting import NoiseEvent, compose_epsilon
from fl_lightning.privacy.clipping import clipped_sums
from fl_lightning.privacy.history import ReleasedHistory
from fl_lightning.privacy.mechanism import PrivateRecordGradient, release_updates
from fl_lightning.privacy.pooled_sum import PooledSum
from fl_lightning.types import LayerPolicy

DELTA = 0.05
MULTIPLIER = 0.7
CLIP = [0.7, 1.6]
Policy = Callable[[LayerPolicy], LayerPolicy]


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
    """The noise of the layer with the smaller share as if it alone were accounted for."""

    mechanism: str

    def __call__(self, policy: LayerPolicy) -> LayerPolicy:
        scale = policy.noise_scale.clone()
        layer = int(policy.shares[0].argmin())
        part = policy.shares[:, layer]
        scale[:, layer] *= part.sqrt() if self.mechanism == "gaussian" else part
        return replace(policy, noise_scale=scale)


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
    """What the statistic shows of ε with confidence 0.999, by a threshold chosen on a half."""
    best = 0.0
    for a, b, sign in ((one, other, 1), (other, one, -1)):
        (a1, a2), (b1, b2) = np.array_split(sign * a, 2), np.array_split(sign * b, 2)
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
        network, signed_loss, layout, p=config.p, vectorize=True, max_examples=2**40, example=x[0]
    )
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


def sums_of_clients(
    config: PrivacyConfig, change: Policy, n: int, rate: float
) -> tuple[NDArray, NDArray, float]:
    """A sum of three clients with or without one of them, who takes part by a coin."""
    layout = Layout.build({"a.w": torch.empty(2), "b.w": torch.empty(1)})
    direction = {"a.w": torch.tensor([1.0, -1.0]), "b.w": torch.tensor([1.0])}
    known = history_of(config, 1, change, layout.dims).policy(
        torch.zeros(1, dtype=torch.int64), torch.full((1,), MULTIPLIER, dtype=torch.float64)
    )
    parts = list(enumerate(direction.values()))
    u = torch.cat([v * known.clip_norm[0, i] / v.norm(p=config.p) for i, v in parts])
    scale = torch.cat([known.noise_scale[0, i].expand(len(v)) for i, v in parts])
    others = {m: torch.zeros(2, len(v)) for m, v in direction.items()}
    root, ratios = NoiseKey.from_seed(7), []
    coins = np.random.default_rng(0).random((2, n)) < rate
    for world in (1, 0):
        rows = []
        for trial in range(n):
            total = PooledSum(
                history_of(config, 1, change, layout.dims), layout, multiplier=MULTIPLIER,
                survivors=2 if config.setting == "client+secure_sum" else None,
                key=root.derive(world, trial),
            )  # fmt: skip
            update = {m: v.clone() for m, v in others.items()}
            if world and coins[world, trial]:
                update = {m: torch.cat([v, 1e3 * direction[m][None]]) for m, v in update.items()}
            k = len(update["a.w"])
            total.add(update, torch.arange(k), torch.ones(k))
            release = total.release(divisor=1.0, expected_votes=1.0)
            rows.append(torch.cat([release.update[m][0].double() for m in direction]))
        ratios.append(log_ratio(torch.stack(rows), u, 0 * u, scale, config.mechanism))
    event = NoiseEvent(config.mechanism, MULTIPLIER, rate, config.resolved_adjacency)
    return ratios[0], ratios[1], compose_epsilon({event: 1}, DELTA)


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
        for setting, rate in (
            ("client+aggregator", 1.0), ("client+aggregator", 0.4), ("client+secure_sum", 1.0)
        ):  # fmt: skip
            config = config_of(setting, mechanism)
            yield (
                f"{setting}-{mechanism}-q{rate}",
                lambda c, p=config, q=rate: sums_of_clients(p, c, 4000, q),
                mechanism,
            )


CASES = {name: (run, mechanism) for name, run, mechanism in cases()}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_an_attack_shows_less_than_is_proven_and_more_of_a_broken_mechanism(name: str) -> None:
    run, mechanism = CASES[name]
    one, other, epsilon = run(built)
    shown = lower_bound(one, other, DELTA)
    assert shown <= epsilon
    # One Laplace of the joint multiplier dominates the layers' product, which shows less.
    least = 0.6 if mechanism == "gaussian" else 0.45
    assert shown > least * epsilon, "the attack is too weak to tell anything"
    for change in (less_noise, double_clip, Forgotten(mechanism)):
        one, other, _ = run(change)
        assert lower_bound(one, other, DELTA) > epsilon, change


def test_the_attack_itself_on_a_known_mechanism() -> None:
    generator = np.random.default_rng(1)
    for scale, broken in ((1.0, False), (2 / 3, True)):
        one, other = (scale * generator.standard_normal(40_000) + m for m in (1, 0))
        epsilon = compose_epsilon({NoiseEvent("gaussian", 1.0): 1}, DELTA)
        shown = lower_bound(one, other, DELTA)
        assert (shown > epsilon) == broken
        assert shown > 0.8 * epsilon
