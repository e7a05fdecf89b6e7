"""Weights that two layers share, transposed dense layers, and layers cut into weight and bias."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aadp_kernels import Layout, UnsupportedLayerError, record_gradients, with_kept_gradients
from aadp_kernels.clip_in_backward import clip as clip_in_backward_clip
from fl_lightning.local.batches import Batch
from fl_lightning.local.gradient import Loss
from fl_lightning.privacy import clipping as clipping_module
from fl_lightning.privacy.clipping import changes_its_way, clipped_sums, per_sample_gradients
from fl_lightning.values.round import LayerPolicy

TOKENS, LENGTH, WIDTH = 11, 6, 8


class Conv1D(nn.Module):
    """As that of GPT-2 in transformers, which the tests do not install."""

    def __init__(self, out: int, features: int) -> None:
        super().__init__()
        self.nf, self.nx = out, features
        self.weight = nn.Parameter(0.3 * torch.randn(features, out))
        self.bias = nn.Parameter(0.1 * torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return flat.view(*x.size()[:-1], self.nf)


Conv1D.__module__ = "transformers.pytorch_utils"


class Language(nn.Module):
    """A small language model of GPT-2's form: one row of positions for all, one tied weight."""

    def __init__(
        self, *, tied: bool = True, padding: int | None = None, bias: bool = False
    ) -> None:
        super().__init__()
        self.wte = nn.Embedding(TOKENS, WIDTH, padding_idx=padding)
        self.wpe = nn.Embedding(LENGTH, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.projection = Conv1D(3 * WIDTH, WIDTH), Conv1D(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS, bias=bias)
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.wte(x) + self.wpe(torch.arange(x.shape[1])[None])
        q, k, v = self.attention(self.norm1(h)).chunk(3, -1)
        scores = (q @ k.transpose(1, 2)).masked_fill(torch.ones(LENGTH, LENGTH).triu(1) > 0, -1e9)
        return self.head(self.norm2(h + self.projection(scores.softmax(-1) @ v)))


def token_losses(logits: Tensor, y: Tensor) -> Tensor:
    """Loss of each text, summed over its tokens."""
    return (
        F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="none").view(y.shape).sum(-1)
    )


def texts(clients: int = 2, records: int = 7) -> Batch:
    """Texts that repeat tokens; the last two of the first client are padding."""
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randint(0, TOKENS, (2, clients, records, LENGTH), generator=generator)
    mask = torch.ones(clients, records)
    mask[0, -2:] = 0
    return Batch(x, y, mask, torch.ones(clients), torch.ones(clients).bool())


def vectors(clients: int = 2, records: int = 7) -> Batch:
    generator = torch.Generator().manual_seed(4)
    batch = texts(clients, records)
    x = torch.randn(clients, records, WIDTH, generator=generator)
    return replace(batch, x=x, y=torch.randint(0, 3, (clients, records), generator=generator))


def class_losses(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none")


NETWORKS = {
    "tied": (Language, texts, token_losses),
    "tied, padding": (lambda: Language(padding=2), texts, token_losses),
    "tied, bias": (lambda: Language(bias=True), texts, token_losses),
    "not tied": (lambda: Language(tied=False), texts, token_losses),
    "bare": (lambda: nn.Linear(WIDTH, 3), vectors, class_losses),
}


class Records:
    """Gradients of a batch's records by `torch.func.vmap` in float64, and their norms.

    Attributes:
        gradients: by name, a tensor [B, ...] for each client.
        sizes: L1 norms and L2 norms, [2, k, L, B].
    """

    def __init__(self, network: nn.Module, batch: Batch, layout: Layout, loss: Loss) -> None:
        wide = copy.deepcopy(network).double()
        values = {n: q.detach() for n, q in wide.named_parameters()}
        per_sample = per_sample_gradients(wide, loss, True)
        x = batch.x.double() if batch.x.is_floating_point() else batch.x
        self.layout, self.mask = layout, batch.mask.double()
        self.gradients = [per_sample(values, *row) for row in zip(x, batch.y, strict=True)]
        sizes = torch.zeros(2, len(x), layout.num_layers, x.shape[1], dtype=torch.float64)
        for i, found in enumerate(self.gradients):
            for n, at in zip(layout.names, layout.layer_of, strict=True):
                sizes[0, i, at] += found[n].flatten(1).abs().sum(1)
                sizes[1, i, at] += found[n].flatten(1).square().sum(1)
        self.sizes = torch.stack([sizes[0], sizes[1].sqrt()])

    def clipped(
        self, policy: LayerPolicy, clipping: str, p: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Sums by name [k, ...], and votes, clipped and non-finite records [k, L, 3]."""
        whole = self.sizes[p - 1] / policy.clip_norm[..., None]
        if clipping == "joint":
            part = policy.shares / policy.shares.sum(-1, keepdim=True)
            whole = (whole * part.sqrt()[..., None]).norm(dim=1, keepdim=True).expand(whole.shape)
        factor = (1 / whole).clamp(max=1.0)
        sums = {
            n: torch.stack([
                torch.einsum("b,b...->...", factor[i, at] * self.mask[i], found[n])
                for i, found in enumerate(self.gradients)
            ])
            for n, at in zip(self.layout.names, self.layout.layer_of, strict=True)
        }  # fmt: skip
        real = self.mask[:, None]
        votes = torch.zeros_like(policy.clip_norm)
        if policy.votes_at is not None:
            under = self.sizes[0] <= policy.votes_at[..., None]
            votes = ((under.double() - 0.5) * real).sum(-1)
        over = ((factor < 1).double() * real).sum(-1)
        return sums, torch.stack([votes, over, torch.zeros_like(over)], -1)


@pytest.fixture
def no_gradient_of_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """No way out by per-sample gradients."""

    def refuse(*_: object, **__: object):
        return lambda *_: pytest.fail("clipped record by record")

    monkeypatch.setattr(clipping_module, "per_sample_sums", refuse)
    monkeypatch.setattr(clipping_module, "joint_sample_sums", refuse)


@pytest.mark.usefixtures("no_gradient_of_a_record")
@pytest.mark.parametrize("votes", ["no votes", "votes", "votes, by slices"])
@pytest.mark.parametrize(("clipping", "p"), [("layer", 2), ("layer", 1), ("flat", 2), ("joint", 2)])
@pytest.mark.parametrize("kind", NETWORKS)
def test_sums_are_those_of_per_sample_gradients(
    kind, clipping, p, votes, monkeypatch
):  # fmt: skip
    build, make_batch, loss = NETWORKS[kind]
    torch.manual_seed(0)
    network, batch = build(), make_batch()
    tensors = dict(network.named_parameters())
    layout = Layout.build(tensors, dict.fromkeys(tensors, "all") if clipping == "flat" else None)
    records = Records(network, batch, layout, loss)
    generator = torch.Generator().manual_seed(1)
    middle = records.sizes.median(-1).values * (1 + 1e-3)
    clip = middle[p - 1]
    shares = torch.rand(clip.shape, generator=generator).double() + 0.2
    policy = LayerPolicy(clip, shares, shares, 0 * clip, middle[0] if votes != "no votes" else None)
    if votes == "votes, by slices":
        monkeypatch.setitem(clip_in_backward_clip.SLICE, "cpu", 200)
    run = clipped_sums(
        network, loss, layout, p=p, vectorize=True, max_examples=3 if votes == "votes" else 64,
        example=batch.x[0, :2], clipping=clipping,
    )  # fmt: skip
    values = {n: q.detach().clone() for n, q in network.named_parameters()}
    sums, counts = run(values, True, batch, policy)
    assert not changes_its_way(run)
    wanted, seen = records.clipped(policy, clipping, p)
    assert 0 < float(seen[..., 1].sum()) < batch.mask.sum() * layout.num_layers
    for n in layout.names:
        atol = 3e-6 * float(wanted[n].abs().max())
        torch.testing.assert_close(sums[n].double(), wanted[n], rtol=2e-5, atol=max(atol, 1e-9))
    torch.testing.assert_close(counts.double(), seen)


def test_uses_that_cancel_leave_a_norm_that_is_not_too_small():
    """Two uses of one weight whose gradients cancel: the norm of their sum is rounding alone."""
    torch.manual_seed(0)
    one, other = nn.Linear(WIDTH, 3, bias=False), nn.Linear(WIDTH, 3, bias=False)
    other.weight = one.weight
    network = with_kept_gradients(nn.ModuleList([one, other]))
    first, second = network
    x = 100 * torch.randn(5, 4, WIDTH)
    slope = torch.randn(5, 4, 3)
    total = (slope * (first(x) - second(x))).sum()
    (found,) = record_gradients(network, total)
    for l1 in (False, True):
        _, square, finite = found.norms(2, l1=l1)
        assert finite.all()
        length = torch.linalg.vector_norm(torch.einsum("bto,bti->boi", slope, x), dim=(1, 2))
        assert square is not None
        assert bool((square.sqrt() >= 1e-4 * length).all())
        assert bool((square.sqrt() <= 1e-2 * length).all())
    (sums,) = found.sums(torch.ones(5), finite).values()
    assert float(sums.abs().max()) <= 1e-4 * float(length.max())


def test_a_record_too_large_for_one_use_counts_in_none():
    """Its products may overflow float32, whatever its other use is."""
    torch.manual_seed(0)
    one, other = nn.Linear(WIDTH, 3, bias=False), nn.Linear(WIDTH, 3, bias=False)
    other.weight = one.weight
    network = with_kept_gradients(nn.ModuleList([one, other]))
    first, second = network
    x, large = torch.randn(2, 5, 4, WIDTH)
    large[2] *= 1e17
    (found,) = record_gradients(network, first(x).sum() + second(large).sum())
    for l1 in (False, True):
        assert found.norms(2, l1=l1)[2].tolist() == [True, True, False, True, True]


def test_layers_of_other_kinds_that_share_a_weight_are_refused():
    network = nn.Sequential(nn.Conv1d(3, 3, 1), nn.Flatten(), nn.Conv1d(3, 3, 1))
    network[2].weight = network[0].weight
    with pytest.raises(UnsupportedLayerError, match="shares its parameter 'weight' with 0"):
        with_kept_gradients(network)
    biases = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    biases[1].bias = biases[0].bias
    with pytest.raises(UnsupportedLayerError, match="shares its parameter 'bias' with 0"):
        with_kept_gradients(biases)


def test_a_record_that_is_not_finite_is_dropped_from_a_shared_weight():
    build, make_batch, loss = NETWORKS["tied"]
    torch.manual_seed(0)
    network, batch = build(), make_batch(1)
    layout = Layout.build(dict(network.named_parameters()))
    ones = torch.ones(1, layout.num_layers, dtype=torch.float64)
    policy = LayerPolicy(ones, ones, ones, 0 * ones)
    values = {n: q.detach().clone() for n, q in network.named_parameters()}

    def spoilt(logits: Tensor, y: Tensor) -> Tensor:
        bad = torch.zeros(len(y))
        bad[0] = torch.inf
        return loss(logits, y) + bad * logits[:, 0, 0]

    def sums_of(losses, mask: Tensor):
        run = clipped_sums(
            network, losses, layout, p=2, vectorize=True, max_examples=64, example=batch.x[0, :2]
        )
        return run(values, True, replace(batch, mask=mask), policy)

    got, counts = sums_of(spoilt, batch.mask)
    without = batch.mask.clone()
    without[0, 0] = 0
    wanted, _ = sums_of(loss, without)
    for n in layout.names:
        torch.testing.assert_close(got[n], wanted[n])
    assert bool((counts[..., 2] == 1).any())
