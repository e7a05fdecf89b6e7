"""Half precision, checkpoints, micro-batches of a private optimizer: exact or refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aadp_kernels import NoiseKey, with_clipping
from aadp_kernels.integrations.optim import PrivateOptimizer


class Adapted(nn.Module):
    """A frozen layer in bfloat16 with a pair of trained layers beside it, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(8, 8).bfloat16().requires_grad_(False)
        self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)
        self.again = False

    def block(self, x: Tensor) -> Tensor:
        wide = self.norm.weight.dtype
        own = self.up(self.down(x)).to(wide)
        return self.norm(self.frozen(x.to(self.frozen.weight.dtype)).float() + own).tanh()

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.block, x, use_reentrant=False) if self.again else self.block(x)
        return self.head(x.mean(1))


def private(model: nn.Module, **options: object) -> PrivateOptimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return PrivateOptimizer(
        torch.optim.SGD(trained, lr=0.0), model, clip_norm=0.4, noise_multiplier=0.0,
        expected_batch_size=1.0, key=NoiseKey.from_seed(0), **options,
    )  # fmt: skip


def expected(model: nn.Module, x: Tensor, layers: int) -> dict[str, Tensor]:
    """Sums of each record's gradient, clipped layer by layer, in float64."""
    judge, clip = copy.deepcopy(model).double(), 0.4 / layers**0.5
    total: dict[str, Tensor] = {}
    for row in x.double():
        judge.zero_grad()
        judge(row[None]).square().sum().backward()
        own = {n: p.grad for n, p in judge.named_parameters() if p.grad is not None}
        for layer in dict.fromkeys(n.rpartition(".")[0] for n in own):
            names = [n for n in own if n.rpartition(".")[0] == layer]
            norm = torch.cat([own[n].flatten() for n in names]).norm()
            for n in names:
                found = own[n] * min(1.0, clip / float(norm))
                total[n] = total[n] + found if n in total else found
    return total


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("micro", [False, True])
def test_a_frozen_body_in_bfloat16(again: bool, autocast: bool, micro: bool) -> None:
    torch.manual_seed(0)
    plain = Adapted()
    model = with_clipping(plain, p=2)
    model.again = again
    optimizer = private(model, micro_batches=micro)
    x = 3 * torch.randn(6, 5, 8)
    for part in x.split(2) if micro else (x,):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(part).float().square().sum()
        loss.backward()
    optimizer.step()
    want = expected(plain, x, 4)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert parameter.grad.dtype == torch.float32
            # bfloat16 in the forward: a record's gradient itself is known to 2^-8.
            bound = 0.05 * 6 * 0.2 if autocast else 0.01 * 6 * 0.2
            assert float((parameter.grad.double() - want[name]).norm()) < bound, name


@pytest.mark.parametrize("autocast", [False, True])
def test_one_record_stays_within_its_clip_norm(autocast: bool) -> None:
    torch.manual_seed(0)
    model = with_clipping(Adapted(), p=2)
    optimizer = private(model)
    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(30 * torch.randn(1, 5, 8)).float().square().sum()
        loss.backward()
        optimizer.step()
        for layer in (model.down, model.up, model.norm, model.head):
            grads = [p.grad.double().flatten() for p in layer.parameters() if p.grad is not None]
            assert float(torch.cat(grads).norm()) <= 0.2 * (1 + 1e-6)


def test_sums_in_half_precision_are_refused_by_name() -> None:
    """Their rounding would grow with the batch: no clip norm bounds it."""
    model = with_clipping(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2).bfloat16()), p=2)
    with pytest.raises(ValueError, match=r"parameter '1\.weight' is bfloat16.*autocast"):
        private(model)
