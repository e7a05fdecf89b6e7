"""What the adapters do with a network: exact sums, or an error."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from aadp_kernels import Layout, NoiseKey, with_clipping
from aadp_kernels.integrations.optim import PrivateOptimizer
from fl_lightning.module import cross_entropy
from fl_lightning.networks.check import finish_network
from tests.networks.blocks import Block
from tests.networks.measure import SEEDS, Seen, quiet, rule_of, some_records, spread
from tests.networks.oracle import Gradients, Rule, clipped_sum, double, record_gradients
from tests.networks.product import Setting

# (network, rule, x, y) → a way and a function from records to clipped sums.
Adapter = Callable[[nn.Module, Rule, Tensor, Tensor], tuple[str, Callable[..., Gradients]]]


def trained(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that an optimizer is given."""
    return {n: p for n, p in network.named_parameters() if p.requires_grad}


def private_optimizer(
    loss: Callable[..., Tensor],
) -> Adapter:
    """`PrivateOptimizer` on the result of `with_clipping`, without noise."""

    def adapt(network: nn.Module, rule: Rule, x: Tensor, y: Tensor) -> Any:
        model = with_clipping(network, p=rule.p)
        parameters = trained(model)
        names = Layout.build(parameters).layer_names
        optimizer = PrivateOptimizer(
            torch.optim.SGD(parameters.values(), lr=0.0), model,
            clip_norm=[rule.clips[name] for name in names], noise_multiplier=0.0,
            expected_batch_size=1.0, key=NoiseKey.from_seed(0),
        )  # fmt: skip

        def sums(x: Tensor, y: Tensor) -> Gradients:
            optimizer.zero_grad()
            loss(model(x), y).sum().backward()
            optimizer.step()
            return _taken(parameters)

        return "backward", sums

    return adapt


def opacus_engine(loss: Callable[..., Tensor], clipping: str) -> Adapter:
    """The engine for Opacus with per-layer or flat clipping, without noise."""

    def adapt(network: nn.Module, rule: Rule, x: Tensor, y: Tensor) -> Any:
        from aadp_kernels.integrations.opacus import ClippedModule, PrivacyEngine

        parameters = trained(network)
        norms: Any = rule.clips.get("all")
        if clipping == "per_layer":
            norms = [rule.clips[name] for name in Layout.build(parameters).layer_names]
        engine = PrivacyEngine(accountant="rdp", key=NoiseKey.from_seed(0))
        model, optimizer, _ = engine.make_private(
            module=network.train(), optimizer=torch.optim.SGD(parameters.values(), lr=0.0),
            data_loader=DataLoader(TensorDataset(x, y), batch_size=4), noise_multiplier=0.0,
            max_grad_norm=norms, clipping=clipping, loss_reduction="sum",
        )  # fmt: skip

        def sums(x: Tensor, y: Tensor) -> Gradients:
            optimizer.zero_grad()
            loss(model(x), y).sum().backward()
            optimizer.step()
            return _taken(parameters)

        return "backward" if isinstance(model, ClippedModule) else "hooks", sums

    return adapt


def _taken(parameters: dict[str, nn.Parameter]) -> Gradients:
    """The gradients that a step has left, float64."""
    return {
        n: torch.zeros_like(p).double() if p.grad is None else p.grad.detach().double().clone()
        for n, p in parameters.items()
    }


def adapted(block: Block, adapter: Callable[..., Adapter], *options: Any) -> Seen:
    """What an adapter does with a block: the way with its figures, or why it raises."""
    x, y = some_records(block, 8)
    loss = cross_entropy if block.loss is None else block.loss()
    network, judge = quiet(block.network()), quiet(block.network())
    flat = "flat" if "flat" in options else "layer"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            x = x.double() if next(network.parameters()).dtype == torch.float64 else x
            finish_network(network, x[0])
            finish_network(judge, x[0])
            judge.load_state_dict(network.state_dict())
            known = record_gradients(double(judge), loss, x, y)
            rule = rule_of(Setting(flat), list(known[0]), known)
            way, sums = adapter(loss, *options)(network, rule, x, y)
            return _compared(way, sums, rule, known, x, y)
        except Exception as error:
            return _raised(error)


def _raised(error: Exception) -> Seen:
    """An error of an adapter, one of Opacus itself, or one that nobody foresaw."""
    reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    if isinstance(error, ValueError | NotImplementedError):
        return Seen("raises", reason=reason)
    frames = [frame.f_globals["__name__"] for frame, _ in traceback.walk_tb(error.__traceback__)]
    if any(name.startswith("opacus.") for name in frames):
        return Seen("raises (Opacus)", reason=f"in Opacus, {reason}")
    return Seen("fails", reason=reason)


def _compared(
    way: str,
    sums: Callable[..., Gradients],
    rule: Rule,
    known: list[Gradients],
    x: Tensor,
    y: Tensor,
) -> Seen:
    def seeded(rows: list[int], seed: int = 0) -> Gradients:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return {n: v.clone() for n, v in sums(x[rows], y[rows]).items()}

    all_rows = [*range(5)]
    whole = seeded(all_rows)
    far = spread(rule, whole, clipped_sum(known[:5], rule, whole)) / 5
    others = (seeded(all_rows, seed) for seed in SEEDS)
    if any(not torch.equal(whole[n], other[n]) for other in others for n in whole):
        far = float("nan")  # random numbers of the forward
    move = 0.0
    for i in (2, 3):
        move = max(move, *rule.moves(seeded([i])).values())
        if far == far:
            move = max(move, spread(rule, whole, seeded([j for j in all_rows if j != i])))
    return Seen(way, move, far)
