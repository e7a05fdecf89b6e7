"""The operators: opcheck, torch.compile without graph breaks, vmap, and no secret in a graph."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from aadp_kernels import (
    Layout,
    NoiseKey,
    _ops,
    clip_sum_noise,
    layer_norms,
    poisson_mask,
    privatize_,
    sample_noise,
)

LAYOUT = Layout.build([torch.zeros(5, 3), torch.zeros(3), torch.zeros(70)], [0, 0, 1])
LAYERS = list(LAYOUT.layer_of)
CLIP, SCALE = torch.tensor([1.0, 0.5]), torch.tensor([0.1, 0.2])
BACKENDS = [
    "eager",
    "aot_eager",
    pytest.param("inductor", marks=pytest.mark.slow),
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def key(seed: int = 0, rng: str = "chacha20") -> NoiseKey:
    return NoiseKey.from_seed(seed, rng)


def words(rng: str = "chacha20") -> torch.Tensor:
    return torch.tensor(key(0, rng).words)


def tensors(seed: int = 0, lead: tuple[int, ...] = ()) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*lead, *shape, generator=generator) for shape in LAYOUT.shapes]


def flat(value: Any) -> list[torch.Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]


def same(a: Any, b: Any) -> bool:
    """The same tensors, bit for bit."""
    return len(flat(a)) == len(flat(b)) > 0 and all(map(torch.equal, flat(a), flat(b)))


def privatized(x: list[torch.Tensor], key: NoiseKey, step: Any, **options: Any) -> Any:
    arguments = {"layout": LAYOUT, "clip": CLIP, "scale": SCALE, "key": key, "step": step}
    stats = privatize_(x, **(arguments | options))
    return stats, options.get("out", x)


def summed(x: list[torch.Tensor], key: NoiseKey, step: Any, **options: Any) -> Any:
    arguments = {"layout": LAYOUT, "clip": CLIP, "scale": SCALE, "p": 2, "key": key, "step": step}
    return clip_sum_noise(x, **(arguments | options))


def noise(key: NoiseKey, step: Any, **options: Any) -> torch.Tensor:
    arguments = {"mechanism": "gaussian", "scale": 0.5, "layer": 2, "offset": 3, "client": 7}
    return sample_noise((4, 5), key=key, step=step, **(arguments | options))


def in_micro_batches(x: list[torch.Tensor], key: NoiseKey, step: Any, first: Any) -> Any:
    sums, _ = summed(first, key, step, scale=None, last=False)
    return summed(x, key, step, accumulate=sums)


def grid_micro_batches(x: list[torch.Tensor], key: NoiseKey, step: Any, first: Any) -> Any:
    counts, _ = summed(first, key, step, form="grid", last=False)
    return summed(x, key, step, accumulate=counts, form="grid")


# What is called, and its inputs, made anew for each call: (x, options).
CASES: dict[str, tuple[Callable[..., Any], Callable[[], tuple[list[torch.Tensor], dict]]]] = {
    "privatize": (privatized, lambda: (tensors(), {})),
    "privatize out": (
        privatized,
        lambda: (
            tensors(),
            {
                "out": tensors(1), "reference": tensors(2), "p": 2, "mechanism": "gaussian",
                "impl": "torch",
            },
        ),
    ),
    "privatize cohort": (
        privatized,
        lambda: (tensors(lead=(3,)), {"clients": torch.tensor([4, 9, 2]), "votes_at": CLIP}),
    ),
    "clip_sum": (summed, lambda: (tensors(lead=(6,)), {})),
    "clip_sum votes": (
        summed,
        lambda: (
            tensors(lead=(6,)), {"votes_at": CLIP, "mask": torch.arange(6) % 2, "client": 5},
        ),
    ),
    "clip_sum micro-batches": (
        in_micro_batches,
        lambda: (tensors(lead=(6,)), {"first": tensors(1, (2,))}),
    ),
    "clip_sum fast": (
        summed,
        lambda: (tensors(lead=(6,)), {"p": 1, "mechanism": "laplace", "form": "fast"}),
    ),
    "privatize grid": (privatized, lambda: (tensors(), {"form": "grid"})),
    "clip_sum grid": (
        grid_micro_batches,
        lambda: (tensors(lead=(6,)), {"first": tensors(1, (2,))}),
    ),
    "noise": (lambda x, key, step: noise(key, step), lambda: ([], {})),
    "noise tensors": (
        lambda x, key, step: noise(
            key, step, scale=x[0], client=torch.tensor([1, 2, 3, 4]), dtype=torch.float64
        ),
        lambda: ([tensors(lead=(4,))[2][:, :5].abs()], {}),
    ),
    "coins": (
        lambda x, key, step: (
            poisson_mask(50, 0.5, key=key, step=step),
            poisson_mask(50, [0.5, 0.1], key=key, step=step, client=torch.tensor([1, 2])),
        ),
        lambda: ([], {}),
    ),
}  # fmt: skip


def call(function: Any, case: str, key: NoiseKey, step: Any) -> Any:
    x, options = CASES[case][1]()
    return function(x, key, step, **options)


# inductor imports parts of torch that torch itself calls deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_compiled_without_graph_breaks_and_not_frozen(case: str, backend: str) -> None:
    """One compilation serves every key and step, and gives eager's bits for each."""
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a compiler")
    function = CASES[case][0]
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    results = []
    for seed in (0, 1):
        for step in (3, 4):
            result = call(compiled, case, key(seed), torch.tensor(step))
            assert same(result, call(function, case, key(seed), torch.tensor(step)))
            noisy = (
                result[0] if isinstance(result, tuple) and function is not privatized else result
            )
            results.append(flat(noisy)[-1])
    assert counter.frame_count == 1
    assert all(not torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_python_step_is_not_frozen(backend: str) -> None:
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(noise, backend=counter, fullgraph=True)
    for step in range(1, 8):
        assert same(compiled(key(), step), noise(key(), step))
    assert counter.frame_count <= 2


def test_in_place_writes_reach_the_caller() -> None:
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        x, y = tensors(), tensors()
        torch.compile(privatized, backend=backend, fullgraph=True)(x, key(), 1)
        privatized(y, key(), 1)
        assert same(x, y)
        assert not same(x, tensors())
        parameters = [torch.nn.Parameter(t) for t in tensors()]
        torch.compile(privatized, backend=backend, fullgraph=True)(parameters, key(), 1)
        assert same([p.detach() for p in parameters], y)


def test_inputs_with_a_gradient_give_results_without() -> None:
    x = [t.requires_grad_() for t in tensors(lead=(4,))]
    sums = torch.compile(summed, backend="aot_eager", fullgraph=True)(x, key(), 1)[0]
    assert same(sums, summed(x, key(), 1)[0])
    assert not any(t.requires_grad for t in sums)
    found = torch.compile(norms, backend="aot_eager", fullgraph=True)(x, cohort=True)
    assert same(found, norms(x, cohort=True))
    assert not found.requires_grad


def test_accumulated_sums_are_updated_in_place() -> None:
    def add(total: list[torch.Tensor], x: list[torch.Tensor]) -> Any:
        return summed(x, key=None, step=0, scale=None, accumulate=total, last=False)  # type: ignore

    total, eager = (summed(tensors(lead=(2,)), key(), 0, scale=None, last=False)[0] for _ in "ab")
    before = [t.clone() for t in total]
    torch.compile(add, backend="aot_eager", fullgraph=True)(total, tensors(1, (3,)))
    add(eager, tensors(1, (3,)))
    assert same(total, eager)
    assert not same(total, before)


@pytest.mark.parametrize("rng", ["chacha20", "philox10"])
def test_no_secret_is_a_constant_of_a_graph(rng: str) -> None:
    """Neither the code of the graph nor what it holds contains a key word; an input does."""
    graphs: list[torch.fx.GraphModule] = []
    inputs: list[Any] = []

    def spy(graph: torch.fx.GraphModule, example: list[Any]) -> Any:
        graphs.append(graph)
        inputs.extend(example)
        return graph.forward

    for seed, case in enumerate(CASES):
        secret = key(seed, rng)
        torch._dynamo.reset()
        graphs.clear()
        inputs.clear()
        compiled = torch.compile(CASES[case][0], backend=spy, fullgraph=True)
        call(compiled, case, secret, torch.tensor(2))
        (graph,) = graphs
        text = graph.print_readable(print_output=False)
        held = [*graph.buffers(), *graph.parameters()]
        held += [v for v in vars(graph).values() if isinstance(v, torch.Tensor)]
        for word in secret.words:
            assert str(word) not in text
            assert not any(bool((t == word).any()) for t in held)
        assert any(isinstance(t, torch.Tensor) and t is secret.word_tensor for t in inputs)


def test_compiled_code_uses_the_callers_key() -> None:
    """Whatever a NoiseKey remembers of its use, it also remembers of use in compiled code."""
    owner = key()
    assert NoiseKey.from_word_tensor(owner.word_tensor, owner.rng) is owner
    copy = NoiseKey.from_word_tensor(owner.word_tensor.clone(), owner.rng)
    assert copy is not owner
    assert copy.words == owner.words
    assert NoiseKey.from_word_tensor(owner.word_tensor, "chacha8") is not owner


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_cannot_reuse_noise(backend: str) -> None:
    error = pytest.importorskip("aadp_kernels._reuse").ReusedNoiseError
    secret, step = key(), torch.tensor(4)
    compiled = torch.compile(privatized, backend=backend, fullgraph=True)
    compiled(tensors(), secret, step)
    with pytest.raises(error):
        compiled(tensors(1), secret, step)
    with pytest.raises(error):
        privatized(tensors(1), secret, 4)
    compiled(tensors(1), secret, step + 1)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [({"clip": -CLIP}, "clip"), ({"scale": SCALE * torch.inf}, "scale"), ({"key": None}, "key")],
)
def test_wrong_values_raise_when_compiled_code_runs(arguments: Any, match: str) -> None:
    compiled = torch.compile(privatized, backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match=match):
        compiled(tensors(), **({"key": key(), "step": 0} | arguments))
    assert torch.is_grad_enabled()


def test_shapes_that_do_not_fit_the_layout_raise() -> None:
    compiled = torch.compile(privatized, backend="eager")
    with pytest.raises(ValueError, match="shape"):
        compiled([t.t() for t in tensors()], key(), 0)


def test_dynamic_shapes() -> None:
    compiled = torch.compile(summed, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (2, 5, 9):
        x = tensors(lead=(batch,))
        assert same(compiled(x, key(), torch.tensor(1)), summed(x, key(), 1))


PRIVATIZE = (LAYERS, CLIP, SCALE)
TAIL = (torch.tensor(3), "chacha20")
OPERATORS: dict[str, tuple[Any, Callable[[], tuple[Any, ...]]]] = {
    "layer_norms": (_ops.layer_norms, lambda: (tensors(), [], LAYERS, 1, False)),
    "layer_norms cohort": (
        _ops.layer_norms,
        lambda: (tensors(lead=(3,)), tensors(1), LAYERS, 2, True),
    ),
    "privatize_": (
        _ops.privatize_,
        lambda: (
            tensors(), [], [], *PRIVATIZE, None, None, words(), *TAIL, 1, "laplace", "wide", "auto",
        ),
    ),
    "privatize_ cohort": (
        _ops.privatize_,
        lambda: (
            tensors(lead=(2,)), tensors(2, (2,)), tensors(1), *PRIVATIZE, CLIP,
            torch.tensor([4, 9]), words(), *TAIL, 2, "gaussian", "wide", "auto",
        ),
    ),
    "clip_sum_noise": (
        _ops.clip_sum_noise,
        lambda: (
            tensors(lead=(4,)), [], *PRIVATIZE, None, CLIP, torch.tensor(0), words(), *TAIL, 2,
            "gaussian", True, "wide", "auto",
        ),
    ),
    "clip_sum_noise sums": (
        _ops.clip_sum_noise,
        lambda: (
            tensors(lead=(4,)), [t.double() for t in tensors()], LAYERS, CLIP, None,
            torch.ones(4), None, torch.tensor(0), None, torch.tensor(0), "", 2, "gaussian", False,
            "wide", "auto",
        ),
    ),
    "sample_noise": (
        _ops.sample_noise,
        lambda: (
            [3, 4], torch.tensor(0.5), torch.tensor(0), words(), *TAIL, "gaussian", 1, 5,
            torch.float32, torch.device("cpu"), "wide", "auto",
        ),
    ),
    "poisson_mask": (
        _ops.poisson_mask,
        lambda: (
            9, [0.5, 0.2], torch.tensor([1, 2]), words(), *TAIL, torch.device("cpu"), "auto",
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str) -> None:
    operator, arguments = OPERATORS[name]
    outcome = opcheck(operator, arguments())
    assert set(outcome.values()) == {"SUCCESS"}


def test_opcheck_finds_a_wrong_fake() -> None:
    """The check above can fail: an operator that says another dtype is caught."""

    @torch.library.custom_op("aadp_kernels_test::wrong", mutates_args=())
    def wrong(x: torch.Tensor) -> torch.Tensor:
        return x.double()

    wrong.register_fake(lambda x: torch.empty_like(x))
    with pytest.raises(Exception, match=r"dtype|Dtypes"):
        opcheck(wrong, (torch.ones(3),))


def norms(x: list[torch.Tensor], reference: Any = None, cohort: bool = False) -> torch.Tensor:
    return layer_norms(x, layout=LAYOUT, p=2, reference=reference, cohort=cohort)


def test_norms_under_vmap() -> None:
    vmap = torch.func.vmap
    x, reference = tensors(lead=(4,)), tensors(1, (4,))
    assert same(vmap(norms)(x), norms(x, cohort=True))
    assert same(vmap(norms, in_dims=(0, None))(x, tensors(1)), norms(x, tensors(1), cohort=True))
    each = torch.stack([norms([t[i] for t in x], [r[i] for r in reference]) for i in range(4)])
    torch.testing.assert_close(vmap(norms)(x, reference), each, rtol=1e-12, atol=0)
    deep = tensors(lead=(2, 3))
    inner = torch.stack([norms([t[i] for t in deep], cohort=True) for i in range(2)])
    assert same(vmap(lambda y: norms(y, cohort=True))(deep), inner)
    assert same(vmap(vmap(norms))(deep), inner)
    assert same(torch.compile(vmap(norms), backend="aot_eager", fullgraph=True)(x),
                norms(x, cohort=True))  # fmt: skip


def test_noise_under_vmap_is_that_of_its_client() -> None:
    clients = torch.tensor([5, 6, 9])

    def one(client: torch.Tensor, scale: Any) -> torch.Tensor:
        return noise(key(), 1, client=client, scale=scale)

    rows = torch.stack([noise(key(), 1, client=c) for c in (5, 6, 9)])
    assert same(torch.func.vmap(one, in_dims=(0, None))(clients, 0.5), rows)
    scales = torch.tensor([0.5, 1.0, 2.0])
    scaled = torch.stack(
        [noise(key(), 1, client=int(c), scale=s) for c, s in zip(clients, scales, strict=True)]
    )
    assert same(torch.func.vmap(one)(clients, scales), scaled)


def test_sums_under_vmap() -> None:
    x, clients = tensors(lead=(3, 4)), torch.tensor([2, 0, 8])

    def one(rows: list[torch.Tensor], client: torch.Tensor) -> Any:
        return summed(rows, key(), 1, client=client, votes_at=CLIP)

    result = torch.func.vmap(one)(x, clients)
    for i, client in enumerate(clients.tolist()):
        wanted = summed([t[i] for t in x], key(), 1, client=client, votes_at=CLIP)
        assert same([t[i] for t in flat(result)], flat(wanted))

    def bare(rows: list[torch.Tensor]) -> Any:
        return summed(rows, key(), 1, scale=None)[0]

    alone = [summed([t[i] for t in x], key(), 1, scale=None)[0] for i in range(3)]
    assert same(torch.func.vmap(bare)(x), [torch.stack(c) for c in zip(*alone, strict=True)])


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda x, i: privatized([t[0] for t in x], key(), 1), "in place"),
        (lambda x, i: summed(x, key(), 1), "same noise"),
        (lambda x, i: noise(key(), 1, scale=x[2][0, 0].abs()), "same noise"),
        (lambda x, i: noise(key(), i), "one step"),
        (lambda x, i: poisson_mask(3, 0.5, key=key(), step=0, client=i), "clients"),
    ],
)
def test_vmap_refuses_to_repeat_noise(function: Any, match: str) -> None:
    with pytest.raises(RuntimeError, match=match):
        torch.func.vmap(function)(tensors(lead=(3, 2)), torch.arange(3))


def test_eager_calls_do_not_go_through_the_operator() -> None:
    """Neither in time nor in imports: torch.library pulls in the compiler with the first call."""
    code = (
        "import sys, torch, aadp_kernels as k; "
        "k.sample_noise((9,), mechanism='laplace', scale=1.0, key=k.NoiseKey.random(), step=0); "
        "k.layer_norms([torch.ones(3)], layout=k.Layout.build([torch.ones(3)])); "
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    best = 1.0
    for _ in range(200):
        start = time.perf_counter()
        for _ in range(100):
            _ops.tracing()
        best = min(best, (time.perf_counter() - start) / 100)
    assert best < 5e-6


@pytest.mark.gpu
def test_a_cuda_graph_replays_with_the_step_it_is_given() -> None:
    """The step is a tensor that the graph itself advances: no two replays have one noise."""
    device = torch.device("cuda")
    step = torch.zeros((), dtype=torch.int64, device=device)
    x = [t.to(device) for t in tensors()]
    out = [torch.empty_like(t) for t in x]
    secret = key()

    clip, scale = CLIP.to(device), SCALE.to(device)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        privatize_(x, out=out, layout=LAYOUT, clip=clip, scale=scale, key=secret, step=step)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        privatize_(x, out=out, layout=LAYOUT, clip=clip, scale=scale, key=secret, step=step)
        step.add_(1)
    seen = []
    for _ in range(3):
        graph.replay()
        seen.append([t.clone() for t in out])
    for i, a in enumerate(seen):
        eager = [t.to(device) for t in tensors()]
        privatize_(eager, layout=LAYOUT, clip=clip, scale=scale, key=key(), step=i)
        assert same(a, eager)
    assert not same(seen[0], seen[1])
