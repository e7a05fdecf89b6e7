"""Clip-in-backward in use: a transformer, autocast, torch.compile, frozen parameters."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from aadp_kernels import (
    Bias,
    UnsupportedLayerError,
    check_single_use,
    clipped_bias,
    clipped_conv1d,
    clipped_conv2d,
    clipped_embedding,
    clipped_group_norm,
    clipped_layer_norm,
    clipped_linear,
    clipped_rms_norm,
    with_clipping,
)

# torch.compile itself makes an instance of an autograd.Function and warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

# (operation of x, weight and options, a batch, the weight's shape)
OPERATIONS = {
    "linear": (clipped_linear, (5, 4), (3, 4)),
    "linear, sequence": (clipped_linear, (5, 2, 4), (3, 4)),
    "conv1d": (clipped_conv1d, (5, 2, 6), (3, 2, 3)),
    "conv2d": (clipped_conv2d, (5, 2, 4, 4), (3, 2, 3, 3)),
    "embedding": (clipped_embedding, (5, 6), (4, 3)),
    "layer norm": (lambda x, w, **k: clipped_layer_norm(x, (4,), w, **k), (5, 3, 4), (4,)),
    "rms norm": (lambda x, w, **k: clipped_rms_norm(x, (4,), w, **k), (5, 3, 4), (4,)),
    "group norm": (lambda x, w, **k: clipped_group_norm(x, 2, w, **k), (5, 4, 3), (4,)),
    "bias": (clipped_bias, (5, 3, 4), (4,)),
}


def operands(name):
    torch.manual_seed(0)
    operation, size, shape = OPERATIONS[name]
    x = torch.randint(0, 4, size) if name == "embedding" else torch.randn(size)
    return operation, x, torch.randn(shape)


@pytest.mark.parametrize("name", OPERATIONS)
def test_compile_through_plain_autograd_clips(name):
    operation, x, start = operands(name)
    torch._dynamo.reset()

    def loss(weight, clip, mask):
        return (torch.tanh(operation(x, weight, clip=clip, mask=mask, p=1)) * 100).sum()

    mask = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])
    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        weight = start.clone().requires_grad_()
        function(weight, torch.tensor(1e-2), mask).backward()
        results.append(weight.grad)
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-7)
    assert results[0].abs().sum() <= 4.01e-2
    assert results[0].any()


@pytest.mark.parametrize("name", OPERATIONS)
def test_compile_inside_functorch_is_refused(name):
    operation, x, start = operands(name)
    torch._dynamo.reset()

    def loss(weight):
        return (operation(x, weight, clip=torch.tensor(1e-3), p=2) * 100).sum()

    with pytest.raises(Exception, match="cannot be used inside a torch"):
        torch.compile(grad(loss), backend="eager", fullgraph=True)(start)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_compile_with_the_default_backend_clips():
    operation, x, start = operands("conv2d")
    compiled = torch.compile(
        lambda w: (operation(x, w, clip=torch.tensor(1e-2), p=2) * 100).sum(), fullgraph=True
    )
    weight = start.clone().requires_grad_()
    compiled(weight).backward()
    assert 1e-3 <= weight.grad.norm() <= 5.01e-2


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPERATIONS)
def test_autocast(name, dtype, mapped):
    """Parameters in float32, activations in half precision: clipped in float32."""
    operation, x, weight = operands(name)
    clip = torch.tensor(0.3)

    def loss(weight, x, clip):
        with torch.autocast("cpu", dtype=dtype):
            y = operation(x, weight, clip=clip, p=2)
            return torch.tanh(y.float()).sum()

    def exact(weight, x):
        wide = weight.double(), x.double() if x.is_floating_point() else x
        return torch.tanh(operation(wide[1], wide[0], clip=torch.tensor(math.inf))).sum()

    if mapped:
        result = vmap(grad(loss), (None, 0, 0))(weight, x[None], clip[None])[0]
    else:
        leaf = weight.clone().requires_grad_()
        loss(leaf, x, clip).backward()
        result = leaf.grad
    rows = torch.stack([grad(exact)(weight, one[None]) for one in x]).double()
    factor = (clip / rows.flatten(1).norm(dim=1)).clamp(max=1)
    assert result.dtype == torch.float32
    want = torch.einsum("b,b...->...", factor, rows)
    torch.testing.assert_close(result.double(), want, rtol=4e-2, atol=2e-2)
    assert (factor < 1).any()


def test_autocast_clips_backward_run_inside_of_it():
    x, weight = torch.randn(6, 3, 4), torch.randn(5, 4, requires_grad=True)
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = clipped_linear(x, weight, clip=torch.tensor(1.0), mask=torch.arange(6) == 0)
        y.float().sum().backward()
    # bfloat16 sums would be off by 1e-2.
    assert abs(weight.grad.norm() - 1) < 1e-4
    assert x.grad.dtype == torch.float32


class Block(nn.Module):
    """A small transformer: embedding, positions, attention out of linear layers, norms, MLP."""

    def __init__(self, tokens=9, width=8, heads=2, length=5):
        super().__init__()
        self.heads = heads
        self.table = nn.Embedding(tokens, width, padding_idx=0)
        self.positions = Bias(length, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.RMSNorm(width)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 12), nn.Linear(12, width)
        self.head = nn.Linear(width, tokens)
        nn.init.normal_(self.positions.bias)

    def forward(self, x):
        h = self.positions(self.table(x))
        q, k, v = self.qkv(self.norm1(h)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        hidden = torch.full(q.shape[-2:-1] * 2, -torch.inf).triu(1)
        seen = torch.softmax(q @ k.transpose(-1, -2) * 0.5 + hidden, -1) @ v
        h = h + self.mix(seen.transpose(1, 2).flatten(2))
        h = h + self.down(F.gelu(self.up(self.norm2(h))))
        return self.head(h)


def next_token_loss(logits, x):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten(), reduction="sum")


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("mapped", [False, True])
def test_transformer(p, mapped):
    torch.manual_seed(0)
    model = Block().double()
    x = torch.randint(0, 9, (3, 4, 5))
    params = {n: q.detach() for n, q in model.named_parameters()}
    clipped = with_clipping(model, p=p)
    check_single_use(clipped, x[0])
    clip = torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64)
    names = {n.rpartition(".")[0] for n in params}

    def loss(q, x, clip, model=clipped):
        own = {f"{n}.clip_norm": clip for n in names} if model is clipped else {}
        return next_token_loss(functional_call(model, {**q, **own}, (x,)), x)

    if mapped:
        sums = vmap(grad(loss), in_dims=(None, 0, 0))(params, x, clip)
    else:
        rows = [grad(loss)(params, x[k], clip[k]) for k in range(3)]
        sums = {n: torch.stack([row[n] for row in rows]) for n in params}
    for k in range(3):
        single = vmap(grad(lambda q, a: loss(q, a[None], None, model)), in_dims=(None, 0))
        records = single(params, x[k])
        for name in names:
            own = [n for n in params if n.rpartition(".")[0] == name]
            joint = torch.cat([records[n].flatten(1) for n in own], 1)
            factor = (clip[k] / joint.norm(p=p, dim=1)).clamp(max=1)
            for n in own:
                want = torch.einsum("b,b...->...", factor, records[n])
                torch.testing.assert_close(sums[n][k], want, rtol=1e-7, atol=1e-10)


def test_frozen_parameters_do_not_count_in_the_norm():
    x, weight = torch.randn(1, 4), torch.randn(3, 4)
    bias = torch.randn(3, requires_grad=True)
    y = clipped_linear(x, weight, bias, clip=torch.tensor(1.0), p=1)
    (0.3 * y).sum().backward()
    torch.testing.assert_close(bias.grad, torch.full((3,), 0.3))
    weight.requires_grad_()
    bias.grad = None
    (0.3 * clipped_linear(x, weight, bias, clip=torch.tensor(1.0), p=1)).sum().backward()
    norm = weight.grad.abs().sum() + bias.grad.abs().sum()
    torch.testing.assert_close(norm, torch.tensor(1.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [(5, 3), (5, 4, 3)])
@pytest.mark.parametrize("wrt", ["x", "weight"])
def test_a_second_derivative_is_refused(shape, wrt):
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    y = clipped_linear(x, weight, clip=torch.tensor(0.5))
    of = {"x": x, "weight": weight}[wrt]
    (first,) = torch.autograd.grad(y.square().sum(), of, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()


def test_a_second_derivative_is_refused_under_functorch():
    x, weight = torch.randn(2, 4), torch.randn(3, 4)

    def norm(weight):
        gradient = grad(lambda w: (clipped_linear(x, w, clip=torch.tensor(1.0)) ** 2).sum())
        return gradient(weight).sum()

    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        grad(norm)(weight)


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(0, 5), length=st.integers(1, 9), channels=st.integers(1, 3),
    kernel=st.integers(1, 3), stride=st.integers(1, 3), padding=st.integers(0, 2),
    dilation=st.integers(1, 2), groups=st.integers(1, 2), p=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_convolutions_of_any_shape(
    batch, length, channels, kernel, stride, padding, dilation, groups, p, seed
):
    torch.manual_seed(seed)
    length += dilation * (kernel - 1)
    x = torch.randn(batch, channels * groups, length, dtype=torch.float64)
    weight = torch.randn(2 * groups, channels, kernel, dtype=torch.float64)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}

    def loss(weight, x):
        return torch.tanh(F.conv1d(x, weight, **options)).sum()

    leaf = weight.clone().requires_grad_()
    y = clipped_conv1d(x, leaf, clip=torch.tensor(0.7, dtype=torch.float64), p=p, **options)
    torch.tanh(y).sum().backward()
    want = torch.zeros_like(weight)
    for one in x:
        row = grad(loss)(weight, one[None])
        want += row * min(1.0, 0.7 / max(float(row.norm(p=p)), 0.1))
    torch.testing.assert_close(leaf.grad, want, rtol=1e-7, atol=1e-9)


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(0, 4), length=st.integers(0, 7), tokens=st.integers(1, 4),
    padded=st.booleans(), p=st.sampled_from([1, 2]), seed=st.integers(0, 99),
)  # fmt: skip
def test_embeddings_of_any_shape(batch, length, tokens, padded, p, seed):
    torch.manual_seed(seed)
    x = torch.randint(0, tokens, (batch, length))
    weight = torch.randn(tokens, 3, dtype=torch.float64, requires_grad=True)
    slope = torch.randn(batch, length, 3, dtype=torch.float64)
    clip, padding = torch.tensor(1.5), 0 if padded else None
    (clipped_embedding(x, weight, padding_idx=padding, clip=clip, p=p) * slope).sum().backward()
    one_hot = F.one_hot(x, tokens).double()
    if padded:
        one_hot[..., 0] = 0
    rows = torch.einsum("btv,btd->bvd", one_hot, slope)
    factor = (1.5 / rows.reshape(batch, 3 * tokens).norm(p=p, dim=1)).clamp(max=1)
    torch.testing.assert_close(
        weight.grad, torch.einsum("b,bvd->vd", factor, rows), rtol=1e-7, atol=1e-9
    )


def test_bad_arguments():
    one = torch.tensor(1.0)
    with pytest.raises(ValueError, match="x must be int32"):
        clipped_embedding(torch.zeros(2, 3), torch.zeros(4, 3), clip=one)
    with pytest.raises(ValueError, match="padding_idx"):
        clipped_embedding(torch.tensor([0]), torch.zeros(4, 3), padding_idx=4, clip=one)
    with pytest.raises(ValueError, match="length"):
        clipped_conv1d(torch.zeros(2, 3), torch.zeros(4, 3, 1), clip=one)
    for operation in (clipped_layer_norm, clipped_rms_norm):
        with pytest.raises(ValueError, match="normalized_shape"):
            operation(torch.zeros(2, 3), (2, 3), torch.zeros(2, 3), clip=one)
    with pytest.raises(ValueError, match="channels"):
        clipped_group_norm(torch.zeros(2), 1, torch.zeros(2), clip=one)
    for shape in ((2, 3), (4,)):
        with pytest.raises(ValueError, match="broadcast"):
            clipped_bias(torch.zeros(5, 3), torch.zeros(shape), clip=one)


@pytest.mark.parametrize("batch", [1, 5])
def test_a_checkpointed_forward_keeps_the_clip_norm_it_was_given(batch):
    """What is computed again in backward finds the buffers as they are outside functional_call."""
    torch.manual_seed(0)
    model = with_clipping(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), p=2)
    first, second = model

    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return second(checkpoint(first, x, use_reentrant=False))

    given = {
        f"model.{i}.clip_norm": torch.tensor(0.01) for i in range(2)
    } | {f"model.{i}.mask": torch.ones(batch) for i in range(2)}  # fmt: skip
    output = functional_call(Again(), given, (torch.randn(batch, 4),))
    output.square().sum().backward()
    for layer in model:
        joint = torch.cat([p.grad.flatten() for p in layer.parameters()])
        assert 0 < float(joint.norm()) <= batch * 0.01 * (1 + 1e-6)


def test_frozen_batch_norm_in_eval_mode_is_an_affine_map_for_good():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))
    model[1].running_mean.normal_()
    with pytest.raises(UnsupportedLayerError, match="frozen and in eval mode"):
        with_clipping(model, p=2)
    model[1].requires_grad_(False)
    with pytest.raises(UnsupportedLayerError, match="frozen and in eval mode"):
        with_clipping(model, p=2)
    model[1].eval()
    clipped = with_clipping(model, p=2).train()
    x, before = torch.randn(5, 1, 4, 4), model[1].running_mean.clone()
    torch.testing.assert_close(clipped(x), model(x))
    assert torch.equal(clipped[1].running_mean, before)
    model[1].track_running_stats, model[1].running_mean = False, None
    with pytest.raises(UnsupportedLayerError, match="frozen and in eval mode"):
        with_clipping(model, p=2)


def test_frozen_layers_of_any_kind_may_be_used_in_any_way():
    torch.manual_seed(0)

    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True).requires_grad_(False)
            self.twice = nn.Linear(4, 4).requires_grad_(False)
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            x = self.twice(torch.tanh(self.twice(x))) @ self.twice.weight
            return self.head(self.attention(x, x, x)[0][:, 0])

    clipped, x = with_clipping(Body(), p=2), torch.randn(3, 5, 4)
    check_single_use(clipped, x)
    clipped(x).sum().backward()
    assert clipped.twice.weight.grad is None
    assert clipped.head.weight.grad is not None
