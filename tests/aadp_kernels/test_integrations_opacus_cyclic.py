"""Opacus, batches in a fixed cyclic order: what a step adds, what a run costs, what is refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from aadp_kernels import NoiseKey

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    opacus = pytest.importorskip("opacus")
    from opacus.utils.batch_memory_manager import BatchMemoryManager

    from aadp_kernels.integrations.opacus import CyclicSteps, PrivacyEngine

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning")

N, PERIOD, STEPS, Z = 22, 4, 11, 3.0
D = (1.0, -0.8, -0.1)
PLAN = CyclicSteps(period=PERIOD, steps=STEPS, coefficients=D)


def data() -> DataLoader:
    x = torch.randn(N, 5, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, torch.arange(N)), batch_size=6)


def private(cyclic: CyclicSteps | None = PLAN, **options: Any) -> tuple[Any, Any, Any, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    engine = PrivacyEngine(**({"key": NoiseKey.from_seed(0)} | options.pop("engine", {})))
    arguments = {
        "module": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.0),
        "data_loader": data(), "max_grad_norm": [0.5, 0.3], "clipping": "per_layer",
        "poisson_sampling": cyclic is None, "cyclic": cyclic,
    }  # fmt: skip
    target = options.keys() & {"target_epsilon"}
    make = engine.make_private_with_epsilon if target else engine.make_private
    options = options if target else {"noise_multiplier": Z} | options
    return engine, *make(**(arguments | options))


def train(model: Any, optimizer: Any, batches: Any, size: float = 1.0) -> list[list[torch.Tensor]]:
    """Sums of each step, and the records of its batch in their place 0."""
    seen = []
    for x, rows in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(size * x), rows % 3).backward()
        optimizer.step()
        sums = [optimizer.expected_batch_size * p.grad for p in optimizer.params]
        seen.append([rows, *sums])
    return seen


def passes(loader: Any, steps: int = STEPS) -> Any:
    """Batches of as many passes as it takes."""
    taken = 0
    while taken < steps:
        for batch in loader:
            if taken == steps:
                return
            taken += 1
            yield batch


FLAT = {"clipping": "flat", "max_grad_norm": 0.7}


@pytest.mark.parametrize("options", [{}, FLAT], ids=["per_layer", "flat"])
def test_a_step_takes_back_noise_of_the_steps_before(options: dict[str, Any]) -> None:
    def sums(cyclic: CyclicSteps | None, noise: float) -> list[list[torch.Tensor]]:
        _, model, optimizer, loader = private(cyclic, noise_multiplier=noise, **options)
        batches = data() if cyclic is None else loader
        return train(model, optimizer, passes(batches, 6))

    # Without noise the sums of the same batches; the model does not move.
    found, clean = sums(PLAN, Z), sums(PLAN, 0.0)
    alone, quiet = sums(None, Z), sums(None, 0.0)
    for t in range(6):
        for i in range(1, 5):
            expected = sum(
                d * (alone[t - j][i] - quiet[t - j][i]) for j, d in enumerate(D) if t >= j
            )
            torch.testing.assert_close(found[t][i] - clean[t][i], expected, rtol=1e-4, atol=1e-5)


def test_the_first_step_is_charged_for_the_whole_run() -> None:
    engine, model, optimizer, loader = private()
    train(model, optimizer, passes(loader, 1))
    assert engine.accountant.history == [(Z / PLAN.sensitivity, 1.0, 1)]
    train(model, optimizer, passes(loader, STEPS - 1))
    assert engine.accountant.history == [(Z / PLAN.sensitivity, 1.0, 1)]
    exact = _epsilon(Z / PLAN.sensitivity)
    assert exact < engine.get_epsilon(1e-5) < exact + 0.03
    with pytest.raises(ValueError, match="all 11 planned steps are taken"):
        train(model, optimizer, passes(loader, 1))


def _epsilon(multiplier: float) -> float:
    """Of one Gaussian, by its closed form (Balle and Wang 2018), at delta 1e-5."""
    normal = torch.distributions.Normal(0.0, torch.tensor(1.0, dtype=torch.float64))
    mu = 1 / multiplier

    def delta(epsilon: float) -> float:
        low = torch.tensor([mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu], dtype=torch.float64)
        part = normal.cdf(low)
        return float(part[0] - torch.exp(torch.tensor(epsilon)) * part[1])

    low, high = 0.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if delta(middle) > 1e-5 else (low, middle)
    return high


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_a_target_is_met_by_the_whole_run(accountant: str) -> None:
    engine, model, optimizer, loader = private(
        engine={"accountant": accountant}, target_epsilon=2.0, target_delta=1e-5, epochs=3
    )
    train(model, optimizer, passes(loader))
    assert 1.9 < engine.get_epsilon(1e-5) <= 2.0


def test_records_come_back_after_a_period_and_a_pass_goes_on_where_it_was_left() -> None:
    _, model, optimizer, loader = private()
    assert len(loader) == PERIOD
    seen = train(model, optimizer, (b for _, b in zip(range(2), loader, strict=False)))
    assert len(loader) == PERIOD - 2
    for _ in loader:  # a look at the rest takes no step
        pass
    seen += train(model, optimizer, loader)
    seen += train(model, optimizer, loader)
    rows = [sorted(batch[0].tolist()) for batch in seen]
    assert rows[:PERIOD] == rows[PERIOD:]
    assert sorted(i for part in rows[:PERIOD] for i in part) == list(range(N))
    assert optimizer.expected_batch_size == N / PERIOD


def test_every_step_follows_its_own_batch() -> None:
    _, model, optimizer, loader = private()
    with pytest.raises(ValueError, match=r"step 0 of the plan .* was none"):
        train(model, optimizer, data())
    optimizer.zero_grad()
    batches = iter(loader)
    train(model, optimizer, [next(batches)])
    next(batches)
    with pytest.raises(ValueError, match=r"step 1 of the plan .* that of step 2"):
        train(model, optimizer, [next(batches)])
    _, model, optimizer, loader = private()
    batch = next(iter(loader))
    with pytest.raises(ValueError, match=r"step 1 of the plan .* that of step 0"):
        train(model, optimizer, [batch, batch])


def test_no_step_is_skipped_and_the_noise_stays() -> None:
    _, model, optimizer, loader = private()
    optimizer.signal_skip_step(True)
    with pytest.raises(ValueError, match="cannot be skipped"):
        train(model, optimizer, loader)
    _, model, optimizer, loader = private()
    train(model, optimizer, passes(loader, 1))
    optimizer.noise_multiplier = 1.0
    with pytest.raises(ValueError, match=r"noise_multiplier=1.0 must stay 3.0"):
        train(model, optimizer, loader)
    _, model, optimizer, loader = private()
    small = BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer)
    with small as pieces, pytest.raises(ValueError, match="cannot be skipped"):
        train(model, optimizer, pieces)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        yield from data().dataset


LAPLACE = {"mechanism": "laplace"}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"poisson_sampling": True}, "poisson_sampling must be False with cyclic"),
        ({"cyclic": None, "poisson_sampling": False}, "or give the order of the batches as cyclic"),
        ({"engine": LAPLACE}, "cyclic must be None with laplace noise"),
        ({"cyclic": CyclicSteps(period=23, steps=30, coefficients=(1.0,))}, "period must be in"),
        ({"data_loader": DataLoader(Stream())}, "dataset with a length"),
    ],
)  # fmt: skip
def test_what_has_no_proof_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        private(**options)
