"""Figures of attacks against closed forms, sklearn and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score, roc_curve
from torch import nn

from fl_lightning.attacks import intervals, likelihood
from fl_lightning.module import cross_entropy


@pytest.mark.parametrize("digits", [1, 8], ids=["with ties", "without"])
def test_area_and_curve_are_those_of_sklearn(digits: int) -> None:
    generator = np.random.default_rng(0)
    yes = np.round(generator.normal(0.5, 1, 70), digits)
    no = np.round(generator.normal(0, 1, 90), digits)
    labels = np.r_[np.ones(70), np.zeros(90)]
    scores = np.r_[yes, no]
    assert intervals.area(yes, no).value == pytest.approx(roc_auc_score(labels, scores))
    false, true = intervals.curve(yes, no)
    want_false, want_true, _ = roc_curve(labels, scores, drop_intermediate=False)
    assert np.allclose(false, want_false)
    assert np.allclose(true, want_true)
    for rate in (0.0, 0.01, 0.1, 0.5):
        best = max(t for f, t in zip(want_false, want_true, strict=True) if f <= rate)
        assert intervals.power(yes, no, rate).value == pytest.approx(best)


def test_the_interval_of_the_area_is_delongs() -> None:
    generator = np.random.default_rng(1)
    yes, no = generator.normal(1, 1, 40), generator.normal(0, 1, 60)
    wins = (yes[:, None] > no).astype(float)
    error = math.sqrt(wins.mean(1).var(ddof=1) / 40 + wins.mean(0).var(ddof=1) / 60)
    found = intervals.area(yes, no)
    assert found.high - found.value == pytest.approx(1.959964 * error, rel=1e-5)
    assert found.value - found.low == pytest.approx(1.959964 * error, rel=1e-5)
    assert intervals.area([3, 4], [1, 2]) == intervals.Estimate(1.0, 1.0, 1.0)


@pytest.mark.slow
def test_the_interval_of_the_area_covers() -> None:
    generator, truth = np.random.default_rng(2), stats.norm.cdf(0.5 / math.sqrt(2))
    found = [
        intervals.area(generator.normal(0.5, 1, 100), generator.normal(0, 1, 100))
        for _ in range(1000)
    ]
    assert 0.93 < np.mean([f.low <= truth <= f.high for f in found]) < 0.97


@pytest.mark.parametrize(("count", "of"), [(0, 20), (3, 20), (20, 20)])
def test_the_interval_of_a_share_is_exact(count: int, of: int) -> None:
    want = stats.binomtest(count, of).proportion_ci(0.95, method="exact")
    found = intervals.share(count, of)
    assert (found.low, found.high) == pytest.approx((want.low, want.high))
    mean = intervals.mean([1.0, 2.0, 6.0])
    half = stats.sem([1, 2, 6]) * stats.t.ppf(0.975, 2)
    assert (mean.low, mean.high) == pytest.approx((3 - half, 3 + half))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: intervals.area([1.0], [1.0, 2.0]), "members: 1 scores"),
        (lambda: intervals.area([1.0, 2.0], [math.nan, 1]), "others: a score is not a number"),
        (lambda: intervals.power([1, 2], [1, 2], 1.0), "rate=1.0"),
        (lambda: intervals.share(3, 2), "count=3"),
        (lambda: intervals.mean([]), "no mean"),
        (
            lambda: likelihood.online(np.zeros(2), np.zeros((4, 3)), np.zeros((4, 3), bool)),
            r"target \(2,\)",
        ),
        (
            lambda: likelihood.offline(np.zeros(3), np.zeros((4, 3)), np.zeros((4, 3), bool)),
            "shadows=4: a record has 0",
        ),
    ],
)
def test_bad_input_is_named(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("shadows", [12, 80], ids=["one variance", "own variances"])
def test_the_likelihood_ratio_is_that_of_two_gaussians(shadows: int) -> None:
    generator = np.random.default_rng(3)
    told = generator.normal(0, [1.0, 2.0, 3.0], (shadows, 3))
    had = np.arange(shadows)[:, None] % 2 == np.arange(3) % 2
    told[had] += 2
    target = np.array([0.0, 1.0, 2.0])
    means, spreads = [], []
    for side in (had, ~had):
        columns = [told[side[:, i], i] for i in range(3)]
        means.append([c.mean() for c in columns])
        own = [c.var(ddof=1) for c in columns]
        # As many models a record: the common variance is the mean of the records' own.
        spreads.append(np.sqrt(own if shadows == 80 else np.full(3, np.mean(own))))
    want = stats.norm.logpdf(target, means[0], spreads[0])
    want -= stats.norm.logpdf(target, means[1], spreads[1])
    assert likelihood.online(target, told, had) == pytest.approx(want)
    far = likelihood.offline(target, told, had)
    assert stats.norm.cdf(far) == pytest.approx(stats.norm.cdf(target, means[1], spreads[1]))


def test_confidences_are_scaled_to_logits_even_of_a_sure_model() -> None:
    network = nn.Linear(1, 2, bias=False)
    network.weight.data = torch.tensor([[0.0], [1.0]])
    x = torch.tensor([[-3.0], [0.5], [25.0], [200.0]])
    y = torch.ones(4, dtype=torch.int64)
    network.train()
    found = likelihood.scaled_confidences(network, cross_entropy, x, y, probability=True, batch=3)
    assert found == pytest.approx([-3.0, 0.5, 25.0, 36.841], abs=1e-3)
    assert network.training
    plain = likelihood.scaled_confidences(network, cross_entropy, x, y, probability=False)
    assert plain[:2] == pytest.approx([-math.log1p(math.exp(3)), -math.log1p(math.exp(-0.5))])
