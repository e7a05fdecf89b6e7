"""The numba implementation has the bits of the torch specification."""

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aadp_kernels import Layout, NoiseKey, _cpu, _dispatch, poisson_mask, privatize_
from tests.aadp_kernels.cpu_inputs import BOTH, close, key, noise, same_bits

numba = pytest.importorskip("numba")
_jit = pytest.importorskip("aadp_kernels._cpu._jit")
LAYOUT = Layout.build(
    {
        "a.weight": torch.zeros(37, 3),
        "a.bias": torch.zeros(5),
        "b.weight": torch.zeros(700),
        "empty": torch.zeros(0, 4),
        "c": torch.zeros(()),
    }
)


def updates(*lead, dtypes=(torch.float32,) * 5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn((*lead, *s), generator=generator) for s in LAYOUT.shapes]
    return [t.to(d) for t, d in zip(draws, dtypes, strict=True)]


def run(impl, tensors, clip=math.inf, scale=0.3, **kwargs):
    kwargs = {"key": key(), "step": 2, "p": 1, **kwargs}
    clip, scale = (torch.as_tensor(v, dtype=torch.float64) for v in (clip, scale))
    clip, scale = (v if v.dim() else v.expand(4) for v in (clip, scale))
    return privatize_(tensors, layout=LAYOUT, clip=clip, scale=scale, impl=impl, **kwargs)


def both(tensors, **kwargs):
    results, once = [], kwargs.get("key")
    for impl in BOTH:
        if once is not None:
            kwargs["key"] = NoiseKey.from_bytes(once._secret, once.rng)
        own = [t.clone() for t in tensors]
        results.append((own, run(impl, own, **kwargs)))
    (expected, stat), (got, fast) = results
    for a, b in zip(fast, stat, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    return expected, got


MIXED = (torch.bfloat16, torch.float64, torch.float16, torch.float32, torch.float32)


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 5, (torch.float64,) * 5, MIXED])
@pytest.mark.parametrize(("p", "mechanism"), [(1, "laplace"), (1, "gaussian"), (2, "gaussian")])
@pytest.mark.parametrize("rng", ["philox10", "chacha8", "chacha20"])
def test_privatize_below_the_clip_norm_has_the_bits_of_the_specification(rng, p, mechanism, dtypes):
    scale = torch.tensor([[0.2, 0.0, 1.0, 3.0], [0.0, 0.0, 0.5, 0.1], [0.1, 0.0, 1.0, 1.0]])
    clip = torch.tensor([[math.inf] * 4, [30.0, 9.0, 1.0, 0.1], [1.0, math.inf, 0.0, 0.7]])
    clients = torch.tensor([5, (1 << 32) - 1, 0])
    for reference in (None, updates(seed=1), updates(seed=1, dtypes=(torch.float64,) * 5)):
        expected, got = both(
            updates(3, dtypes=dtypes), clip=clip, scale=scale, clients=clients, p=p,
            reference=reference, mechanism=mechanism, key=key(rng),
            votes_at=torch.tensor([90.0, 560.0, 0.0, 0.5]),
        )  # fmt: skip
        assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", [1, 2])
def test_privatize_clips_to_the_last_bits_of_the_specification(p, dtype):
    tensors = updates(4, dtypes=(dtype,) * 5)
    clip = torch.tensor([[1.0, 2.0, 0.0, 0.1], [0.5, 600.0, 0.0, 9.0], [3.0] * 4, [0.0] * 4])
    clients = torch.arange(4)
    expected, got = both(tensors, clip=clip, scale=0.0, clients=clients, p=p)
    for a, b in zip(got, expected, strict=True):
        assert same_bits(a, b)
    for layer, members in enumerate(LAYOUT.members):
        rows = torch.cat([got[i].double().reshape(4, -1) for i in members], 1)
        if rows.shape[1]:
            assert (rows.norm(p=p, dim=1) <= clip[:, layer]).all()
    assert all(same_bits(a[1], b[1]) for a, b in zip(got[2:3], tensors[2:3], strict=True))


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 5, (torch.float64,) * 5, MIXED])
@pytest.mark.parametrize(("p", "mechanism"), [(1, "laplace"), (1, "gaussian"), (2, "gaussian")])
@pytest.mark.parametrize("rng", ["philox10", "chacha8", "chacha20"])
def test_fast_privatize_is_close_to_the_specification(rng, p, mechanism, dtypes):
    scale = torch.tensor([[0.2, 0.0, 1.0, 3.0], [0.0, 0.0, 0.5, 0.1], [0.1, 0.0, 1.0, 1.0]])
    clip = torch.tensor([[math.inf, 0.01, 1.0, 3.0], [0.0, 0.1, 1e-40, 1e9], [1.0, 2.0, 1e9, 0.3]])
    for reference in (None, updates(seed=1), updates(seed=1, dtypes=(torch.float64,) * 5)):
        kwargs = {"scale": scale, "clip": clip, "clients": torch.tensor([5, (1 << 32) - 1, 0]),
                  "p": p, "mechanism": mechanism, "form": "fast"}  # fmt: skip
        tensors = updates(3, dtypes=dtypes)
        # Where the noise is nothing, the value has to be exact to its own ulp.
        expected, got = both(tensors, key=key(rng), reference=reference, **kwargs)
        for i, (a, b) in enumerate(zip(got, expected, strict=True)):
            size = scale[:, LAYOUT.layer_of[i]].reshape(-1, *(1,) * (a.dim() - 1)).double()
            assert close(a, b, size.expand(a.shape)), (i, reference)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 300), st.floats(1e-30, 1e30), st.floats(1e-20, 1e20), st.sampled_from([1, 2]),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.sampled_from(["wide", "fast"]), st.booleans(), st.integers(0, 1 << 30),
)  # fmt: skip
def test_the_bound_holds(n, size, clip, p, dtype, form, moved, seed):
    generator = torch.Generator().manual_seed(seed)
    update = (torch.randn(n, generator=generator, dtype=torch.float64) * size).to(dtype)
    reference = [torch.randn(n, generator=generator, dtype=dtype) * size] if moved else None
    bound = torch.tensor([clip], dtype=torch.float64)
    privatize_([update], layout=Layout.build([update]), clip=bound, scale=torch.zeros(1), p=p,
               key=None, step=0, reference=reference, form=form, impl="numba")  # fmt: skip
    total = math.fsum(abs(v) ** p for v in update.double().tolist())
    assert total <= clip**p * (1 + (1e-15 if p == 2 else 0))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 600), st.floats(1e-6, 1.0), st.sampled_from([1, 2]), st.integers(0, 1 << 30))
def test_the_bound_holds_beneath_fast_noise(n, clip, p, seed):
    """The noise is the same with and without the update, and its float32 sum is exact here."""
    generator = torch.Generator().manual_seed(seed)
    update = torch.randn(n, generator=generator) * 3
    kept = update.clone()
    privatize_([kept], layout=Layout.build([kept]), clip=torch.tensor([clip]), p=p, form="fast",
               mechanism="gaussian", key=key(), step=0, scale=torch.tensor([1e-30]),
               impl="numba")  # fmt: skip
    total = math.fsum(abs(v) ** p for v in kept.double().tolist()) ** (1 / p)
    assert total <= clip
    assert total >= clip * (1 - 1e-5) or update.double().norm(p=p) <= clip


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_zeroed(bad):
    tensors = updates(3)
    tensors[1][0, 2] = bad
    tensors[2][1, 699] = bad
    expected, got = both(tensors, clip=1e9, clients=torch.arange(3), votes_at=torch.full((4,), 1e9))
    assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))
    assert all(torch.isfinite(t).all() for t in got)
    quiet, silent = both(tensors, scale=0.0, key=None, clients=torch.arange(3))
    assert all(same_bits(a, b) for a, b in zip(silent, quiet, strict=True))
    assert not silent[0][0].any()


def test_strided_tensors_and_out():
    tensors = [t.t() if t.dim() == 2 else t for t in updates()]
    layout = Layout.build(tensors, groups=[0, 0, 1, 2, 3])
    reference = [t.flip(0) if t.dim() else t for t in tensors]
    results = []
    for impl in BOTH:
        wide = torch.full((2 * 700,), math.nan)
        out = [torch.empty_like(t) for t in tensors]
        out[2], out[1] = wide[::2], torch.empty(5, dtype=torch.float64)
        privatize_(tensors, layout=layout, clip=torch.full((4,), math.inf), scale=torch.ones(4),
                   key=key(), step=0, reference=reference, out=out, impl=impl)  # fmt: skip
        assert torch.isnan(wide[1::2]).all()
        results.append(out)
    assert all(
        same_bits(*map(torch.Tensor.contiguous, pair)) for pair in zip(*results, strict=True)
    )


def test_edges_of_the_cohort():
    empty = run("numba", updates(0), clients=torch.zeros(0, dtype=torch.int64))
    assert empty.votes.shape == (0, 4)
    expected, got = both(updates())
    assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))


def test_rows_and_threads_change_nothing():
    size, threads = 200_003, torch.get_num_threads()
    layout = Layout.build([torch.zeros(size)])
    rows = torch.randn(3, size, generator=torch.Generator().manual_seed(0))
    results = []
    try:
        for count, piece in ((1, 3), (3, 3), (2, 1)):
            torch.set_num_threads(count)
            own = rows.clone()
            norms = [
                privatize_([own[k : k + piece]], layout=layout, clip=torch.tensor([1e4]),
                           scale=torch.tensor([0.1]), key=key(), step=0, impl="numba",
                           clients=torch.arange(k, k + piece)).l1_norm
                for k in range(0, 3, piece)
            ]  # fmt: skip
            results.append((own, torch.cat([n for n in norms if n is not None])))
    finally:
        torch.set_num_threads(threads)
    for own, norms in results[1:]:
        assert same_bits(own, results[0][0])
        assert same_bits(norms, results[0][1])


def test_in_place_writes_are_seen_by_autograd_and_allowed_in_inference_mode():
    tensors = updates()
    before = [t._version for t in tensors]
    run("numba", tensors)
    assert all(t._version > v for t, v in zip(tensors, before, strict=True) if t.numel())
    with torch.inference_mode():
        run("numba", updates())


def test_calls_from_several_threads():
    expected = noise("torch", (50_000,))
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: noise("numba", (50_000,)), range(8)))
    assert all(same_bits(r, expected) for r in results)


def test_impl_is_checked():
    with pytest.raises(
        ValueError, match="impl must be one of auto, torch, numba, triton, got 'fast'"
    ):
        noise("fast", (3,))
    with pytest.raises(ValueError, match="impl"):
        poisson_mask(3, 0.5, key=key(), step=0, impl="fast")
    with pytest.raises(ValueError, match="impl"):
        run("fast", updates())
    with pytest.raises(ValueError, match="'numba' for tensors on meta"):
        noise("numba", (3,), device="meta")


def test_auto_takes_numba_for_what_is_large_and_lies_on_a_cpu(monkeypatch):
    def choose(impl, device="cpu", elements=_dispatch.AUTO_ELEMENTS, operation="noise"):
        return _dispatch.choose(impl, operation, device=torch.device(device), elements=elements)

    assert choose("auto") == "numba"
    assert choose("auto", elements=_dispatch.AUTO_ELEMENTS - 1) == "torch"
    assert choose("auto", device="meta") == "torch"
    assert choose("torch") == "torch"
    monkeypatch.setattr(_cpu, "_import_error", lambda: "No module named 'numba'")
    assert choose("auto") == "torch"
    with pytest.raises(ValueError, match="'numba' without the package"):
        choose("numba")


def test_kernels_compile_where_no_cache_can_be_written(monkeypatch):
    njit = numba.njit

    def locked(**options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    monkeypatch.setattr(numba, "njit", locked)
    assert _jit.jit(lambda x: x + 1)(2) == 3


def test_no_wide_kernel_contracts_floating_point():
    from aadp_kernels._cpu import sum_and_write, transform

    lines = numba.float64[::1]
    small = (numba.int32[::1], lines)
    piece = (numba.int64[:, ::1], *(numba.int64,) * 5, numba.bool_,
             numba.types.NumberClass(numba.float64), numba.float64, numba.int64,
             numba.float64)  # fmt: skip
    for kernel, signature in (
        (transform._wide_gaussian, small), (transform._wide_laplace, small),
        (sum_and_write._write_tensor, piece),
    ):  # fmt: skip
        assert not kernel.targetoptions.get("fastmath")
        fresh = numba.njit(nogil=True, error_model="numpy")(kernel.py_func)
        fresh.compile(signature)
        (assembly,) = fresh.inspect_asm().values()
        assert "mul" in assembly
        assert "fmadd" not in assembly
        assert "fnmadd" not in assembly


CODE = {
    "import is lazy": """
        sample_noise((8,), mechanism="laplace", scale=1.0, key=key, step=0)
        assert "numba" not in sys.modules
        sample_noise((80,), mechanism="laplace", scale=1.0, key=key, step=1)
        assert "numba" in sys.modules
    """,
    "without numba": """
        sys.modules["numba"] = None
        assert sample_noise((80,), mechanism="laplace", scale=1.0, key=key, step=0).shape == (80,)
        try:
            sample_noise((80,), mechanism="laplace", scale=1.0, key=key, step=1, impl="numba")
        except ValueError as error:
            assert "without the package numba" in str(error)
        else:
            raise AssertionError
    """,
    "fork after threads": """
        torch.set_num_threads(2)
        draw = lambda: sample_noise((300_000,), mechanism="laplace", scale=1.0, step=0,
                                    key=NoiseKey.from_seed(1))
        before = draw()
        child = os.fork()
        if child == 0:
            os._exit(0 if before.numpy().tobytes() == draw().numpy().tobytes() else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    """,
}


@pytest.mark.parametrize("name", CODE)
def test_in_a_process_of_its_own(name):
    lines = ["import os, sys, torch", "from aadp_kernels import NoiseKey, sample_noise",
             "key = NoiseKey.from_seed(1)"]  # fmt: skip
    indent = len(CODE[name].split("\n")[1]) - len(CODE[name].split("\n")[1].lstrip())
    lines += [line[indent:] for line in CODE[name].split("\n")[1:]]
    result = subprocess.run([sys.executable, "-c", "\n".join(lines)], env=dict(os.environ),
                            capture_output=True, text=True, timeout=120)  # fmt: skip
    assert result.returncode == 0, result.stderr
