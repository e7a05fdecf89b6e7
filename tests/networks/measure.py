"""How far one record moves the sums, and how far they are from the definition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fl_lightning import FederatedModule
from fl_lightning.local.batches import Batch
from fl_lightning.networks.check import finish_network
from fl_lightning.networks.inputs import input_dtype
from tests.networks.blocks import Block
from tests.networks.oracle import (
    Gradients,
    Rule,
    batch_gradients,
    clipped_sum,
    double,
    record_gradients,
)
from tests.networks.product import (
    Product,
    Refused,
    Setting,
    Ways,
    accepted,
    batch_of,
    dataset,
    layout_of,
    parameters,
    plain_sums,
)

# A coin of a whole batch falls the same way for some of them.
SEEDS = (1, 2, 3, 4)


@dataclass(frozen=True)
class Seen:
    """What was measured of one network under one setting.

    Args:
        way: what made the sums: backward, vmap or loop; "refused".
        move: largest norm of what one record adds, over what it may add.
        difference: largest ‖sums - definition‖ of a layer, over the clip norm and records.
        reason: the project's words, if it refuses.
    """

    way: str
    move: float = 0.0
    difference: float = 0.0
    reason: str = ""


def quiet(network: nn.Module) -> nn.Module:
    """The network with dropout switched off, in place: two runs draw other numbers."""
    for module in network.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            module.dropout = 0.0
    return network


def rule_of(setting: Setting, layout_names: Sequence[str], gradients: list[Gradients]) -> Rule:
    """Clip norms between the records' norms, so that some are clipped and some are not."""
    rule = Rule(setting.clipping, setting.p, 1 if setting.mechanism == "laplace" else 2, {})
    layers = list(dict.fromkeys(rule.layer(n) for n in layout_names))
    norms = [rule.norms(g) for g in gradients]
    middles, clips, shares = [], {}, {}
    for layer in layers:
        sizes = sorted(n[layer] for n in norms if n[layer] == n[layer] and n[layer] > 0)
        middles.append(sizes[len(sizes) // 2] if sizes else 0.0)
    for i, layer in enumerate(layers):
        # A layer with hardly any gradient has one of float32 roundings.
        clips[layer] = (0.5 + 0.3 * (i % 3)) * max(middles[i], 1e-2 * max(middles), 1e-6)
        shares[layer] = (1.0 + i % 4) / sum(1.0 + j % 4 for j in range(len(layers)))
    return replace(rule, clips=clips, shares=shares)


def spread(rule: Rule, one: Gradients, other: Gradients) -> float:
    """Norm of the difference of two sums, over what one record may contribute."""
    return max(rule.moves({n: one[n] - other[n] for n in one}).values())


def without(x: Tensor, y: Tensor, i: int) -> tuple[Tensor, Tensor]:
    """The records without the i-th."""
    keep = [j for j in range(len(x)) if j != i]
    return x[keep], y[keep]


def largest_move(
    product: Product,
    params: Sequence[Gradients],
    x: Tensor,
    y: Tensor,
    extreme: Tensor,
    *,
    random: bool,
) -> float:
    """The most that a record adds to the sums of a client.

    Each record in its place, and each extreme one there: against the batch with padding there,
    and against the batch without it, unless the forward draws random numbers, which would then
    meet other records.

    Args:
        product: what makes the sums.
        params: the client's parameters.
        x: records [B, ...].
        y: labels [B].
        extreme: other records, [E, ...].
        random: whether the forward draws random numbers.
    """
    largest = 0.0
    for i in range(len(x)):
        fewer_x, fewer_y = without(x, y, i)
        mask = torch.ones(1, len(x))
        mask[0, i] = 0
        smaller = [sums_of(product, params, batch_of(x[None], y[None], mask))]
        if len(fewer_x) and not random:
            smaller.append(sums_of(product, params, batch_of(fewer_x[None], fewer_y[None])))
        for record in (x[i], *extreme):
            there = x.clone()
            there[i] = record
            whole = sums_of(product, params, batch_of(there[None], y[None]))
            largest = max([largest, *(spread(product.rule, whole, s) for s in smaller)])
    return largest


def sums_of(
    product: Product, params: Sequence[Gradients], batch: Batch, seed: int = 0
) -> Gradients:
    """Sums of the first client; random numbers of the forward are those of the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return product.sums(params, batch)[0]


def difference(
    product: Product,
    params: Sequence[Gradients],
    batch: Batch,
    gradients: Sequence[list[Gradients]],
) -> float:
    """‖sums - definition‖ over clip norms and records, the largest of all clients and layers.

    Args:
        product: what makes the sums.
        params: each client's parameters, or one's.
        batch: their records.
        gradients: float64 gradients of each client's records.
    """
    largest = 0.0
    like = {n: v.to(torch.promote_types(v.dtype, torch.float64)) for n, v in params[0].items()}
    for sums, records in zip(product.sums(params, batch), gradients, strict=True):
        expected = clipped_sum(records, product.rule, like)
        largest = max(largest, spread(product.rule, sums, expected) / max(1, len(records)))
    return largest


def some_records(block: Block, n: int) -> tuple[Tensor, Tensor]:
    """Records with labels; the fourth is 30 times as long and the fifth is zero."""
    generator = torch.Generator().manual_seed(5)
    x = block.records(n, generator)
    if x.is_floating_point():
        x[3] *= 30
        x[4] = 0
    return x, torch.randint(0, block.classes, (n,), generator=generator)


@dataclass(frozen=True)
class Subject:
    """A block that a run accepts, and what is known of its records.

    Args:
        module: with the network, dropout switched off.
        vmaps: whether clients can be trained together.
        judge: the same network in float64.
        x: records [12, ...], in the network's dtype.
        y: labels [12].
        gradients: of each record, float64, by the definition.
        random: whether the forward draws random numbers.
    """

    module: FederatedModule
    vmaps: bool
    judge: nn.Module
    x: Tensor
    y: Tensor
    gradients: list[Gradients]
    random: bool


def subject(block: Block, setting: Setting) -> Subject | Seen:
    """What a run accepts of a block under a setting, or why it refuses."""
    x, y = some_records(block, 12)
    loss = None if block.loss is None else block.loss()
    try:
        data = dataset(x, y, block.classes)
        # What vmap cannot run goes to the loop under "vmap" too; "auto" tries both.
        module, vmaps = accepted(quiet(block.network()), loss, data, setting, "vmap")
    except Refused as refused:
        return Seen("refused", reason=str(refused))
    x = x.to(input_dtype(module.network, x))
    judge = quiet(block.network())
    finish_network(judge, x[0])
    judge.load_state_dict(module.network.state_dict())  # lazy layers draw theirs late
    gradients = record_gradients(double(judge), module.loss, x, y)
    return Subject(module, vmaps, judge, x, y, gradients, _draws(module.network, x[:5]))


def _draws(network: nn.Module, x: Tensor) -> bool:
    """Whether outputs of the same records differ with the state of the generator."""

    def outputs(seed: int) -> list[Tensor]:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            return [v for v in tree_leaves(network(x.clone())) if isinstance(v, Tensor)]

    first = outputs(0)
    return any(
        not torch.equal(one, other)
        for seed in SEEDS
        for one, other in zip(first, outputs(seed), strict=True)
    )


def measured(subject: Subject, setting: Setting) -> Seen:
    """The way of an accepted block under one setting, and what is measured on the way."""
    x, y, gradients = subject.x, subject.y, subject.gradients
    layout = layout_of(subject.module.network, setting)
    params = [parameters(subject.module.network, layout)]
    rule = rule_of(setting, layout.names, gradients)
    product = Product(subject.module, setting, rule, layout, Ways(vectorize=subject.vmaps))
    batch, far = batch_of(x[None, :5], y[None, :5]), math.nan
    if not subject.random:
        far = difference(product, params, batch, [gradients[:5]])
    move = largest_move(product, params, x[1:4], y[1:4], x[4:5], random=subject.random)
    return Seen(str(product.ways), move, far)


def trained_by_clients(subject: Subject) -> Seen:
    """The way in which clients train a block that is clipped whole, against autograd of a batch."""
    x, y, way = subject.x[:5], subject.y[:5], "vmap" if subject.vmaps else "loop"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = plain_sums(subject.module, batch_of(x[None], y[None]), subject.vmaps)
    if subject.random:
        return Seen(way, 0.0, math.nan)
    wanted = batch_gradients(subject.judge, subject.module.loss, x, y)
    size = max(float(v.abs().max()) for v in wanted.values())
    far = max(float((found[n] - wanted[n]).abs().max()) for n in found) / size
    return Seen(way, 0.0, far)
