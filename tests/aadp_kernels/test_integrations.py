"""The plain optimizer, Poisson batches, lists of client deltas and what they say of themselves."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aadp_kernels import Bias, Layout, NoiseKey, with_clipping
from aadp_kernels.integrations import clients, optim
from aadp_kernels.integrations.release import (
    Release,
    amplified,
    compose_pure,
    equal_scales,
    layer_clips,
)
from tests.late import stats


def key(seed: int = 0) -> NoiseKey:
    return NoiseKey.from_seed(seed)


def network(p: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return with_clipping(nn.Sequential(nn.Linear(5, 200), nn.Tanh(), nn.Linear(200, 3)), p=p)


def private(model: nn.Module, **options) -> optim.PrivateOptimizer:
    arguments = {
        "clip_norm": 0.1, "noise_multiplier": 1.0, "expected_batch_size": 8.0, "key": key(),
    }  # fmt: skip
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    return optim.PrivateOptimizer(sgd, model, **(arguments | options))


def batch(n: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = 5 * torch.randn(n, 5, generator=generator)
    return x, torch.arange(n) % 3


def moved(model: nn.Module, optimizer: optim.PrivateOptimizer, n: int = 8) -> list[torch.Tensor]:
    """What one step subtracted from the parameters, times the divisor."""
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    if n:
        x, y = batch(n)
        F.cross_entropy(model(x), y, reduction="sum").backward()
    optimizer.step()
    return [8.0 * (b - p.detach()) for b, p in zip(before, model.parameters(), strict=True)]


@pytest.mark.parametrize("p", [1, 2])
def test_optimizer_clips_every_record_in_every_layer(p: int) -> None:
    model = network(p)
    total = moved(model, private(model, noise_multiplier=0.0, clip_norm=[0.1, 0.02]))
    x, y = batch()
    wanted = [torch.zeros_like(t) for t in total]
    for i in range(len(x)):
        twin = network(p)
        F.cross_entropy(twin(x[i : i + 1]), y[i : i + 1]).backward()
        grads = [q.grad for q in twin.parameters()]
        for layer, clip in ((slice(0, 2), 0.1), (slice(2, 4), 0.02)):
            norm = torch.cat([g.flatten() for g in grads[layer]]).norm(p)
            assert norm > clip
            for w, g in zip(wanted[layer], grads[layer], strict=True):
                w += g * (clip / norm)
    for w, t in zip(wanted, total, strict=True):
        torch.testing.assert_close(w, t, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("mechanism", "p"), [("gaussian", 2), ("gaussian", 1), ("laplace", 1)])
def test_optimizer_noise_has_its_scale(mechanism: str, p: int) -> None:
    model = network(p)
    optimizer = private(model, mechanism=mechanism, noise_multiplier=3.0, clip_norm=[0.1, 0.2])
    noise = torch.cat([t.flatten() for t in moved(model, optimizer, n=0)]).double().numpy()
    if mechanism == "gaussian":
        scale, cdf = 3.0 * math.hypot(0.1, 0.2), stats.norm.cdf
    else:
        scale, cdf = 3.0 * (0.1 + 0.2), stats.laplace.cdf
    assert stats.kstest(noise / scale, cdf).pvalue > 0.01
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(noise / (wrong * scale), cdf).pvalue < 1e-4


def test_optimizer_noise_differs_by_step_and_a_continued_run_goes_on() -> None:
    model = network()
    optimizer = private(model)
    first, second = moved(model, optimizer, n=0), moved(model, optimizer, n=0)
    assert not torch.equal(first[0], second[0])
    assert optimizer.steps_taken == optimizer.next_step == 2
    again = moved(network(), private(network(), first_step=1), n=0)
    assert torch.allclose(again[0], torch.zeros(()))
    model = network()
    torch.testing.assert_close(moved(model, private(model, first_step=1), n=0)[0], second[0],
                               rtol=0, atol=1e-5)  # fmt: skip


def test_micro_batches_give_one_step() -> None:
    whole = network()
    wanted = moved(whole, private(whole))
    model = network()
    optimizer = private(model, micro_batches=True)
    before = [p.detach().clone() for p in model.parameters()]
    x, y = batch()
    for rows in (slice(0, 3), slice(3, 8)):
        F.cross_entropy(model(x[rows]), y[rows], reduction="sum").backward()
    optimizer.step()
    for w, b, p in zip(wanted, before, model.parameters(), strict=True):
        torch.testing.assert_close(8.0 * (b - p.detach()), w, rtol=1e-4, atol=1e-5)


def test_sums_of_several_processes_are_added_before_the_noise() -> None:
    model, twin = network(), network()
    alone = moved(model, private(model, noise_multiplier=0.0))
    both = private(twin, noise_multiplier=0.0, reduce=lambda sums: torch._foreach_mul_(sums, 2))
    for a, b in zip(alone, moved(twin, both), strict=True):
        torch.testing.assert_close(2 * a, b)


def test_stale_gradients_are_refused() -> None:
    model = network()
    optimizer = private(model)
    optimizer.step()
    with pytest.raises(RuntimeError, match="zero_grad"):
        optimizer.step()


def test_optimizer_refuses_what_it_cannot_bound() -> None:
    plain = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="with_clipping"):
        private(plain)
    alone = with_clipping(nn.Linear(2, 2), p=2)
    with pytest.raises(ValueError, match=r"nn\.Sequential"):
        private(alone)
    other = torch.optim.SGD(plain.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="2 parameters"):
        optim.PrivateOptimizer(
            other, network(), clip_norm=1.0, noise_multiplier=1.0, expected_batch_size=1, key=key()
        )
    for name, value, match in [
        ("mechanism", "laplace", "p=1"),
        ("mechanism", "cauchy", "mechanism"),
        ("clip_norm", [1.0, 2.0, 3.0], "clip_norm"),
        ("clip_norm", math.inf, "clip_norm"),
        ("clip_norm", 0.0, "clip_norm"),
        ("expected_batch_size", 0, "expected_batch_size"),
        ("first_step", -1, "first_step"),
    ]:
        with pytest.raises(ValueError, match=match):
            private(network(), **{name: value})


def test_release_of_the_optimizer() -> None:
    release = private(network(), noise_multiplier=1.5).release(poisson_rate=0.25)
    assert release == Release("gaussian", 1.5, "record", "zero_out", poisson_rate=0.25)
    assert "Poisson rate 0.25" in str(release)
    assert "real arithmetic" in str(release)


def test_poisson_batches() -> None:
    batches = optim.PoissonBatches(5000, rate=0.2, steps=3, key=key())
    first, later = list(batches), list(batches)
    assert len(batches) == len(first) == 3
    assert batches.next_step == 6
    for a, b in itertools.combinations([*first, *later], 2):
        assert not torch.equal(a, b)
    sizes = [len(rows) for rows in first + later]
    assert all(abs(size - 1000) < 150 for size in sizes)
    assert all(int(rows.max()) < 5000 and rows.unique().numel() == len(rows) for rows in first)
    again = optim.PoissonBatches(5000, rate=0.2, steps=1, key=key(), first_step=4)
    assert torch.equal(next(iter(again)), later[1])
    for rate in (0.0, 1.5):
        with pytest.raises(ValueError, match="rate"):
            optim.PoissonBatches(10, rate=rate, steps=1, key=key())


def deltas(n: int, scale: float = 1.0) -> list[list[np.ndarray]]:
    rng = np.random.default_rng(0)
    shapes = [(30, 20), (20,), (7,)]
    return [[(scale * rng.normal(size=s)).astype(np.float32) for s in shapes] for _ in range(n)]


def mean(values, **options):
    arguments = {
        "clip_norm": [1.0, 0.5], "noise_multiplier": 0.0, "expected_clients": 10.0,
        "adjacency": "zero_out", "key": key(), "round": 0, "layers": [0, 0, 1],
    }  # fmt: skip
    return clients.mean_of_deltas(values, **(arguments | options))


@pytest.mark.parametrize(("mechanism", "p"), [("gaussian", 2), ("laplace", 1)])
def test_mean_of_deltas_is_the_clipped_sum(mechanism: str, p: int) -> None:
    values = deltas(4)
    values[3] = [0.001 * a for a in values[3]]
    result, release = mean(values, mechanism=mechanism)
    for members, clip in (((0, 1), 1.0), ((2,), 0.5)):
        total = 0.0
        for delta in values:
            joined = np.concatenate([delta[i].ravel() for i in members]).astype(np.float64)
            norm = np.abs(joined).sum() if p == 1 else np.sqrt((joined**2).sum())
            total = total + joined * min(1.0, clip / norm)
        got = np.concatenate([result[i].ravel() for i in members])
        np.testing.assert_allclose(got, total / 10, rtol=1e-5, atol=1e-8)
    assert [a.shape for a in result] == [(30, 20), (20,), (7,)]
    assert all(isinstance(a, np.ndarray) and a.dtype == np.float32 for a in result)
    assert (release.unit, release.adjacency, release.seen_by) == ("client", "zero_out", "public")


@pytest.mark.parametrize("adjacency", ["zero_out", "replace_one"])
@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
def test_noise_of_deltas_has_its_scale(mechanism: str, adjacency: str) -> None:
    big = [[np.zeros((60, 60), np.float32), np.zeros(400, np.float32)]]
    options = {
        "clip_norm": [1.0, 0.5], "noise_multiplier": 2.0, "adjacency": adjacency,
        "mechanism": mechanism, "round": 3,
    }  # fmt: skip
    together, _ = clients.mean_of_deltas(big, key=key(), expected_clients=1.0, **options)
    local, release = clients.privatize_delta(big[0], key=key(1), **options)
    scale = 2.0 * (math.hypot(1, 0.5) if mechanism == "gaussian" else 1.5)
    scale *= 2 if adjacency == "replace_one" else 1
    cdf = stats.norm.cdf if mechanism == "gaussian" else stats.laplace.cdf
    for arrays in (together, local):
        noise = np.concatenate([a.ravel() for a in arrays]).astype(np.float64)
        assert stats.kstest(noise / scale, cdf).pvalue > 0.01
        for wrong in (2 / 3, 3 / 2):
            assert stats.kstest(noise / (wrong * scale), cdf).pvalue < 1e-4
    assert release.seen_by == "server"
    assert not np.array_equal(together[0], local[0])


@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
def test_grid_form_of_deltas(mechanism: str) -> None:
    """The sum is that of the wide form but for the noise, a multiple of a quantum, and charged."""
    options = {"mechanism": mechanism, "noise_multiplier": 3e-4, "form": "grid"}
    values = [[a.astype(np.float64) for a in delta] for delta in deltas(5)]
    grid, release = mean(values, **options, expected_clients=1.0)
    wide, _ = mean(values, mechanism=mechanism, expected_clients=1.0)
    for a, b in zip(grid, wide, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=0.01)
        assert not np.array_equal(a, b)
    scale = 3e-4 * (math.hypot(1, 0.5) if mechanism == "gaussian" else 1.5)
    step = scale * (math.log(2) if mechanism == "laplace" else 1) / 2**30
    counts = grid[2] / step - (0.5 if mechanism == "laplace" else 0)
    np.testing.assert_allclose(counts, np.round(counts), rtol=0, atol=1e-3)
    assert release.arithmetic == "grid"
    assert 0 < release.epsilon_inflation < 1e-9
    assert (release.tail_delta > 0) == (mechanism == "gaussian")
    local, release = clients.privatize_delta(
        values[0], clip_norm=1.0, adjacency="replace_one", key=key(), round=0, **options
    )
    assert "grid arithmetic" in str(release)
    assert local[0].dtype == np.float64


def test_a_bad_client_contributes_zeros() -> None:
    values = deltas(3)
    good, _ = mean(values[:2])
    values[2][0][0, 0] = np.nan
    values[2][2][:] = 0
    result, _ = mean(values)
    for a, b in zip(good, result, strict=True):
        np.testing.assert_array_equal(a, b)


def test_nobody_answered() -> None:
    with pytest.raises(ValueError, match="like"):
        mean([])
    result, _ = mean([], like=deltas(1)[0], noise_multiplier=1.0)
    assert float(np.abs(result[0]).max()) > 0


def test_tensors_stay_tensors_and_inputs_are_kept() -> None:
    values = [[torch.ones(3), torch.ones(2)]]
    result, _ = clients.mean_of_deltas(
        values, clip_norm=0.1, noise_multiplier=0.0, expected_clients=1, adjacency="zero_out",
        key=key(), round=0,
    )  # fmt: skip
    assert all(isinstance(t, torch.Tensor) for t in result)
    clips = 0.1 / math.sqrt(2)
    torch.testing.assert_close(result[0].norm(), torch.tensor(clips), rtol=1e-5, atol=0)
    array = np.ones(4, np.float32)
    clients.privatize_delta(
        [array], clip_norm=0.1, noise_multiplier=1.0, adjacency="replace_one", key=key(), round=0
    )
    np.testing.assert_array_equal(array, 1)


def test_deltas_refuse_counters_and_missing_cohorts() -> None:
    with pytest.raises(ValueError, match="floating"):
        mean([[np.zeros(3, np.int64), np.zeros(2, np.float32), np.zeros(2, np.float32)]])
    with pytest.raises(ValueError, match="expected_clients"):
        mean(deltas(1), expected_clients=0)
    with pytest.raises(ValueError, match="shape"):
        mean([deltas(1)[0], [np.zeros(3, np.float32)] * 3])


def test_equal_scales_cost_one_noise_multiplier() -> None:
    clips = layer_clips([0.3, 1.0, 2.0], Layout.build([torch.zeros(1)] * 3), 2)
    sigma = equal_scales(clips, mechanism="gaussian", noise_multiplier=1.7, adjacency="zero_out")
    assert float((clips / sigma).square().sum()) == pytest.approx(1 / 1.7**2)
    b = equal_scales(clips, mechanism="laplace", noise_multiplier=1.7, adjacency="replace_one")
    assert float((2 * clips / b).sum()) == pytest.approx(1 / 1.7)
    one = layer_clips(1.0, Layout.build([torch.zeros(1)] * 4), 1)
    assert one.tolist() == [0.25] * 4


def hockey_stick(epsilons: list[float], epsilon: float) -> float:
    """Smallest delta of randomised responses released together, by enumeration."""
    delta = 0.0
    for answers in itertools.product([0, 1], repeat=len(epsilons)):
        p = q = 1.0
        for answer, e in zip(answers, epsilons, strict=True):
            yes = math.exp(e) / (1 + math.exp(e))
            p, q = p * (yes if answer else 1 - yes), q * (1 - yes if answer else yes)
        delta += max(0.0, p - math.exp(epsilon) * q)
    return delta


@pytest.mark.parametrize("pairs", [[(0.1, 12)], [(0.5, 4), (0.05, 7)], [(2.0, 2)]])
@pytest.mark.parametrize("delta", [1e-6, 1e-2])
def test_composition_bounds_the_worst_case(pairs: list[tuple[float, int]], delta: float) -> None:
    epsilons = [e for e, n in pairs for _ in range(n)]
    bound = compose_pure(pairs, delta)
    assert hockey_stick(epsilons, bound) <= delta
    assert bound <= sum(epsilons)


def test_composition_is_not_loose() -> None:
    """Many small releases: far below the sum, within a fifth of the exact curve."""
    bound = compose_pure([(0.1, 14)], 1e-2)
    assert hockey_stick([0.1] * 14, 0.8 * bound) > 1e-2
    assert compose_pure([(0.01, 10_000)], 1e-5) < 6
    assert compose_pure([(0.5, 3)], 0.0) == 1.5
    assert compose_pure([], 1e-5) == 0
    assert compose_pure([(math.inf, 1)], 0.1) == math.inf
    for epsilons, delta in [([(-1.0, 1)], 0.1), ([(1.0, 1)], 1.0), ([(1.0, 1)], -0.1)]:
        with pytest.raises(ValueError):
            compose_pure(epsilons, delta)


def test_amplification() -> None:
    assert amplified(1.0, 0.1) == pytest.approx(math.log(1 + 0.1 * (math.e - 1)))
    assert amplified(60.0, 0.1) == pytest.approx(60 + math.log(0.1))
    assert amplified(50.001, 0.1) == pytest.approx(amplified(49.999, 0.1) + 0.002)
    release = Release("laplace", 0.5, "client", "zero_out", poisson_rate=0.1)
    assert release.pure_epsilon == pytest.approx(amplified(2.0, 0.1))
    replace = Release("laplace", 0.5, "client", "replace_one", poisson_rate=0.1)
    assert replace.pure_epsilon == 2.0
    assert Release("gaussian", 0.5, "client", "zero_out").pure_epsilon == math.inf
    for name, value in (("unit", "user"), ("seen_by", "me"), ("poisson_rate", 0.0)):
        arguments = {"unit": "client", name: value}
        with pytest.raises(ValueError, match=name):
            Release("laplace", 1.0, adjacency="zero_out", **arguments)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(4, 3), (4,)),
        (nn.Linear(4, 3), (5, 4)),
        (nn.Conv1d(2, 3, 3), (2, 9)),
        (nn.Conv2d(2, 4, 3, groups=2), (2, 8, 8)),
        (nn.LayerNorm((3, 4)), (5, 3, 4)),
        (nn.RMSNorm(4), (4,)),
        (nn.GroupNorm(2, 4), (4, 6)),
        (nn.InstanceNorm2d(3, affine=True), (3, 6, 6)),
        (Bias(4), (4,)),
        (nn.Embedding(7, 4), None),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_an_empty_poisson_batch_has_sums_of_zero(layer: nn.Module, shape: Any, p: int) -> None:
    model = with_clipping(nn.Sequential(layer), p=p)
    x = torch.zeros(0, 5, dtype=torch.long) if shape is None else torch.randn(0, *shape)
    x.requires_grad_(shape is not None)
    model(x).sum().backward()
    assert x.grad is None or x.grad.shape == x.shape
    assert all(q.grad is not None and not q.grad.any() for q in model.parameters())
