"""Clip-in-backward against per-record gradients by vmap(grad), clipped in float64."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from aadp_kernels import (
    Layout,
    UnsupportedLayerError,
    check_single_use,
    clipped_conv2d,
    clipped_linear,
    with_clipping,
)
from aadp_kernels.clip_in_backward.clip import factors_and_counts
from aadp_kernels.contract import ClipRule, GradientsNeeded

CLIENTS, BATCH = 3, 6
LOSS = nn.CrossEntropyLoss(reduction="sum")


def conv_net():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), nn.Tanh(), nn.MaxPool2d(2, 1),
        nn.Conv2d(4, 3, 2, bias=False, dilation=1), nn.Flatten(), nn.Linear(3, 5), nn.Tanh(),
        nn.Linear(5, 3, bias=False),
    )  # fmt: skip


class TokenNet(nn.Module):
    """Linear layers on [B, T, in]."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 4)
        self.outer = nn.Linear(4, 3, bias=False)

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(x.flatten(1, 2)))).mean(1)


def problem(make, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    model = make().to(dtype)
    x = torch.randn(CLIENTS, BATCH, 2, 6, 6, dtype=dtype)
    y = torch.randint(0, 3, (CLIENTS, BATCH))
    params = {n: q.detach() for n, q in model.named_parameters()}
    return model, params, Layout.build(params), x, y


def reference(model, params, layout, x, y, clip, mask, votes_at, p):
    """Clipped sums and counts [L, 3] of one client from materialised per-record gradients."""

    def one(q, xi, yi):
        return LOSS(functional_call(model, q, (xi[None],)), yi[None])

    grads = vmap(grad(one), in_dims=(None, 0, 0))(params, x, y)
    sums, counts = {}, []
    for layer, members in enumerate(layout.members):
        names = [layout.names[i] for i in members]
        joint = torch.cat([grads[n].flatten(1) for n in names], 1)
        live = torch.isfinite(joint).all(1) & (mask > 0)
        norm, norm1 = joint.norm(p=p, dim=1)[live], joint.abs().sum(1)[live]
        factor = torch.where(norm > clip[layer], clip[layer] / norm, 1.0)
        for n in names:
            sums[n] = torch.einsum("b,b...->...", factor, grads[n][live])
        votes = ((norm1 <= votes_at[layer]).double() - 0.5).sum()
        bad = ((mask > 0) & ~torch.isfinite(joint).all(1)).sum()
        counts.append(torch.stack([votes, (norm > clip[layer]).sum(), bad]))
    return sums, torch.stack(counts)


def objective(model):
    def loss(params, probes, buffers, x, y):
        return LOSS(functional_call(model, {**params, **probes, **buffers}, (x,)), y)

    return loss


def run(mode, model, params, probes, buffers, x, y):
    """Gradients of parameters and probes, [K, ...] each, by one of four ways to differentiate."""
    loss = objective(model)
    both = grad(loss, argnums=(0, 1))
    if mode == "vmap_shared":
        return vmap(both, in_dims=(None, None, 0, 0, 0))(params, probes, buffers, x, y)
    if mode == "vmap_batched":
        many = {n: q.expand(CLIENTS, *q.shape).clone() for n, q in params.items()}
        return vmap(both, in_dims=(0, None, 0, 0, 0))(many, probes, buffers, x, y)
    results = []
    for k in range(CLIENTS):
        own = {n: b[k] for n, b in buffers.items()}
        if mode == "grad":
            results.append(both(params, probes, own, x[k], y[k]))
        else:
            leaves = [
                {n: q.clone().requires_grad_() for n, q in d.items()} for d in (params, probes)
            ]
            loss(*leaves, own, x[k], y[k]).backward()
            results.append(tuple({n: q.grad for n, q in d.items()} for d in leaves))
    return tuple(
        {n: torch.stack([r[i][n] for r in results]) for n in results[0][i]} for i in (0, 1)
    )


def buffers_of(layout, clip, votes_at, mask):
    buffers = {}
    for layer, name in enumerate(layout.layer_names):
        buffers[f"{name}.clip_norm"] = clip[:, layer]
        buffers[f"{name}.votes_at"] = votes_at[:, layer]
        buffers[f"{name}.mask"] = mask
    probes = {f"{n}.probe": torch.zeros(3, dtype=clip.dtype) for n in layout.layer_names}
    return buffers, probes


@pytest.mark.parametrize("mode", ["autograd", "grad", "vmap_shared", "vmap_batched"])
@pytest.mark.parametrize("make", [conv_net, TokenNet])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("size", [0.1, 1.0, 100.0, math.inf])
def test_clipped_sums_and_counts(mode, make, p, size):
    model, params, layout, x, y = problem(make)
    clip = size * (torch.rand(CLIENTS, layout.num_layers, dtype=torch.float64) + 0.5)
    votes_at = 3 * torch.rand(CLIENTS, layout.num_layers, dtype=torch.float64)
    mask = (torch.rand(CLIENTS, BATCH) > 0.3).double()
    mask[1] = 0
    for k, i, value, live in ((0, 2, math.nan, 1), (0, 4, math.nan, 0), (2, 1, math.inf, 1)):
        x[k, i, 0, 0, 0] = value
        mask[k, i] = live
    buffers, probes = buffers_of(layout, clip, votes_at, mask)
    sums, counts = run(mode, with_clipping(model, p=p), params, probes, buffers, x, y)
    for k in range(CLIENTS):
        expected, table = reference(
            model, params, layout, x[k], y[k], clip[k], mask[k], votes_at[k], p
        )
        for name, value in expected.items():
            torch.testing.assert_close(sums[name][k], value, rtol=1e-6, atol=1e-9)
        for layer, name in enumerate(layout.layer_names):
            assert torch.equal(counts[f"{name}.probe"][k], table[layer])
    assert not any(sums[name][1].any() for name in params)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("make", [conv_net, TokenNet])
def test_one_record_never_passes_the_clip_norm_in_float32(make, p):
    for seed in range(25):
        model, params, layout, x, y = problem(make, seed, torch.float32)
        clip = torch.full((CLIENTS, layout.num_layers), 0.05)
        mask = torch.zeros(CLIENTS, BATCH)
        mask[:, seed % BATCH] = 1
        buffers, probes = buffers_of(layout, clip, clip, mask)
        sums, _ = run("vmap_shared", with_clipping(model, p=p), params, probes, buffers, x, y)
        for members in layout.members:
            joint = torch.cat([sums[layout.names[i]].double().flatten(1) for i in members], 1)
            assert (joint.norm(p=p, dim=1) <= clip[0, 0].double()).all()


def test_clip_zero_silences_and_large_records_do_not_spread():
    model, params, layout, x, y = problem(conv_net, dtype=torch.float32)
    x[0, 0] = 1e38
    clip = torch.zeros(CLIENTS, layout.num_layers)
    buffers, probes = buffers_of(layout, clip, clip, torch.ones(CLIENTS, BATCH))
    sums, _ = run("vmap_shared", with_clipping(model, p=2), params, probes, buffers, x, y)
    assert not any(value.any() for value in sums.values())
    buffers, probes = buffers_of(layout, clip + 1, clip, torch.ones(CLIENTS, BATCH))
    sums, _ = run("vmap_shared", with_clipping(model, p=2), params, probes, buffers, x, y)
    assert all(torch.isfinite(value).all() for value in sums.values())


def test_forward_and_input_gradient_are_the_ordinary_ones():
    model, _, _, x, y = problem(conv_net)
    clipped = with_clipping(model, p=2)
    for module in clipped.modules():
        if hasattr(module, "clip_norm"):
            module.clip_norm.fill_(1e-3)
    inputs = [x[0].clone().requires_grad_() for _ in range(2)]
    outputs = [m(i) for m, i in zip((model, clipped), inputs, strict=True)]
    assert torch.equal(*outputs)
    for output in outputs:
        LOSS(output, y[0]).backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-12, atol=1e-12)


def test_without_replaced_buffers_gradients_are_the_ordinary_ones():
    model, _, _, x, y = problem(conv_net)
    clipped = with_clipping(model, p=1)
    assert clipped.state_dict().keys() == model.state_dict().keys()
    for module in (model, clipped):
        LOSS(module(x[0]), y[0]).backward()
    for a, b in zip(model.parameters(), clipped.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(4, 6).to(dtype), torch.randn(3, 6).to(dtype).requires_grad_()
    clipped_linear(x, weight, clip=torch.tensor(0.5), p=2).sum().backward()
    norm = weight.detach().new_tensor(math.sqrt(3)) * x.double().norm(dim=1)
    expected = ((0.5 / norm).clamp(max=1)[:, None] * x.double()).sum(0).expand(3, 6)
    torch.testing.assert_close(weight.grad.double(), expected, rtol=2e-2, atol=2e-2)


def test_gradients_only_where_needed():
    x = torch.randn(4, 6, requires_grad=True)
    weight, bias = torch.randn(3, 6), torch.randn(3, requires_grad=True)
    clipped_linear(x, weight, bias, clip=torch.tensor(0.5), p=2).sum().backward()
    assert x.grad is not None
    assert bias.grad is not None
    out = clipped_linear(x, weight, None, clip=torch.tensor(0.5), p=2)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], weight.sum(0).expand(4, 6))


def test_compile_inside_functorch_is_refused_or_clips():
    """torch.compile once dropped this backward inside functorch and gave unclipped gradients."""
    x, clip = torch.randn(5, 4), torch.tensor(1e-3)

    def loss(weight):
        return (clipped_linear(x, weight, clip=clip, p=2) * 100).sum()

    weight = torch.randn(3, 4)
    with pytest.raises(Exception, match="cannot be used inside a torch"):
        torch.compile(grad(loss), backend="eager", fullgraph=True)(weight)
    torch._dynamo.reset()
    gradient = torch.compile(grad(loss), backend="aot_eager")(weight)
    torch.testing.assert_close(gradient, grad(loss)(weight))
    assert gradient.norm() <= 5e-3


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compile_through_plain_autograd_clips():
    model, _, _, x, y = problem(lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 3)))
    clipped = with_clipping(model, p=2)
    clipped[1].clip_norm.fill_(1e-2)
    LOSS(clipped(x[0]), y[0]).backward()
    eager = clipped[1].weight.grad.clone()
    clipped.zero_grad()
    LOSS(torch.compile(clipped, backend="aot_eager", fullgraph=True)(x[0]), y[0]).backward()
    torch.testing.assert_close(clipped[1].weight.grad, eager)
    assert eager.norm() <= 6e-2


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight


class Loose(nn.Module):
    """A parameter of no layer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


SHARED = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(3, 3), nn.PReLU()), r"1 \(PReLU\)"),
        (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False)), "mixes the records"),
        (nn.Sequential(SHARED, SHARED), "shares"),
        (Tied(), "second .* shares"),
        (Loose(), r"Loose\) has the parameter 'scale' itself.* aadp_kernels.Bias"),
        (nn.Sequential(nn.Conv3d(1, 1, 2)), "only Conv1d and Conv2d"),
        (nn.Sequential(nn.ConvTranspose2d(1, 1, 2)), "only Conv1d and Conv2d"),
        (nn.Sequential(nn.GRU(2, 2)), r"0 \(GRU\) uses .* once a time step"),
        (nn.Sequential(nn.LSTMCell(2, 2)), "once a time step"),
        (nn.MultiheadAttention(4, 2), "build attention from nn.Linear"),
        (nn.Bilinear(2, 2, 2), "Bilinear"),
        (nn.EmbeddingBag(3, 2), "EmbeddingBag"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), "Parametrized"),
        (nn.Embedding(3, 2, max_norm=1.0), "max_norm"),
        (nn.Embedding(3, 2, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (nn.Embedding(3, 2, sparse=True), "sparse"),
        (nn.InstanceNorm2d(2, track_running_stats=True), "statistics"),
    ],
)
def test_unsupported_models_are_named(model, message):
    with pytest.raises(UnsupportedLayerError, match=message):
        with_clipping(model, p=2)


class Twice(nn.Module):
    """One layer called twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(self.layer(x))


class Outside(nn.Module):
    """A weight used by its layer and by another operation: tied input and output embeddings."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 3)

    def forward(self, x):
        return {"logits": [self.table(x) @ self.table.weight.t()]}


def test_a_parameter_used_outside_of_its_layer_is_refused():
    with pytest.raises(UnsupportedLayerError, match=r"'table.weight' is used outside .* TBackward"):
        check_single_use(with_clipping(Outside(), p=1), torch.zeros(2, 3, dtype=torch.int64))


def test_check_single_use():
    with pytest.raises(UnsupportedLayerError, match="layer is used 2 times"):
        check_single_use(with_clipping(Twice(), p=1), torch.zeros(2, 3))
    model = with_clipping(nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.Linear(3, 3)), p=1)
    state = torch.random.get_rng_state()
    check_single_use(model, torch.zeros(2, 3))
    assert torch.equal(state, torch.random.get_rng_state())
    assert not any(m._forward_pre_hooks for m in model.modules())
    check_single_use(model, torch.zeros(0, 3))


class Rows(nn.Module):
    """A dense layer on the positions of records [B, T, 3], all at once or time before records."""

    def __init__(self, axis: str):
        super().__init__()
        self.axis = axis
        self.dense = nn.Linear(3, 2)

    def forward(self, x):
        if self.axis == "both":
            return self.dense(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1)
        return self.dense(x.transpose(0, 1)).mean(0)


@pytest.mark.parametrize("axis", ["both", "time"])
@pytest.mark.parametrize(("records", "times"), [(1, 2), (2, 2), (3, 2), (1, 3), (3, 3), (0, 2)])
def test_layers_whose_rows_are_not_records_are_refused(axis, records, times):
    model = with_clipping(Rows(axis), p=2)
    with pytest.raises(UnsupportedLayerError, match=r"dense gets \d+ rows for"):
        check_single_use(model, torch.zeros(records, times, 3))


def test_bad_arguments():
    x, weight = torch.zeros(2, 3), torch.zeros(4, 3)
    with pytest.raises(ValueError, match="p must"):
        clipped_linear(x, weight, clip=torch.tensor(1.0), p=3)
    with pytest.raises(ValueError, match="x must"):
        clipped_linear(x[0], weight, clip=torch.tensor(1.0))
    with pytest.raises(ValueError, match="0-d"):
        clipped_linear(x, weight, clip=torch.ones(2))
    with pytest.raises(ValueError, match="x must"):
        clipped_conv2d(x, weight, clip=torch.tensor(1.0))


def test_the_factor_covers_the_error_of_the_norm_and_a_negative_clip_silences():
    """A norm that is too small by its whole error bound still leads to at most the clip norm."""
    slack = 2.0**-12
    needed = GradientsNeeded(p=1, x=False, weight=True, bias=True, counts=False)
    norm = torch.linspace(1.01, 3, 200, dtype=torch.float64)[None]
    every = torch.ones(1, 200, dtype=torch.bool)
    for clip, most in ((1.0, 1.0), (-1.0, 0.0), (math.nan, 0.0)):
        rule = ClipRule(needed, torch.tensor([clip]).double(), every, None)
        factor, _ = factors_and_counts(norm, None, every, rule, slack)
        assert bool((factor * norm * (1 + slack) <= most).all())
        assert bool((factor * norm >= most * (1 - 2 * slack)).all())
