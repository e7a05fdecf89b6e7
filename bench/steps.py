"""Networks, batches and the ways to make one private training step with them."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from aadp_kernels import (
    Layout,
    NoiseKey,
    WatchedForward,
    forget_gradients,
    privatize_,
    record_gradients,
    with_clipping,
    with_kept_gradients,
)
from bench import gpt2, minilm
from bench.ours import SEED
from fl_lightning.models import CNN, MLP

LR = 0.1
# The grid wants integers before the sum; here a matrix product in floating point makes the sum.
FORMS = ("wide", "fast")
OPACUS = {
    "flat": "hooks, flat",
    "per_layer": "hooks, per layer",
    "ghost": "ghost clipping",
    "fast": "fast gradient clipping",
}


class Block(nn.Module):
    """A transformer block with causal attention, normalisation first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.reshape(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        # Written out, since vmap has no rule for the fused attention on a CPU.
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        ahead = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        mixed = scores.masked_fill(ahead, -torch.inf).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A small language model: tokens [B, T] -> logits [B, T, vocabulary]."""

    def __init__(self, vocabulary: int = 512, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.place = nn.Embedding(64, width)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        # One row of positions a record: per-sample rules want a batch dimension everywhere.
        places = torch.arange(x.shape[1], device=x.device).expand(x.shape).contiguous()
        return self.head(self.norm(self.blocks(self.token(x) + self.place(places))))


def network(name: str, device: torch.device) -> nn.Module:
    """The MLP and the CNN of `bench.cohort`, the transformer, or one of Hugging Face's."""
    if name == gpt2.NAME:
        return gpt2.network().to(device)
    if name in minilm.NAMES:
        return minilm.network(name).to(device)
    torch.manual_seed(0)
    if name == "MLP":
        model: nn.Module = MLP(in_features=784, hidden=[64])
    elif name == "CNN":
        model = CNN(
            image_size=28, channels=[16, 32], kernel_sizes=[6, 4], strides=[2, 2], hidden=[]
        )
    else:
        model = Transformer()
    return model.to(device)


def batch(name: str, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random images and labels, or random texts of 32 (64) tokens."""
    if name in (gpt2.NAME, *minilm.NAMES):
        x, y = (gpt2 if name == gpt2.NAME else minilm).batch(size)
        return x.to(device), y.to(device)
    generator = torch.Generator().manual_seed(1)
    if name == "transformer":
        text = torch.randint(512, (size, 33), generator=generator).to(device)
        return text[:, :-1].contiguous(), text[:, 1:].contiguous()
    x = torch.randn(size, 1, 28, 28, generator=generator)
    return x.to(device), torch.randint(10, (size,), generator=generator).to(device)


def losses(logits: Tensor, y: Tensor) -> Tensor:
    """Loss of every record [B]; of a text the sum over its tokens."""
    each = F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="none")
    return each.view(y.shape[0], -1).sum(1)


@dataclass
class Setup:
    """One comparison: a network, a batch and what is asked of a step.

    Attributes:
        clips: Clip norm of each layer, median of the layer's norms: half the records are clipped.
        scale: Standard deviation (or b) of the noise on the sums.
    """

    name: str
    size: int
    device: torch.device
    model: nn.Module
    x: Tensor
    y: Tensor
    layout: Layout
    p: int
    clips: dict[str, list[float]]
    gradients: dict[str, list[Tensor]]
    scale: float

    @classmethod
    def build(cls, name: str, size: int, device: torch.device, p: int = 2) -> Setup:
        """Clip norms and the clipped sums that must come out, record by record."""
        model, (x, y) = network(name, device), batch(name, size, device)
        layout = Layout.build(trained(model))
        records = record_by_record(model, x, y)
        rows = [torch.stack([g.double().norm(p) for g in gs]) for gs in records()]
        norms = torch.stack(rows, 1)  # [tensors, records]
        tensors = [(i,) for i in range(len(norms))]
        members = {"all": [tuple(range(len(norms)))], "tensor": tensors, "layer": layout.members}
        clips: dict[str, list[float]] = {}
        factors: dict[str, list[Tensor]] = {}
        for level, groups in members.items():
            clips[level], factors[level] = [], [torch.empty(0)] * len(norms)
            for group in groups:
                norm = norms[list(group)].norm(p, dim=0)
                clip = float(norm.median())
                clips[level].append(clip)
                for i in group:
                    factors[level][i] = (clip / norm.clamp(min=1e-30)).clamp(max=1.0)
        like = [q for q in model.parameters() if q.requires_grad]
        gradients = {
            level: [torch.zeros_like(q, dtype=torch.float64) for q in like] for level in members
        }
        for b, gs in enumerate(records()):
            for level, sums in gradients.items():
                for total, factor, g in zip(sums, factors[level], gs, strict=True):
                    total.add_(g, alpha=float(factor[b]))
        return cls(name, size, device, model, x, y, layout, p, clips, gradients, clips["all"][0])


# (noise scale) -> gradients, in the order of the layout; parameters are updated as a side effect.
Step = Callable[[float], list[Tensor]]
# Builders give the model whose parameters move, and the step.
Built = tuple[nn.Module, Step]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by name that are not frozen."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def record_by_record(
    model: nn.Module, x: Tensor, y: Tensor
) -> Callable[[], Iterator[tuple[Tensor, ...]]]:
    """Makes an iterator over the records' gradients of the trained parameters."""

    def records() -> Iterator[tuple[Tensor, ...]]:
        for i in range(len(x)):
            loss = losses(model(x[i : i + 1]), y[i : i + 1]).sum()
            yield torch.autograd.grad(loss, list(trained(model).values()))

    return records


def per_sample_gradients(model: nn.Module) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    """vmap(grad): gradients of every record by name, [B, ...]."""
    params = {n: p.detach() for n, p in trained(model).items()}

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return losses(functional_call(model, params, (x[None],)), y[None])[0]

    return lambda x, y: vmap(grad(loss), in_dims=(None, 0, 0))(params, x, y)


@torch.no_grad()
def descend(model: nn.Module, gradients: list[Tensor], size: int) -> list[Tensor]:
    """One step of plain gradient descent on the mean."""
    params = list(trained(model).values())
    torch._foreach_add_(params, gradients, alpha=-LR / size)
    return gradients


def plain(setup: Setup) -> Built:
    """The same step without privacy."""
    model = setup.model

    def step(scale: float) -> list[Tensor]:
        model.zero_grad()
        losses(model(setup.x), setup.y).sum().backward()
        return descend(model, [p.grad for p in trained(model).values()], setup.size)  # type: ignore[misc]

    return model, step


def ours(setup: Setup, form: str, rng: str) -> Built:
    """Clip-in-backward layers, then noise."""
    model = with_clipping(setup.model, p=setup.p)
    modules = dict(model.named_modules())
    for name, clip in zip(setup.layout.layer_names, setup.clips["layer"], strict=True):
        module = modules[name]
        module.clip_norm.fill_(clip)
        # Counters of votes and of clipped records are not wanted here.
        module.votes_at = module.probe = module.mask = None
    add_noise = noise_of(setup, form, rng)

    def step(scale: float) -> list[Tensor]:
        model.zero_grad()
        losses(model(setup.x), setup.y).sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        add_noise(gradients, scale)
        return descend(model, gradients, setup.size)

    return model, step


def ours_flat(setup: Setup, form: str, rng: str) -> Built:
    """One norm over all layers: norms from one backward, then sums by their factors, then noise."""
    model, clip = setup.model, setup.clips["all"][0]
    names = list(trained(model))
    watch = WatchedForward(with_kept_gradients(model))
    add_noise = noise_of(setup, form, rng)

    def step(scale: float) -> list[Tensor]:
        leaves = {n: p.detach().requires_grad_() for n, p in trained(model).items()}
        with watch.forward(leaves, setup.size):
            total = losses(watch.model(setup.x), setup.y).sum()
        found = record_gradients(watch.model, total)
        forget_gradients(watch.model)
        squares, finite = zip(*(layer.norms(2, l1=False)[1:] for layer in found), strict=True)
        every = torch.stack(finite).all(0)
        norm = torch.stack(squares).sum(0).sqrt()
        factor = torch.where(every, (clip / norm).clamp(max=1.0), 0.0).float()
        sums: dict[str, Tensor] = {}
        for layer in found:
            sums |= layer.sums(factor, every)
        gradients = [sums[name].contiguous() for name in names]
        add_noise(gradients, scale)
        return descend(model, gradients, setup.size)

    return model, step


def noise_of(setup: Setup, form: str, rng: str) -> Callable[[list[Tensor], float], object]:
    """Adds the noise of all layers to sums that are clipped already, in one call."""
    key, layout, number = NoiseKey.from_seed(SEED, rng), setup.layout, [0]
    like = {"dtype": torch.float64, "device": setup.device}
    unlimited = torch.full((layout.num_layers,), torch.inf, **like)
    scales: dict[float, Tensor] = {}

    def add_noise(gradients: list[Tensor], scale: float) -> None:
        number[0] += 1
        if scale not in scales:
            scales[scale] = torch.full((layout.num_layers,), scale, **like)
        privatize_(
            gradients, layout=layout, clip=unlimited, scale=scales[scale], p=setup.p,
            mechanism="gaussian" if setup.p == 2 else "laplace", key=key, step=number[0], form=form,
        )  # fmt: skip

    return add_noise


def vmap_grad(setup: Setup) -> Built:
    """Per-sample gradients by vmap(grad), clipped layer by layer, torch noise."""
    model, layout = minilm.written_out(setup.model), setup.layout
    gradients_of = per_sample_gradients(model)

    def step(scale: float) -> list[Tensor]:
        per_sample = list(gradients_of(setup.x, setup.y).values())
        gradients = [torch.empty(0)] * len(per_sample)
        for group, clip in zip(layout.members, setup.clips["layer"], strict=True):
            norm = torch.stack([per_sample[i].flatten(1).norm(setup.p, dim=1) for i in group])
            factor = (clip / norm.norm(setup.p, dim=0)).clamp(max=1.0)
            for i in group:
                total = torch.einsum("b,b...->...", factor, per_sample[i])
                gradients[i] = total + scale * torch.randn_like(total)
        return descend(model, gradients, setup.size)

    return model, step


def opacus(setup: Setup, mode: str) -> Built:
    """Opacus: "flat" and "per_layer" hooks, "ghost" and "fast" gradient clipping."""
    samplers = importlib.import_module("opacus.grad_sample")
    optimizers = importlib.import_module("opacus.optimizers")
    model = setup.model.train()
    level = "tensor" if mode == "per_layer" else "all"
    clips = setup.clips[level]
    clip = clips if mode == "per_layer" else clips[0]
    inner = torch.optim.SGD(trained(model).values(), lr=LR)
    fast = mode in ("ghost", "fast")
    kinds = {
        "flat": optimizers.DPOptimizer,
        "per_layer": optimizers.DPPerLayerOptimizer,
        "ghost": optimizers.DPOptimizerFastGradientClipping,
        "fast": optimizers.DPOptimizerFastGradientClipping,
    }
    optimizer = kinds[mode](
        inner, noise_multiplier=1.0, max_grad_norm=clip, expected_batch_size=setup.size,
        loss_reduction="sum",
    )  # fmt: skip
    if fast:
        wrapped = samplers.GradSampleModuleFastGradientClipping(
            model, loss_reduction="sum", max_grad_norm=clip, use_ghost_clipping=mode == "ghost"
        )
        clipping = importlib.import_module("opacus.utils.fast_gradient_clipping_utils")
    else:
        wrapped = samplers.GradSampleModule(model, loss_reduction="sum")

    def step(scale: float) -> list[Tensor]:
        optimizer.noise_multiplier = scale / optimizer.max_grad_norm
        optimizer.zero_grad()
        each = losses(wrapped(setup.x), setup.y)
        if fast:
            clipping.DPTensorFastGradientClipping(wrapped, optimizer, each, "sum").backward()
        else:
            each.sum().backward()
        # A sum is expected here, so the mean that everybody else steps along is taken by hand.
        inner.param_groups[0]["lr"] = LR / setup.size
        optimizer.step()
        return [p.grad for p in model.parameters() if p.grad is not None]

    return model, step


def fastdp(setup: Setup) -> Built:
    """fastDP with one norm for all layers, since its norms a layer are all the same."""
    try:
        engine = importlib.import_module("fastDP").PrivacyEngine
    except ImportError as error:
        raise ImportError(f"fastDP is on no package index, install its sources: {error}") from None
    model, clip = setup.model, setup.clips["all"][0]
    optimizer = torch.optim.SGD(model.parameters(), lr=LR / setup.size)
    with contextlib.redirect_stdout(io.StringIO()):
        engine(
            model, batch_size=setup.size, sample_size=10 * setup.size, epochs=1,
            noise_multiplier=1.0, max_grad_norm=clip, clipping_fn="Abadi",
            clipping_style="all-layer", clipping_mode="MixOpt", loss_reduction="sum",
        ).attach(optimizer)  # fmt: skip

    def step(scale: float) -> list[Tensor]:
        for parameter in model.parameters():
            parameter.noise = scale
        losses(model(setup.x), setup.y).sum().backward()
        optimizer.step()
        return [p.grad for p in model.parameters() if p.grad is not None]

    return model, step


def sides(setup: Setup, rngs: tuple[str, ...]) -> dict[str, tuple]:
    """Name -> (kind, level, builder of a step) of all that take part."""
    found: dict[str, tuple] = {"no privacy": ("floor", "none", plain)}
    # Clipping within a layer's own backward knows one use of a weight.
    for form in () if setup.name == gpt2.NAME else FORMS:
        for rng in rngs:
            build = lambda s, f=form, r=rng: ours(s, f, r)  # noqa: E731
            found[f"ours, {form}, {rng}"] = ("ours", "layer", build)
    if setup.p == 2:
        flat = lambda s: ours_flat(s, "wide", "chacha20")  # noqa: E731
        found["ours, flat, wide, chacha20"] = ("ours", "all", flat)
        found["vmap(grad)"] = ("peer", "layer", vmap_grad)
        for mode, label in OPACUS.items():
            build = lambda s, m=mode: opacus(s, m)  # noqa: E731
            level = "tensor" if mode == "per_layer" else "all"
            found[f"Opacus, {label}"] = ("peer", level, build)
        found["fastDP"] = ("peer", "all", fastdp)
    return found
