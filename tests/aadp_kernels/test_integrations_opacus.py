"""An Opacus script with one line changed: same clipped sums, right noise, right accountant."""

from __future__ import annotations

import gc
import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from aadp_kernels import NoiseKey, UnsupportedLayerError
from aadp_kernels.integrations.release import amplified, compose_pure
from tests.late import stats

# Opacus and the hooks it uses warn on import and on a first backward; only ours are errors here.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    opacus = pytest.importorskip("opacus")
    from opacus.utils.batch_memory_manager import BatchMemoryManager

    from aadp_kernels.integrations.opacus import ClippedModule, LaplaceAccountant, PrivacyEngine

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning")

N, BATCH = 64, 16


def data() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(N, 1, 8, 8, generator=generator)
    return DataLoader(TensorDataset(x, torch.arange(N) % 3), batch_size=BATCH)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 20), nn.Tanh(),
        nn.Linear(20, 3),
    )  # fmt: skip


def private(engine: Any, model: nn.Module | None = None, **options: Any) -> tuple[Any, Any, Any]:
    model = network() if model is None else model
    arguments = {
        "module": model, "optimizer": torch.optim.SGD(model.parameters(), lr=1.0),
        "data_loader": data(), "noise_multiplier": 0.0, "max_grad_norm": [0.5, 0.3, 0.1],
        "clipping": "per_layer",
    }  # fmt: skip
    return engine.make_private(**(arguments | options))


def step(model: nn.Module, optimizer: Any, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    """The gradients that one step of a script uses."""
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    return [p.grad.clone() for p in optimizer.params]


def batch(n: int = 13) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = data().dataset[:n]
    return x, y


def engine(**options: Any) -> PrivacyEngine:
    return PrivacyEngine(**({"key": NoiseKey.from_seed(0)} | options))


@pytest.mark.parametrize(
    ("clipping", "norm"), [("flat", 0.7), ("per_layer", [0.5, 0.2, 0.3, 0.1, 0.4, 0.05])]
)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_same_sums_as_opacus(clipping: str, norm: Any, reduction: str) -> None:
    options = {"clipping": clipping, "max_grad_norm": norm, "loss_reduction": reduction}
    theirs = step(*private(opacus.PrivacyEngine(), **options)[:2], *batch())
    ours = step(*private(engine(), **options)[:2], *batch())
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("p", [1, 2])
def test_clip_in_backward_equals_per_sample_gradients(p: int) -> None:
    model, optimizer, _ = private(engine(p=p))
    assert isinstance(model, ClippedModule)
    fast = step(model, optimizer, *batch())
    twin = network()
    total = [torch.zeros_like(q) for q in twin.parameters()]
    for x, y in zip(*batch(), strict=True):
        grads = torch.autograd.grad(
            F.cross_entropy(twin(x[None]), y[None]), tuple(twin.parameters())
        )
        for layer, clip in enumerate([0.5, 0.3, 0.1]):
            pair = slice(2 * layer, 2 * layer + 2)
            norm = torch.cat([g.flatten() for g in grads[pair]]).norm(p)
            for t, g in zip(total[pair], grads[pair], strict=True):
                t += g * torch.clamp(clip / norm, max=1.0) / BATCH
    for a, b in zip(fast, total, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def noise_of(optimizer: Any, model: nn.Module) -> torch.Tensor:
    """The noise of a step: an empty batch, divisor undone."""
    return BATCH * torch.cat([g.flatten() for g in step(model, optimizer, *batch(0))])


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
@pytest.mark.parametrize(("mechanism", "p"), [("gaussian", 2), ("gaussian", 1), ("laplace", 1)])
def test_noise_has_its_scale(mechanism: str, p: int, clipping: str) -> None:
    norm = 0.6 if clipping == "flat" else [0.5, 0.3, 0.1]
    model, optimizer, _ = private(
        engine(mechanism=mechanism, p=p), noise_multiplier=2.0, clipping=clipping,
        max_grad_norm=norm,
    )  # fmt: skip
    size = 2 if mechanism == "gaussian" else 1
    scale = 2.0 * float(torch.tensor(norm).norm(size))
    noise = noise_of(optimizer, model).double().numpy() / scale
    cdf = stats.norm.cdf if mechanism == "gaussian" else stats.laplace.cdf
    assert stats.kstest(noise, cdf).pvalue > 0.01
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(noise / wrong, cdf).pvalue < 1e-4


def test_noise_of_two_steps_differs_and_new_keys_are_random() -> None:
    model, optimizer, _ = private(engine(), noise_multiplier=1.0)
    assert not torch.equal(noise_of(optimizer, model), noise_of(optimizer, model))
    model, optimizer, _ = private(PrivacyEngine(), noise_multiplier=1.0)
    other_model, other, _ = private(PrivacyEngine(), noise_multiplier=1.0)
    assert not torch.equal(noise_of(optimizer, model), noise_of(other, other_model))


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_physical_batches_make_one_logical_step(clipping: str) -> None:
    norm = 0.6 if clipping == "flat" else 0.9
    options = {"clipping": clipping, "max_grad_norm": norm, "noise_multiplier": 1.0}
    results = []
    for size in (N, 5):
        the_engine = engine()
        model, optimizer, loader = private(the_engine, **options)
        with BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=size, optimizer=optimizer
        ) as batches:
            for x, y in batches:
                step(model, optimizer, x, y)
        assert len(the_engine.accountant) >= 1
        assert sum(s for _, _, s in the_engine.accountant.history) == len(loader)
        results.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_whole_script_with_laplace() -> None:
    the_engine = PrivacyEngine(mechanism="laplace")
    model, optimizer, loader = private(the_engine, noise_multiplier=50.0, max_grad_norm=1.0)
    for _ in range(2):
        for x, y in loader:
            step(model, optimizer, x, y)
    wanted = compose_pure([(amplified(1 / 50, 0.25), 8)], 1e-5)
    assert the_engine.get_epsilon(1e-5) == pytest.approx(wanted)
    assert the_engine.get_epsilon(0) == pytest.approx(8 * amplified(1 / 50, 0.25))
    assert model.state_dict().keys() == {f"_module.{k}" for k in network().state_dict()}


def test_a_target_epsilon_is_met() -> None:
    for options in ({"mechanism": "laplace"}, {"accountant": "rdp"}):
        the_engine = PrivacyEngine(**options)
        model = network()
        made = the_engine.make_private_with_epsilon(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=data(), target_epsilon=2.0, target_delta=1e-5, epochs=2,
            max_grad_norm=1.0, clipping="per_layer",
        )  # fmt: skip
        for _ in range(2):
            for x, y in made[2]:
                step(made[0], made[1], x, y)
        assert 1.9 < the_engine.get_epsilon(1e-5) <= 2.0


def test_checkpoints_go_on(tmp_path: Any) -> None:
    first = PrivacyEngine(mechanism="laplace")
    model, optimizer, _ = private(first, noise_multiplier=9.0)
    step(model, optimizer, *batch())
    first.save_checkpoint(path=tmp_path / "c.pt", module=model, optimizer=optimizer)
    assert b"secret" not in (tmp_path / "c.pt").read_bytes()
    second = PrivacyEngine(mechanism="laplace")
    other, other_optimizer, _ = private(second, noise_multiplier=9.0)
    second.load_checkpoint(path=tmp_path / "c.pt", module=other, optimizer=other_optimizer)
    assert second.get_epsilon(0) == first.get_epsilon(0) > 0
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_accountant_merges_equal_steps() -> None:
    accountant = LaplaceAccountant()
    assert accountant.get_epsilon(1e-5) == 0
    for z in (2.0, 2.0, 3.0, 2.0):
        accountant.step(noise_multiplier=z, sample_rate=0.5)
    assert accountant.history == [(2.0, 0.5, 2), (3.0, 0.5, 1), (2.0, 0.5, 1)]
    assert len(accountant) == 4
    accountant.step(noise_multiplier=0.0, sample_rate=0.5)
    assert accountant.get_epsilon(0.1) == math.inf


def test_poisson_coins_are_secret_and_right() -> None:
    _, _, loader = private(engine())
    sizes = [len(x) for _ in range(50) for x, _ in loader]
    assert abs(sum(sizes) / len(sizes) - BATCH) < 1.5
    torch.manual_seed(0)
    again = [len(x) for x, _ in private(engine())[2]]
    torch.manual_seed(1)
    assert again == sizes[: len(again)] == [len(x) for x, _ in private(engine())[2]]


def test_schedulers_move_clips_and_noise() -> None:
    model, optimizer, _ = private(engine())
    before = step(model, optimizer, *batch())
    optimizer.max_grad_norm *= 0.01
    torch.testing.assert_close(optimizer.clip_norms, torch.tensor([0.005, 0.003, 0.001]).double())
    model.load_state_dict({f"_module.{k}": v for k, v in network().state_dict().items()})
    after = step(model, optimizer, *batch())
    for a, b in zip(before, after, strict=True):
        assert float(b.norm()) < 0.05 * float(a.norm())
    optimizer.noise_multiplier = 3.0
    assert float(optimizer.noise_scales[0]) == pytest.approx(3 * optimizer.max_grad_norm)


class _Tokens(nn.Module):
    """Folds a sequence into the batch: a record would be clipped once a token."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.flatten(0, 2)).view(len(x), -1, 3).sum(1)


class _Twice(_Tokens):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.sum((1, 2))) + self.fc(x.mean((1, 2)))


@pytest.mark.parametrize("kind", [_Tokens, _Twice])
def test_models_whose_records_are_not_the_batch_are_refused(kind: type[nn.Module]) -> None:
    model, _, _ = private(engine(), kind(), max_grad_norm=1.0)
    with pytest.raises(UnsupportedLayerError, match="fc"):
        model(batch()[0])


def test_two_passes_between_steps_are_refused() -> None:
    model, optimizer, _ = private(engine())
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(ValueError, match="accumulation"):
        F.cross_entropy(model(x), y).backward()
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward(retain_graph=True)
    with pytest.raises(UnsupportedLayerError, match="second gradient from one forward"):
        loss.backward()
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    with pytest.raises(ValueError, match="zero_grad"):
        optimizer.step()


def test_parameters_used_outside_of_their_layer_are_refused() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 3)

        def forward(self, *, image: torch.Tensor) -> torch.Tensor:
            return self.fc(image.flatten(1)) + image.flatten(1) @ self.fc.weight.T

    plain = Tied()
    model, optimizer, _ = private(engine(), plain, max_grad_norm=1.0)
    assert isinstance(model, ClippedModule)
    x, y = batch()
    for foreign in (lambda: model(image=x), lambda: plain(image=x)):
        with pytest.raises(UnsupportedLayerError, match=r"'fc\.(weight|bias)' is used outside"):
            F.cross_entropy(foreign(), y).backward()
        with pytest.raises(RuntimeError, match="zero_grad"):
            optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_frozen_layers_stay_and_unfrozen_ones_are_refused(clipping: str) -> None:
    plain = network()
    plain[0].requires_grad_(False)
    model, optimizer, _ = private(
        engine(), plain, max_grad_norm=0.5, clipping=clipping, noise_multiplier=1.0
    )
    before = plain[0].weight.clone()
    step(model, optimizer, *batch())
    assert torch.equal(plain[0].weight, before)
    optimizer.zero_grad()
    plain[0].weight.grad = torch.ones_like(before)
    with pytest.raises(ValueError, match="frozen parameter"):
        optimizer.step()
    plain[0].weight.grad = None
    plain[0].requires_grad_(True)
    with pytest.raises(ValueError, match=r"0\.weight"):
        optimizer.step()


def test_gradients_changed_between_backward_and_step_are_refused() -> None:
    model, optimizer, _ = private(engine())
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.raises(RuntimeError, match="clip_grad_norm_"):
        optimizer.step()


def test_the_module_is_free_when_the_private_model_is_gone() -> None:
    plain = network()
    made = private(engine(), plain)
    del made
    gc.collect()
    x, y = batch()
    F.cross_entropy(plain(x), y).backward()


class _Scaled(nn.Module):
    """A parameter that belongs to no layer which can clip in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) * self.weight


def test_other_models_fall_back_to_per_sample_gradients() -> None:
    model = nn.Sequential(_Scaled(), nn.Linear(64, 3))
    made, optimizer, _ = private(engine(), model, max_grad_norm=[0.1, 0.2])
    assert not isinstance(made, ClippedModule)
    x, y = batch(1)
    first, *second = step(made, optimizer, x, y)
    assert float(first.norm()) == pytest.approx(0.1 / BATCH, rel=1e-5)
    assert float(torch.cat([g.flatten() for g in second]).norm()) <= 0.2 / BATCH * (1 + 1e-6)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"clipping": "adaptive"}, "clipping"),
        ({"grad_sample_mode": "ghost"}, "grad_sample_mode"),
        ({"poisson_sampling": False}, "poisson_sampling"),
        ({"noise_generator": torch.Generator()}, "noise_generator"),
        ({"max_grad_norm": [1.0, 2.0]}, "clip_norm"),
        ({"max_grad_norm": -1.0}, "clip_norm"),
        ({"noise_multiplier": math.nan}, "noise_multiplier"),
        ({"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)}, "parameters"),
    ],
)
def test_what_cannot_be_accounted_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        private(engine(), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"mechanism": "laplace", "p": 2},
        {"mechanism": "laplace", "accountant": "rdp"},
        {"accountant": "laplace"},
        {"mechanism": "cauchy"},
        {"p": 3},
    ],
)
def test_engines_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        PrivacyEngine(**options)
