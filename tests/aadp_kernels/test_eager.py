"""Public operations inside torch.compile and torch.func: noise is fresh, or the call is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.func import grad, vmap

from aadp_kernels import (
    Layout,
    NoiseKey,
    ReusedNoiseError,
    clip_sum_noise,
    layer_norms,
    poisson_mask,
    privatize_,
    sample_noise,
)

LAYOUT = Layout.build([torch.zeros(5, 3), torch.zeros(70)])
CLIP, SCALE = torch.tensor([1.0, 0.5]), torch.tensor([0.1, 0.2])


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def key(seed: int = 0) -> NoiseKey:
    return NoiseKey.from_seed(seed)


def tensors(lead: tuple[int, ...] = ()) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*lead, *shape, generator=generator) for shape in LAYOUT.shapes]


UPDATE, RECORDS = tensors(), tensors((4,))


def privatized(key: NoiseKey, step: Any) -> list[torch.Tensor]:
    x = [t * 1 for t in UPDATE]
    privatize_(x, layout=LAYOUT, clip=CLIP, scale=SCALE, key=key, step=step)
    return x


def summed(key: NoiseKey, step: Any) -> list[torch.Tensor]:
    x = [t * 2 for t in RECORDS]
    return clip_sum_noise(x, layout=LAYOUT, clip=CLIP, scale=SCALE, p=2, key=key, step=step)[0]


def noise(key: NoiseKey, step: Any) -> list[torch.Tensor]:
    return [1 + sample_noise((4, 500), mechanism="gaussian", scale=0.5, key=key, step=step)]


def coins(key: NoiseKey, step: Any) -> list[torch.Tensor]:
    return [~poisson_mask(500, 0.5, key=key, step=step)]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("function", [privatized, summed, noise, coins])
def test_a_compiled_loop_draws_fresh_noise_in_every_step(
    function: Callable[..., list[torch.Tensor]], backend: str
) -> None:
    compiled, secret, seen = torch.compile(function, backend=backend), key(), []
    for step in (3, 4, torch.tensor(5), torch.tensor(6), *range(7, 12)):
        found = compiled(secret, step)
        assert all(map(torch.equal, found, function(key(), step)))
        seen.append(found[-1])
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    assert not torch.equal(compiled(key(1), 3)[-1], seen[0])


@pytest.mark.parametrize("function", [privatized, summed, noise])
def test_compiled_code_cannot_reuse_noise(function: Callable[..., Any]) -> None:
    compiled, secret = torch.compile(function, backend="eager"), key()
    compiled(secret, 4)
    for again in (compiled, function):
        with pytest.raises(ReusedNoiseError):
            again(secret, 4)
    compiled(secret, 5)


@pytest.mark.parametrize("function", [privatized, summed, noise, coins])
def test_no_graph_takes_them_whole(function: Callable[..., Any]) -> None:
    with pytest.raises(torch._dynamo.exc.Unsupported, match="drawn anew in every call"):
        torch.compile(function, backend="eager", fullgraph=True)(key(), 0)


def test_nothing_inside_is_compiled() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, example: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    def twice(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        z = sample_noise(y.shape, mechanism="laplace", scale=1.0, key=key(), step=0, impl="torch")
        return y + z

    torch.compile(twice, backend=count)(torch.ones(100))
    assert len(graphs) <= 2


@pytest.mark.parametrize("transform", [vmap, lambda f: grad(lambda x: f(x[0])[0].sum())])
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("privatize_", lambda _: privatized(key(), 1)),
        ("clip_sum_noise", lambda _: summed(key(), 1)),
        ("sample_noise", lambda _: noise(key(), 1)),
        ("poisson_mask", lambda _: coins(key(), 1)),
        ("layer_norms", lambda _: layer_norms(UPDATE, layout=LAYOUT)),
    ],
)
def test_transforms_are_refused(name: str, call: Callable[..., Any], transform: Any) -> None:
    with pytest.raises(RuntimeError, match=f"{name} cannot run inside a torch.func transform"):
        transform(call)(torch.ones(3, 2))


def test_results_have_no_gradient_and_errors_leave_gradients_enabled() -> None:
    x = [t.requires_grad_() for t in tensors((4,))]
    sums, _ = clip_sum_noise(x, layout=LAYOUT, clip=CLIP, scale=SCALE, p=2, key=key())
    assert not any(t.requires_grad for t in sums)
    assert not layer_norms(x, layout=LAYOUT, cohort=True).requires_grad
    with pytest.raises(ValueError, match="clip"):
        clip_sum_noise(x, layout=LAYOUT, clip=-CLIP, scale=SCALE, p=2, key=key())
    assert torch.is_grad_enabled()


def test_the_compiler_is_not_imported() -> None:
    code = (
        "import sys, torch, aadp_kernels as k; "
        "k.sample_noise((9,), mechanism='laplace', scale=1.0, key=k.NoiseKey.random(), step=0); "
        "k.layer_norms([torch.ones(3)], layout=k.Layout.build([torch.ones(3)])); "
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
