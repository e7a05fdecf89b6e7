"""Correlated noise in a training loop: what a step adds, what a run costs, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from aadp_kernels import Correlation, NoiseKey, sample_noise, with_clipping
from aadp_kernels.factorization import encoder, separated_sensitivity
from aadp_kernels.integrations.cyclic import CyclicBatches, CyclicSteps
from aadp_kernels.integrations.optim import PrivateOptimizer

D = (1.0, -0.9, -0.05)
PLAN = CyclicSteps(period=4, steps=9, coefficients=D)
SIZE = 8.0


def make(cyclic=PLAN, *, seed=1, **options):
    torch.manual_seed(0)
    model = with_clipping(nn.Sequential(nn.Linear(5, 3, dtype=torch.float64)), p=2)
    given = {"clip_norm": 1.0, "noise_multiplier": 2.0, "expected_batch_size": SIZE}
    given |= {"key": NoiseKey.from_seed(seed), "cyclic": cyclic, "impl": "torch"} | options
    optimizer = PrivateOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, **given)
    return model, optimizer


def noise_of_steps(optimizer, steps):
    """What steps without records release: the noise, [steps, elements]."""
    rows = []
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.step()
        grads = [p.grad.flatten() for p in optimizer.parameters.values()]
        rows.append(SIZE * torch.cat(grads))
    return torch.stack(rows)


def drawn(step, began=0, seed=1):
    """By the definition; the layer has 18 elements."""
    total = torch.zeros(18, dtype=torch.float64)
    for back, d in enumerate(D):
        if step - back >= began:
            total += d * sample_noise(
                (18,), mechanism="gaussian", scale=1.0, key=NoiseKey.from_seed(seed),
                step=step - back, dtype=torch.float64, impl="torch",
            )  # fmt: skip
    return 2.0 * total


@pytest.mark.parametrize("began", [0, 10])
def test_a_step_adds_the_noise_of_its_run_alone(began):
    _, optimizer = make(first_step=began)
    found = noise_of_steps(optimizer, 5)
    for i in range(5):
        assert torch.allclose(found[i], drawn(began + i, began), rtol=1e-12)


def test_a_run_is_one_mechanism():
    _, optimizer = make()
    release = optimizer.release()
    assert release.planned_steps == 9
    assert release.noise_multiplier == 2.0 / separated_sensitivity(D, 9, 4)
    assert "once for all 9 steps" in str(release)
    assert make(cyclic=None)[1].release().planned_steps is None
    with pytest.raises(ValueError, match="poisson_rate must be 1 with cyclic steps"):
        optimizer.release(poisson_rate=0.5)


def test_the_attack_that_knows_all_finds_what_is_charged_and_no_more():
    """The best test of whether a record was there, in many runs at once.

    It would find a record that is charged up to its last batch only, a wrong column, a missing
    band: each of them changes the distance by more than the test's error.
    """
    runs, z, key = 20_000, 2.0, NoiseKey.from_seed(4)
    rows = torch.stack(
        [
            sample_noise(
                (runs, 1), mechanism="gaussian", scale=z, key=key, step=t,
                client=torch.arange(runs), correlation=PLAN.correlation(key, t, 0),
                dtype=torch.float64,
            )[:, 0]
            for t in range(PLAN.steps)
        ]
    )  # fmt: skip
    column = torch.from_numpy(encoder(D, PLAN.steps))
    inverse = sum(
        torch.diag_embed(column[j].expand(PLAN.steps - j), offset=-j) for j in range(PLAN.steps)
    )
    there = torch.zeros(PLAN.steps, dtype=torch.float64)
    there[[0, 4, 8]] = 1.0
    direction = inverse @ there
    statistic = [
        direction @ (inverse @ y) / direction.norm() for y in (rows, rows + there[:, None])
    ]
    spread = statistic[0].std()
    distance = ((statistic[1].mean() - statistic[0].mean()) / spread).item()
    charged = 1 / PLAN.multiplier(z)
    error = 3 / math.sqrt(runs)
    assert abs(distance - charged) < error * (1 + charged)
    for wrong in (
        separated_sensitivity(D, 5, 4),  # up to the last batch but one
        (inverse @ there)[:5].norm().item(),
        separated_sensitivity(D[:2], 9, 4),  # a missing band
        separated_sensitivity((1.0,), 9, 4),  # independent noise
    ):
        assert abs(distance - wrong / z) > 2 * error


def test_no_step_follows_the_planned_ones():
    model, optimizer = make()
    noise_of_steps(optimizer, 9)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="all 9 planned steps are taken"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))
    assert optimizer.steps_taken == 9


def test_a_run_goes_on_where_it_was_saved():
    whole = noise_of_steps(make(first_step=3)[1], 6)
    _, first = make(first_step=3)
    noise_of_steps(first, 4)
    _, later = make(first_step=0)
    later.load_state_dict(first.state_dict())
    assert torch.equal(noise_of_steps(later, 2), whole[4:])
    noise_of_steps(later, 3)
    with pytest.raises(RuntimeError, match="planned steps"):
        noise_of_steps(later, 1)


def test_a_state_of_other_noise_is_refused():
    _, optimizer = make()
    other = CyclicSteps(period=4, steps=10, coefficients=D)
    for cyclic in (None, other):
        with pytest.raises(ValueError, match="the state has cyclic"):
            make(cyclic)[1].load_state_dict(optimizer.state_dict())
    old = make(cyclic=None)[1].state_dict()
    for name in ("cyclic", "began"):
        del old["privacy"][name]
    make(cyclic=None)[1].load_state_dict(old)
    with pytest.raises(ValueError, match="the state has cyclic None"):
        optimizer.load_state_dict(old)


def test_what_has_no_proof_is_refused():
    model = with_clipping(nn.Sequential(nn.Linear(5, 3)), p=1)
    with pytest.raises(ValueError, match="cyclic must be None with mechanism='laplace'"):
        PrivateOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), model, clip_norm=1.0, noise_multiplier=1.0,
            expected_batch_size=8.0, key=NoiseKey.random(), mechanism="laplace", cyclic=PLAN,
        )  # fmt: skip
    with pytest.raises(ValueError, match="positive and falling"):
        CyclicSteps(period=4, steps=9, coefficients=(1.0, 0.5))
    for name in ("period", "steps"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            CyclicSteps(**{"period": 4, "steps": 9, "coefficients": D, name: 0})
    with pytest.raises(ValueError, match="learning_rates must be 9 numbers, got 1"):
        CyclicSteps.best(period=4, steps=9, learning_rates=[1.0])


def test_best_coefficients_leave_less_noise():
    plan = CyclicSteps.best(period=20, steps=200, bands=2, momentum=0.9)
    assert plan.coefficients[0] == 1
    assert -0.99 < plan.coefficients[1] < -0.9
    assert CyclicSteps.best(period=1, steps=30, bands=4).coefficients == (1.0,)


def test_batches_come_back_in_a_fixed_order():
    batches = CyclicBatches(10, period=4, steps=9)
    rows = list(batches)
    assert torch.cat(rows[:4]).sort().values.tolist() == list(range(10))
    assert [len(r) for r in rows[:4]] == [3, 3, 2, 2]
    assert all(torch.equal(a, b) for a, b in zip(rows, rows[4:], strict=False))
    later = CyclicBatches(10, period=4, steps=3, first_step=6)
    assert all(map(torch.equal, later, rows[6:]))
    assert len(batches) == 9
    for period in (0, 11):
        with pytest.raises(ValueError, match=f"period must be in .1, 10., got {period}"):
            CyclicBatches(10, period=period, steps=3)


def test_it_trains():
    torch.manual_seed(0)
    x = torch.randn(400, 5, dtype=torch.float64)
    y = (x[:, :3] + 0.1 * torch.randn(400, 3)).argmax(1)
    plan = CyclicSteps.best(period=10, steps=200, bands=2, momentum=0.5)
    model = with_clipping(nn.Sequential(nn.Linear(5, 3, dtype=torch.float64)), p=2)
    optimizer = PrivateOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5), model, clip_norm=1.0,
        noise_multiplier=4.0, expected_batch_size=40.0, key=NoiseKey.from_seed(1), cyclic=plan,
    )  # fmt: skip
    for rows in CyclicBatches(len(x), period=10, steps=200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows], reduction="sum").backward()
        optimizer.step()
    assert (model(x).argmax(1) == y).double().mean() > 0.85


def test_the_correlation_of_a_step_is_that_of_its_run():
    key = NoiseKey.from_seed(1)
    assert PLAN.correlation(key, 7, 7) == Correlation(D, ())
    assert PLAN.correlation(key, 8, 7) == Correlation(D, ((key, 7),))
    assert PLAN.correlation(key, 20, 7) == Correlation(D, ((key, 19), (key, 18)))
