"""Every clip-in-backward layer against per-record gradients by vmap(grad), clipped in float64."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from aadp_kernels import Bias, Layout, with_clipping
from aadp_kernels.clip_in_backward import clip, matrix_rules, other_rules, products

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")
CLIENTS, BATCH = 3, 5


def floats(*shape):
    return lambda: torch.randn(CLIENTS, BATCH, *shape, dtype=torch.float64)


def tokens(*shape):
    return lambda: torch.randint(0, 7, (CLIENTS, BATCH, *shape))


LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), floats(4)),
    "linear without bias": (lambda: nn.Linear(4, 3, bias=False), floats(4)),
    "linear, sequence": (lambda: nn.Linear(4, 3), floats(6, 4)),
    "linear, two axes, no bias": (lambda: nn.Linear(4, 3, bias=False), floats(2, 3, 4)),
    "linear, sequence of one": (lambda: nn.Linear(4, 3), floats(1, 4)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3), floats(2, 7)),
    "conv1d, all options": (
        lambda: nn.Conv1d(4, 6, 2, stride=2, padding=3, dilation=2, groups=2), floats(4, 7)
    ),
    "conv1d, depthwise, same": (
        lambda: nn.Conv1d(3, 6, 4, padding="same", groups=3, bias=False), floats(3, 5)
    ),
    "conv1d, reflect": (
        lambda: nn.Conv1d(2, 2, 3, padding=2, padding_mode="reflect"), floats(2, 5)
    ),
    "conv2d": (lambda: nn.Conv2d(2, 3, (3, 2)), floats(2, 5, 4)),
    "conv2d, all options": (
        lambda: nn.Conv2d(4, 6, (2, 3), stride=(2, 1), padding=(1, 2), dilation=(2, 1), groups=2),
        floats(4, 5, 4),
    ),
    "conv2d, depthwise": (lambda: nn.Conv2d(3, 3, 3, padding=1, groups=3), floats(3, 4, 4)),
    "conv2d, circular, valid": (
        lambda: nn.Conv2d(1, 2, 3, padding=(1, 2), padding_mode="circular"), floats(1, 4, 5)
    ),
    "conv2d, replicate": (
        lambda: nn.Conv2d(1, 2, 2, padding=1, padding_mode="replicate", bias=False), floats(1, 3, 3)
    ),
    "conv2d, same, even": (lambda: nn.Conv2d(2, 2, 2, padding="same"), floats(2, 3, 3)),
    "embedding": (lambda: nn.Embedding(7, 3), tokens(6)),
    "embedding, one token": (lambda: nn.Embedding(7, 3), tokens()),
    "embedding, padding": (lambda: nn.Embedding(7, 3, padding_idx=-5), tokens(2, 4)),
    "layer norm": (lambda: nn.LayerNorm(4), floats(6, 4)),
    "layer norm, two axes": (lambda: nn.LayerNorm((3, 4), bias=False), floats(2, 3, 4)),
    "layer norm, no positions": (lambda: nn.LayerNorm(4, eps=0.1), floats(4)),
    "rms norm": (lambda: nn.RMSNorm(4), floats(6, 4)),
    "rms norm, eps": (lambda: nn.RMSNorm((2, 4), eps=0.5), floats(2, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 6), floats(6, 3)),
    "group norm, image": (lambda: nn.GroupNorm(3, 6, eps=0.1), floats(6, 2, 3)),
    "group norm, no positions": (lambda: nn.GroupNorm(2, 6), floats(6)),
    "instance norm 1d": (lambda: nn.InstanceNorm1d(3, affine=True), floats(3, 5)),
    "instance norm 2d": (lambda: nn.InstanceNorm2d(3, affine=True, eps=0.1), floats(3, 2, 4)),
    "bias": (lambda: Bias(4), floats(6, 4)),
    "bias, broadcast": (lambda: Bias(3, 1, 2), floats(3, 4, 2)),
    "bias, positions": (lambda: Bias(6, 4), floats(6, 4)),
}  # fmt: skip


class Model(nn.Module):
    """One layer behind something that makes the input's gradient matter."""

    def __init__(self, layer, *shape):
        super().__init__()
        self.first = Bias(*shape)
        self.layer = layer

    def forward(self, x):
        return self.layer(self.first(x) if x.is_floating_point() else x)


def problem(name, seed=0):
    """Model with random parameters, and one weight an output of each record for the loss."""
    torch.manual_seed(seed)
    make, draw = LAYERS[name]
    x = draw()
    model = Model(make(), *x.shape[2:]).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.5)
    if not x.is_floating_point():
        del model.first
    return model, x, torch.randn_like(model(x[0])).expand(CLIENTS, *model(x[0]).shape).clone()


def loss_of(model):
    """Sum over records of a curved function, so that gradients differ between records."""

    def loss(params, x, y, buffers=None):
        return (torch.tanh(functional_call(model, {**params, **(buffers or {})}, (x,))) * y).sum()

    return loss


def expected(model, params, x, y, clip, mask, votes_at, p):
    """Clipped sums, and (votes, clipped, non-finite) a layer, of one client."""
    layout = Layout.build(params)
    grads = vmap(grad(lambda q, a, b: loss_of(model)(q, a[None], b[None])), (None, 0, 0))(
        params, x, y
    )
    sums, counts = {}, []
    for members in layout.members:
        names = [layout.names[i] for i in members]
        joint = torch.cat([grads[n].flatten(1) for n in names], 1)
        live = joint.isfinite().all(1) & (mask > 0)
        norm = joint[live].norm(p=p, dim=1)
        factor = torch.where(norm > clip, clip / norm, 1.0)
        sums |= {n: torch.einsum("b,b...->...", factor, grads[n][live]) for n in names}
        ballots = (joint[live].abs().sum(1) <= votes_at).double() - 0.5
        bad = ((mask > 0) & ~joint.isfinite().all(1)).sum()
        counts.append([float(ballots.sum()), float((norm > clip).sum()), float(bad)])
    return sums, torch.tensor(counts, dtype=torch.float64)


def differentiate(mode, clipped, params, probes, buffers, x, y):
    """Gradients of parameters and probes, [K, ...] each."""
    loss = loss_of(clipped)
    both = grad(lambda q, s, b, x, y: loss({**q, **s}, x, y, b), argnums=(0, 1))
    if mode == "vmap, shared":
        return vmap(both, in_dims=(None, None, 0, 0, 0))(params, probes, buffers, x, y)
    many = {n: q.expand(CLIENTS, *q.shape).clone() for n, q in params.items()}
    if mode == "vmap, own":
        x = x.movedim(0, 1)
        return vmap(both, in_dims=(0, None, 0, 1, 0))(many, probes, buffers, x, y)
    if mode == "vmap, nested":
        inner = vmap(both, in_dims=(None, None, 0, 0, 0))
        twice = vmap(inner, in_dims=(0, None, None, None, None))
        first = {n: torch.stack([q, q + 1]) for n, q in params.items()}
        return tuple({n: v[0] for n, v in d.items()} for d in twice(first, probes, buffers, x, y))
    rows = []
    for k in range(CLIENTS):
        leaves = [{n: q.clone().requires_grad_() for n, q in d.items()} for d in (params, probes)]
        own = {n: b[k] for n, b in buffers.items()}
        if mode == "grad":
            rows.append(both(params, probes, own, x[k], y[k]))
        else:
            loss({**leaves[0], **leaves[1]}, x[k], y[k], own).backward()
            rows.append([{n: q.grad for n, q in d.items()} for d in leaves])
    return tuple({n: torch.stack([r[i][n] for r in rows]) for n in rows[0][i]} for i in (0, 1))


def check(name, p, mode, size, seed=0):
    model, x, y = problem(name, seed)
    if x.is_floating_point():
        x[0, 1], x[2, 0], x[2, 3] = math.nan, math.inf, math.nan
    else:
        y[0, 1], y[2, 3] = math.nan, math.nan
    mask = torch.ones(CLIENTS, BATCH, dtype=torch.float64)
    mask[1] = 0
    mask[0, 2] = mask[2, 3] = 0
    clip = size * torch.tensor([1.0, 2.0, 1.5], dtype=torch.float64)
    votes_at = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    params = {n: q.detach() for n, q in model.named_parameters()}
    layers = Layout.build(params).layer_names
    buffers = {}
    for layer in layers:
        buffers |= {f"{layer}.clip_norm": clip, f"{layer}.votes_at": votes_at}
        buffers |= {f"{layer}.mask": mask}
    probes = {f"{layer}.probe": torch.zeros(3, dtype=torch.float64) for layer in layers}
    clipped = with_clipping(model, p=p)
    sums, counts = differentiate(mode, clipped, params, probes, buffers, x, y)
    for k in range(CLIENTS):
        want, table = expected(model, params, x[k], y[k], clip[k], mask[k], votes_at[k], p)
        for parameter, value in want.items():
            torch.testing.assert_close(sums[parameter][k], value, rtol=1e-7, atol=1e-9)
        for row, layer in zip(table, layers, strict=True):
            assert torch.equal(counts[f"{layer}.probe"][k], row)
    assert not any(sums[n][1].any() for n in params)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    ("mode", "p"),
    [
        ("autograd", 1),
        ("autograd", 2),
        ("vmap, shared", 2),
        ("vmap, own", 1),
        pytest.param("vmap, shared", 1, marks=pytest.mark.slow),
        pytest.param("vmap, own", 2, marks=pytest.mark.slow),
    ],
)
def test_sums_and_counts(name, p, mode):
    for size in (0.0, 0.3, 3.0, math.inf) if mode == "autograd" else (0.5, 2.0):
        check(name, p, mode, size)


def without_numba(patch):
    for module in (clip, matrix_rules, products):
        patch.setattr(module, "record_kernels", lambda _: None)


@pytest.fixture(params=["torch", "numba", "torch, numba norms"])
def implementation(request, monkeypatch):
    """Plain torch where numba would run, and layers that are large for the slices and caches."""
    name = request.param
    if name != "numba":
        monkeypatch.setattr(other_rules, "record_kernels", lambda _: None)
    if name == "torch":
        without_numba(monkeypatch)
    if name == "torch, numba norms":
        monkeypatch.setattr("aadp_kernels._cpu.records.product_sums", lambda *_: None)
        monkeypatch.setattr("aadp_kernels._cpu.records.product_single", lambda *_: None)


@pytest.fixture(params=["all at once", "slices of one record", "norms without gradients"])
def slices(request, monkeypatch):
    """Layers that are large for the slices of the batch."""
    if request.param != "all at once":
        size = 60 if request.param == "slices of one record" else 4
        monkeypatch.setitem(clip.SLICE, "cpu", size)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_other_implementations(implementation, slices, name, p):
    check(name, p, "autograd", 0.5)


@pytest.mark.parametrize("name", ["linear, sequence", "conv2d, all options", "conv1d", "embedding"])
def test_other_implementations_under_vmap(implementation, slices, name):
    check(name, 2, "vmap, own", 1.0)


@pytest.mark.parametrize("name", ["linear", "conv2d, all options", "embedding", "group norm"])
@pytest.mark.parametrize("mode", ["grad", "vmap, nested"])
def test_other_transforms(name, mode):
    check(name, 1, mode, 1.0)


@pytest.mark.parametrize("name", LAYERS)
def test_forward_is_the_models_own(name):
    model, x, _ = problem(name)
    clipped = with_clipping(model, p=1)
    rtol = 1e-12 if "instance" in name else 0
    torch.testing.assert_close(clipped(x[0]), model(x[0]), rtol=rtol, atol=rtol)
    assert clipped.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", LAYERS)
def test_the_input_receives_its_ordinary_gradient(name):
    model, x, y = problem(name)
    if not x.is_floating_point():
        pytest.skip("indices have no gradient")
    clipped = with_clipping(model, p=2)
    clipped.layer.clip_norm.fill_(1e-3)
    grads = []
    for m in (model, clipped):
        own = x[0].clone().requires_grad_()
        (torch.tanh(m(own)) * y[0]).sum().backward()
        grads.append(own.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_one_record_never_passes_the_clip_norm_in_float32(name, p):
    for seed in range(8):
        model, x, y = problem(name, seed)
        clipped = with_clipping(model.float(), p=p)
        x = x.float() if x.is_floating_point() else x
        clip = 0.03
        for module in clipped.children():
            module.clip_norm.fill_(clip)
            module.mask = torch.arange(BATCH) == seed % BATCH
        (torch.tanh(clipped(x[0])) * y[0]).sum().backward()
        for module in clipped.children():
            joint = torch.cat([q.grad.double().flatten() for q in module.parameters()])
            # Rounding of the sum itself is outside of the claim.
            assert joint.norm(p=p) <= clip * (1 + 2e-7)
            assert joint.norm(p=p) > 0


@pytest.mark.parametrize("clip", [math.nan, -1.0])
@pytest.mark.parametrize("name", ["linear", "conv2d", "bias"])
def test_a_clip_norm_that_is_none_silences(name, clip):
    model, x, y = problem(name)
    for kind in ("numba", "torch"):
        clipped = with_clipping(model, p=2)
        clipped.layer.clip_norm.fill_(clip)
        with pytest.MonkeyPatch.context() as patch:
            if kind == "torch":
                without_numba(patch)
            (clipped(x[0]) * y[0]).sum().backward()
        assert not any(q.grad.any() for q in clipped.layer.parameters())
        assert clipped.first.bias.grad.any()
