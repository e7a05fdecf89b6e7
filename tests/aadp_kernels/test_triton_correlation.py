"""Noise of earlier steps drawn again by the Triton kernels: sums of their own draws, bit by bit."""

import math

import pytest
import torch

from aadp_kernels import Correlation, Layout, NoiseKey, clip_sum_noise, privatize_, sample_noise
from aadp_kernels.contract import DrawnAgain, Noise

pytest.importorskip("triton")
from aadp_kernels._triton import _device, backend, privatize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
D = (1.0, -0.9, -0.25, 0.3)
LAYOUT = Layout.build([torch.empty(9, 70), torch.empty(11)], [0, 1])
SCALE = [0.3, 0.7]


@pytest.fixture(autouse=True)
def fewer_tiles(monkeypatch):
    """The interpreter takes its time for a tile, not for its elements."""
    if DEVICE == "cpu":
        monkeypatch.setattr(privatize, "TILES", dict.fromkeys(privatize.TILES, 1024))


def noise(count, *, step, rng, seed=3, impl="triton", **options):
    address = {"mechanism": "gaussian", "scale": 1.0, "dtype": torch.float64, "device": DEVICE}
    key = NoiseKey.from_seed(seed, rng)
    return sample_noise((count,), key=key, step=step, impl=impl, **(address | options))


def by_definition(count, step, coefficients, **options):
    """Products and sums rounded one after another; those of the fast form are float32."""
    kind = torch.float32 if options.get("form") == "fast" else torch.float64
    total = None
    for back, d in enumerate(coefficients[: step + 1]):
        term = noise(count, step=step - back, **options).to(kind)
        total = term if total is None else total + torch.tensor(d, dtype=kind) * term
    return total.double()


def assert_meets(found, wanted, form):
    """The same bits; on a device the fast form may fuse a product and a sum."""
    if form == "wide" or DEVICE == "cpu":
        assert torch.equal(found, wanted)
    else:
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)


FORMS = ["wide", pytest.param("fast", marks=pytest.mark.slow)]
RNGS = ["philox10", pytest.param("chacha8", marks=pytest.mark.slow)]
CASES = [("wide", "philox10", 3, torch.float32), ("fast", "chacha8", 2, torch.float64)]
ALL = [
    (form, rng, 4, dtype)
    for form in ("wide", "fast")
    for rng in ("philox10", "chacha8")
    for dtype in (torch.float64, torch.bfloat16)
]
MARKED = [*CASES, *(pytest.param(*c, marks=pytest.mark.slow) for c in ALL if c not in CASES)]


@pytest.mark.parametrize(("form", "rng", "bands", "dtype"), MARKED)
def test_it_is_the_sum_of_the_noise_of_several_steps(form, rng, bands, dtype):
    """A narrower dtype has more blocks of Philox in a row."""
    where = {"layer": 2, "client": 5, "offset": 77, "form": form, "rng": rng}
    among, eps = Correlation(D[:bands]), torch.finfo(dtype).eps
    found = noise(700, step=7, correlation=among, dtype=dtype, **where)
    assert_meets(found, by_definition(700, 7, D[:bands], **where).to(dtype), form)
    specified = noise(700, step=7, correlation=among, impl="torch", **where)
    bound = 16 * eps + (1e-14 if form == "wide" else 1e-4)
    assert torch.allclose(found.double(), specified, rtol=0, atol=bound)


@pytest.mark.parametrize(("step", "bands"), [(0, 1), (2, 3)])
def test_before_the_first_step_there_is_nothing(step, bands):
    found = noise(64, step=step, rng="philox10", correlation=Correlation(D))
    assert torch.equal(found, by_definition(64, step, D[:bands], rng="philox10"))


@pytest.mark.parametrize("rng", RNGS)
def test_earlier_releases_may_have_keys_and_steps_of_their_own(rng):
    earlier = ((NoiseKey.from_seed(8, rng), 40), (NoiseKey.from_seed(9, rng), 2))
    found = noise(64, step=5, rng=rng, correlation=Correlation(D, earlier))
    wanted = noise(64, step=5, rng=rng)
    for d, seed, step in zip(D[1:], (8, 9), (40, 2), strict=False):
        wanted = wanted + d * noise(64, step=step, rng=rng, seed=seed)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rng", RNGS)
def test_privatize_and_clip_sum_noise_add_it(form, rng):
    scale = torch.tensor(SCALE, dtype=torch.float64, device=DEVICE)
    options = {"layout": LAYOUT, "clip": scale * math.inf, "scale": scale, "step": 4, "p": 2}
    options |= {"mechanism": "gaussian", "correlation": Correlation(D[:2]), "impl": "triton"}
    options |= {"key": NoiseKey.from_seed(3, rng), "form": form}
    own = [
        noise(
            LAYOUT.dims[layer], step=4, layer=layer, client=6, form=form, rng=rng,
            correlation=Correlation(D[:2]),
        )
        for layer in range(2)
    ]  # fmt: skip

    def zeros(*lead):
        return [torch.zeros(*lead, *s, dtype=torch.float64, device=DEVICE) for s in LAYOUT.shapes]

    cohort, secret = zeros(1), {"key": NoiseKey.from_seed(3, rng)}
    privatize_(cohort, clients=torch.tensor([6], device=DEVICE), **options)
    sums, _ = clip_sum_noise(zeros(3), client=6, **(options | secret))
    for layer, size in enumerate(SCALE):
        for found in (cohort[layer][0], sums[layer]):
            assert_meets(found.flatten(), size * own[layer], form)


def test_steps_on_the_device_are_the_same_steps():
    """As `Correlation` gives them for a CUDA graph: a step before the first has coefficient 0."""
    words, clients = (11, 12), torch.tensor([5], device=DEVICE)
    again = (DrawnAgain(-0.9, words, 0),)
    numbers = Noise("philox10", words, "gaussian", "wide", 1, clients, again)
    step = torch.tensor(1, device=DEVICE)
    factors = [torch.tensor(d, dtype=torch.float64, device=DEVICE) for d in (-0.9, 0.0)]
    again = tuple(DrawnAgain(d, words, step * 0) for d in factors)
    tensors = numbers._replace(step=step, again=again)
    found = [backend.scaled_noise(n, (0, 0, 64), 2.0, torch.float64) for n in (numbers, tensors)]
    assert torch.equal(*found)
    tables = _device.source_tensors(tensors, clients.device)
    assert [t.tolist() for t in tables[:3]] == [[1, 0, 0], [*words] * 3, [1.0, -0.9, 0.0]]
    assert tables[3] == 3


def test_without_correlation_there_are_no_tables():
    plain = Noise("philox10", (1, 2), "gaussian", "wide", 7, torch.tensor([5], device=DEVICE))
    step, key, coefficients, bands = _device.source_tensors(plain, plain.clients.device)
    assert (step.item(), key.tolist(), coefficients, bands) == (7, [1, 2], None, None)
