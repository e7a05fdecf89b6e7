"""The forms of the noise in fl_lightning: what each adds, and on which grid."""

import logging
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import stats

from aadp_kernels import Layout, NoiseKey, grid, sample_noise
from fl_lightning import PrivacyConfig
from fl_lightning.models import MLP
from fl_lightning.module import cross_entropy
from fl_lightning.privacy.clipping import clip_in_backward_sums, clipped_sums, per_sample_sums
from fl_lightning.privacy.history import ReleasedHistory
from fl_lightning.privacy.mechanism import PrivateRecordGradient, noised_votes, vote_quanta
from fl_lightning.privacy.named_options import named_options

T = 2.0**30
MECHANISMS = ("gaussian", "laplace")


def quantum_of(scale: float, mechanism: str) -> float:
    return scale / T if mechanism == "gaussian" else scale * math.log(2) / T


class Double(MLP):
    """Parameters in float64, whose low bits show the grid."""

    def forward(self, x):
        return super().forward(x.double())


def make_network(kind=MLP):
    torch.manual_seed(0)
    return kind(in_features=8, hidden=(30, 20), num_classes=3)


# Options ------------------------------------------------------------------------------------------


def test_delta_zero_asks_for_the_grid():
    for form in ("wide", "fast"):
        with pytest.raises(ValueError, match=f"delta=0 with noise_form='{form}'.*'grid'"):
            PrivacyConfig(mechanism="laplace", delta=0.0, noise_form=form)
    assert PrivacyConfig(mechanism="laplace", delta=0.0, noise_form="grid").p == 1
    with pytest.raises(ValueError, match="delta=0 is only possible with mechanism='laplace'"):
        PrivacyConfig(delta=0.0, noise_form="grid")
    with pytest.raises(ValueError, match="noise_form='exact' must be one of wide, fast, grid"):
        PrivacyConfig(noise_form="exact")
    with pytest.raises(ValueError, match="all clients need noise, or none"):
        PrivacyConfig(epsilon=None, noise_multiplier=[0.0, 1.0], noise_form="grid")


def test_seeded_noise_is_bound_to_the_form_but_older_runs_keep_theirs():
    texts = {named_options(PrivacyConfig(noise_form=form)) for form in ("wide", "fast", "grid")}
    assert len(texts) == 3
    assert "noise_form" not in named_options(PrivacyConfig())


# Noise --------------------------------------------------------------------------------------------


CASES = [
    {"setting": "record+local", "mechanism": "gaussian", "thresholds": "quantile"},
    {"setting": "record+local", "mechanism": "laplace", "thresholds": "fixed"},
    {"setting": "client+local", "mechanism": "gaussian", "thresholds": "fixed"},
    {"setting": "client+local", "mechanism": "laplace", "thresholds": "fixed"},
    {"setting": "abstract", "mechanism": "laplace"},
]


def case_name(case):
    return "-".join(case.values())


@pytest.mark.parametrize("form", ["fast", "grid"])
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_each_layer_has_noise_of_its_scale(federation, population, global_params, case, form):
    """Records that are not finite contribute nothing: what is left is the noise."""
    config = PrivacyConfig(
        **case, noise_form=form, epsilon=None, noise_multiplier=0.5, seed=3, delta=1e-3
    )
    network = make_network()
    data = federation(160, clients=40, fill=float("nan"))
    part = population(data, network, config)
    update = part.release(torch.arange(40), global_params(network), 0, "x")
    scale = update.policy.noise_scale
    divisor = -4.0 if config.unit == "record" else 1.0
    exact = stats.norm if config.mechanism == "gaussian" else stats.laplace
    for layer, name in enumerate(("fc1", "fc2", "fc3")):
        rows = torch.cat(
            [update.update[f"{name}.{kind}"].flatten(1) for kind in ("weight", "bias")], 1
        )
        noise = (rows.double() * divisor / scale[:, layer, None]).flatten().numpy()
        assert stats.kstest(noise, exact.cdf).pvalue > 1e-3
        for factor in (2 / 3, 3 / 2):
            assert stats.kstest(noise / factor, exact.cdf).pvalue < 1e-6
        if layer == 1:
            mine = noise.reshape(40, -1)
            apart = np.corrcoef(mine) - np.eye(40)
            assert np.abs(apart).max() < 5 / math.sqrt(mine.shape[1])


@pytest.mark.parametrize("setting", ["record+local", "client+local"])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_grid_releases_are_whole_numbers_whatever_the_data(
    federation, population, global_params, setting, mechanism
):
    """In units of the quantum; the wide form of the same data is not on that grid."""
    network = make_network(Double).double()
    params = {n: torch.zeros_like(p) for n, p in global_params(network).items()}
    offset = 0.5 if mechanism == "laplace" else 0.0
    for change in (None, lambda x, y: x.mul_(3.7)):
        for form in ("grid", "wide"):
            config = PrivacyConfig(
                setting=setting, mechanism=mechanism, thresholds="fixed", noise_form=form,
                epsilon=None, noise_multiplier=2.0**-6, seed=1,
            )  # fmt: skip
            part = population(federation(32, clients=2, change=change), network, config)
            update = part.release(torch.arange(2), params, 0, "x")
            divisor = -16 if setting == "record+local" else 1
            off = []
            for layer, name in enumerate(("fc1", "fc2", "fc3")):
                for k in range(2):
                    q = quantum_of(float(update.policy.noise_scale[k, layer]), mechanism)
                    value = update.update[f"{name}.weight"][k] * divisor / q - offset
                    off.append((value - value.round()).abs().flatten())
                    assert bool((value.abs() > 1000).any())
            worst = float(torch.cat(off).max())
            assert (worst < 1e-3) == (form == "grid")
            assert len({line.quantum for line in part.books.ledger} - {None}) == (form == "grid")
            if form == "grid":
                coarsest = quantum_of(float(update.policy.noise_scale[0].max()), mechanism)
                assert next(iter(part.books.ledger)).quantum == pytest.approx(
                    coarsest, rel=1e-12, abs=0
                )


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_grid_sums_are_those_of_the_wide_form_but_for_the_quantum(
    federation, population, global_params, mechanism
):
    """The same records and coins: noise apart, the sums differ by less than a quantum a record."""
    network = make_network()
    layout = Layout.build(dict(network.named_parameters()))
    config = PrivacyConfig(
        mechanism=mechanism, thresholds="fixed", epsilon=None, noise_multiplier=1.0, seed=1
    )
    history = ReleasedHistory(config, 2, layout.dims)
    policy = history.policy(torch.arange(2), torch.ones(2, dtype=torch.float64))
    data = federation(32, clients=2)
    part = population(data, network, config)
    (batch,) = part.clients._batches([0, 1], NoiseKey.from_seed(0), 0)
    params = global_params(network)
    options = {"p": config.p, "max_examples": 5}
    for vectorize in (True, False):
        plain = per_sample_sums(network, cross_entropy, layout, vectorize=vectorize, **options)
        whole = per_sample_sums(
            network, cross_entropy, layout, vectorize=vectorize, grid=mechanism, **options
        )
        want, seen = plain(params, True, batch, policy)
        got, counts = whole(params, True, batch, policy)
        assert torch.equal(seen, counts)
        for name, layer in zip(layout.names, layout.layer_of, strict=True):
            assert got[name].dtype == torch.int64
            for k in range(2):
                q = quantum_of(float(policy.noise_scale[k, layer]), mechanism)
                error = got[name][k].double() * q - want[name][k]
                assert float(error.abs().max()) <= 16 * q * (1 + 1e-6)
                assert float(want[name][k].abs().max()) > 1000 * q


@pytest.mark.parametrize("setting", ["record+local", "client+local"])
def test_each_client_releases_its_own_sum_in_every_form(
    federation, population, global_params, setting
):
    """With little noise the forms release the same, and clients differ.

    Not with less: the grid form stops at 4096 noise scales.
    """
    network, released = make_network(), []
    record = setting == "record+local"
    for form in ("wide", "fast", "grid"):
        config = PrivacyConfig(
            setting=setting, thresholds="fixed", noise_form=form, epsilon=None,
            noise_multiplier=1e-3 if record else 1e-4, seed=1,
        )  # fmt: skip
        part = population(federation(), network, config)
        released.append(part.release(torch.arange(3), global_params(network), 0, "x").update)
    for name, value in released[0].items():
        assert float((value[0] - value[1]).abs().max()) > 6e-3
        for other in released[1:]:
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-3 if record else 3e-3)


def gradient_hook(config, multiplier, clients=3):
    layout = Layout.build({"a.weight": torch.zeros(4, 2), "b.weight": torch.zeros(5)})
    return PrivateRecordGradient(
        lambda *_: None,  # pyright: ignore
        ReleasedHistory(config, clients, layout.dims),
        layout,
        key=NoiseKey.from_seed(0),
        clients=torch.arange(clients),
        multiplier=torch.full((clients,), multiplier, dtype=torch.float64),
    )


@pytest.mark.parametrize("multiplier", [1e-3, 0.7, 40.0])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_one_vote_moves_the_released_integer_by_at_most_its_sensitivity(mechanism, multiplier):
    config = PrivacyConfig(
        mechanism=mechanism, thresholds="quantile", noise_form="grid", epsilon=None,
        noise_multiplier=multiplier,
    )  # fmt: skip
    hook = gradient_hook(config, multiplier)
    policy = hook.history.policy(hook.clients, hook.multiplier)
    key = NoiseKey.from_seed(5)
    scale = float(policy.vote_noise_scale[0])
    q = float(grid.quantum(scale, mechanism))
    assert q == pytest.approx(quantum_of(scale, mechanism), rel=1e-15, abs=0)
    drawn = sample_noise(
        (3, 2), mechanism=mechanism, scale=1.0, key=NoiseKey.from_seed(5), step=4,
        client=torch.arange(3), layer=2, dtype=torch.int64, form="grid",
    )  # fmt: skip
    offset = 0.5 if mechanism == "laplace" else 0.0
    each = math.floor(0.5 / q)
    for halves in (-7, 0, 3, 4):
        votes = torch.full((3, 2), halves / 2, dtype=torch.float64)
        key = NoiseKey.from_seed(5)
        got = noised_votes(votes, policy, config, key, 4, hook.clients)
        want = (halves * each + drawn.double() + offset) * q
        torch.testing.assert_close(got, want.float(), rtol=1e-6, atol=1e-6 * scale)
    # A unit's votes in quanta against the noise in quanta: what the accountant is told, or less.
    sigma = T if mechanism == "gaussian" else T / math.log(2)
    shift = math.sqrt(2) * each if mechanism == "gaussian" else 2 * each
    rho = config.vote_share
    worth = math.sqrt(rho) if mechanism == "gaussian" else rho
    assert shift / sigma <= worth / multiplier
    assert shift / sigma >= worth / multiplier * (1 - 2 * (2 * q) - 1e-12)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_vote_is_a_whole_number_of_quanta_and_never_more_than_a_half(mechanism):
    scale = torch.cat([torch.logspace(-3, 6, 200), 2.0 ** torch.arange(-9, 20)]).double()
    votes = torch.tensor([-1.5, -0.5, 0.0, 0.5, 7.0]).double().expand(len(scale), -1)
    total, step = vote_quanta(votes, scale, mechanism)
    assert total.dtype == torch.int64
    each = total[:, 3]
    assert torch.equal(total, (2 * votes).to(torch.int64) * each[:, None])
    for h, q in zip(each.tolist(), step[:, 0].tolist(), strict=True):
        assert h * Fraction(q) <= Fraction(1, 2) < (h + 2) * Fraction(q)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_released_votes_carry_grid_noise_of_their_scale(
    federation, population, global_params, mechanism
):
    clients, each, z, eta = 500, 4, 0.01, 0.2
    config = PrivacyConfig(
        mechanism=mechanism, thresholds="quantile", noise_form="grid", epsilon=None,
        noise_multiplier=z, seed=3,
    )  # fmt: skip
    data = federation(clients * each, clients=clients, fill=float("nan"))
    torch.manual_seed(0)
    network = MLP(in_features=8, hidden=(5,), num_classes=3)
    part = population(data, network, config)
    before = part.books.history.l1_norm.clone()
    update = part.release(torch.arange(clients), global_params(network), 0, "x")
    votes = -each * (part.books.history.l1_norm / before).log() / eta
    scale = float(update.policy.vote_noise_scale[0])
    exact = stats.norm if mechanism == "gaussian" else stats.laplace
    sample = votes.flatten().numpy() / scale
    assert stats.kstest(sample, exact.cdf).pvalue > 1e-3
    # The deviation of a thousand Laplace variables is within 15 % of theirs in four sigmas.
    for factor in (2 / 3, 1, 3 / 2):
        assert (abs(sample.std() / factor / exact.std() - 1) < 0.15) == (factor == 1)


def test_the_grid_takes_per_sample_gradients_and_says_so(caplog):
    network = make_network()
    layout = Layout.build(dict(network.named_parameters()))
    options = {"p": 2, "vectorize": True, "max_examples": 8, "example": torch.zeros(1, 8)}
    logger = logging.getLogger("pytorch_lightning")
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = True
    try:
        run = clipped_sums(network, cross_entropy, layout, grid="gaussian", **options)
    finally:
        logger.setLevel(level)
        logger.propagate = propagate
    assert run.__qualname__.startswith(per_sample_sums.__name__)
    assert "slower than clipping in backward" in caplog.text
    run = clipped_sums(network, cross_entropy, layout, **options)
    assert run.__qualname__.startswith(clip_in_backward_sums.__name__)
