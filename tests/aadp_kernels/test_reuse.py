"""A key refuses to draw the same noise twice."""

import timeit
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from aadp_kernels import (
    FORMS,
    MECHANISMS,
    Layout,
    NoiseKey,
    ReusedNoiseError,
    clip_sum_noise,
    poisson_mask,
    privatize_,
    sample_noise,
)
from aadp_kernels._reuse import UsedNoise

LAYOUT = Layout.build([torch.zeros(5, 3), torch.zeros(7)])


def draw(key, count=8, **kwargs):
    kwargs = {"mechanism": "laplace", "scale": 1.0, "step": 5, **kwargs}
    return sample_noise((count,), key=key, **kwargs)


@pytest.fixture
def key():
    return NoiseKey.from_seed(1)


@pytest.mark.parametrize("change", [{}, {"count": 1, "offset": 7}, {"step": 4}, {"scale": 2.0},
                                    {"step": 4, "offset": 100}, {"impl": "torch"},
                                    {"client": torch.tensor([3, 0]), "count": 2},
                                    {"dtype": torch.float64}])  # fmt: skip
def test_drawn_twice_is_refused(key, change):
    draw(key)
    if "client" in change:
        with pytest.raises(ReusedNoiseError, match="client 0"):
            sample_noise((2, 3), key=key, mechanism="laplace", scale=1.0, step=5,
                         client=change["client"])  # fmt: skip
    else:
        with pytest.raises(ReusedNoiseError, match="layer 0 must be released once"):
            draw(key, **change)
    assert issubclass(ReusedNoiseError, ValueError)


def test_everything_else_is_allowed(key):
    draw(key, offset=8)
    draw(key)
    draw(key, offset=20)
    draw(key, 4, offset=16)
    for other in (dict(client=1), dict(layer=1), dict(mechanism="gaussian"), dict(form="fast"),
                  dict(form="grid"), dict(step=6)):  # fmt: skip
        draw(key, **other)
    draw(key, scale=0.0)
    draw(key, 0)
    draw(NoiseKey.from_seed(1))
    draw(key.derive("x"))
    assert torch.equal(poisson_mask(9, 0.5, key=key, step=0), poisson_mask(9, 0.5, key=key, step=0))


def test_shards_of_a_step_come_once(key):
    for offset in (40, 0, 80):
        draw(key, 40, offset=offset)
    for offset in (0, 39, 119):
        with pytest.raises(ReusedNoiseError):
            draw(key, 1, offset=offset)
    draw(key, 1, offset=120)
    draw(key, 300, step=6)


def test_a_refused_call_notes_and_draws_nothing(key, monkeypatch):
    layout = {"layout": LAYOUT, "clip": torch.ones(2), "scale": torch.ones(2), "key": key}
    draw(key, 7, layer=1)
    tensors = [torch.zeros(5, 3), torch.zeros(7)]
    with pytest.raises(ReusedNoiseError, match="layer 1"):
        privatize_(tensors, step=5, **layout)
    assert not any(t.any() for t in tensors)
    draw(key, layer=0)
    with pytest.raises(ValueError, match="step"):
        privatize_(tensors, step=-1, **layout)
    privatize_(tensors, step=6, **layout)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_operations_share_what_they_remember(key, mechanism, form):
    draws = {"mechanism": mechanism, "key": key, "form": form}
    layout = {"layout": LAYOUT, "clip": torch.ones(2), "scale": torch.ones(2), "p": 1}
    grads = [torch.zeros(2, 5, 3), torch.zeros(2, 7)]
    running, _ = clip_sum_noise(grads, step=1, last=False, **layout, **draws)
    clip_sum_noise(grads, step=1, accumulate=running, **layout, **draws)
    privatize_([g[0] for g in grads], step=2, **layout, **draws)
    for step in (1, 2):
        for draw_again in (
            lambda step=step: clip_sum_noise(grads, step=step, **layout, **draws),
            lambda step=step: privatize_([g[0] for g in grads], step=step, **layout, **draws),
            lambda step=step: sample_noise((7,), scale=1.0, step=step, layer=1, **draws),
        ):
            with pytest.raises(ReusedNoiseError):
                draw_again()


def test_only_layers_with_noise_are_noted(key):
    x = [torch.zeros(5, 3), torch.zeros(7)]
    privatize_(
        x, layout=LAYOUT, clip=torch.ones(2), scale=torch.tensor([0.0, 1.0]), key=key, step=5
    )
    draw(key, layer=0)
    with pytest.raises(ReusedNoiseError):
        draw(key, layer=1)


def test_a_client_twice_in_a_cohort_is_refused(key):
    with pytest.raises(ReusedNoiseError, match="every id once"):
        sample_noise((3, 2), mechanism="laplace", scale=1.0, key=key, step=0,
                     client=torch.tensor([4, 1, 4]))  # fmt: skip


def test_clients_may_be_at_different_steps():
    used, layer = UsedNoise(), [(0, 0, 10)]
    used.claim("x", 9, [1], layer)
    used.claim("x", 4, [2, 3], layer)
    used.claim("x", 4, [4], layer)
    for step, clients in ((4, [5, 3]), (3, [2]), (8, [7, 1])):
        with pytest.raises(ReusedNoiseError):
            used.claim("x", step, clients, layer)
    used.claim("x", 4, [5, 7], layer)
    used.claim("x", 10, [1, 2, 3, 5], layer)


def test_memory_is_one_entry_a_stream():
    used = UsedNoise()
    for step in range(50):
        for offset in range(0, 100, 10):
            used.claim("x", step, range(20), [(0, offset, 10), (1, offset, 10)])
    assert len(used._waiting) < 64
    used._enter()
    streams = used._streams.values()
    assert [len(s.last) for s in streams] == [20, 20]
    assert {entry for s in streams for entry in s.last.values()} == {(49, ((0, 100),))}


def test_one_of_many_threads_draws():
    used = UsedNoise()

    def claim(_):
        try:
            used.claim("x", 3, range(50), [(layer, 0, 10) for layer in range(6)])
        except ReusedNoiseError:
            return 0
        return 1

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(claim, range(200))) == 1


def test_a_cohort_costs_little():
    used, layers = UsedNoise(), [(layer, 0, 1000) for layer in range(6)]
    steps = iter(range(10**6))
    best = min(
        timeit.repeat(
            lambda: used.claim("x", next(steps), range(100), layers), number=20, repeat=20
        )
    )
    assert best / 20 < 5e-4


@pytest.mark.parametrize("name", ["client", "layer"])
@pytest.mark.parametrize("kind", [np.array, torch.tensor, np.int64])
def test_a_number_of_another_type_is_the_same_number(name, kind):
    key = NoiseKey.from_seed(0)

    def draw(step, number):
        if isinstance(number, torch.Tensor) and name == "client":
            number = number[None]
        shape = (1, 3) if isinstance(number, torch.Tensor) and name == "client" else (3,)
        return sample_noise(shape, mechanism="laplace", scale=1.0, key=key, step=step,
                            **{name: number})  # fmt: skip

    first = draw(1, kind(3))
    for again in (kind(3), 3):
        with pytest.raises(ReusedNoiseError):
            draw(1, again)
    assert not torch.equal(draw(2, 3).flatten(), first.flatten())
    draw(2, 4)


@pytest.mark.parametrize("later", ["elements", "clients", "mechanism"])
def test_a_later_step_of_something_else_leaves_what_waits(later):
    """Claims are entered late, and a step stands for the last one of the same elements alone."""
    used, segments = UsedNoise(), ((0, 0, 10),)
    used.claim("a", 1, [0], segments)
    used.claim(
        "b" if later == "mechanism" else "a", 2, [1] if later == "clients" else [0],
        ((1, 0, 10),) if later == "elements" else segments,
    )  # fmt: skip
    with pytest.raises(ReusedNoiseError):
        used.claim("a", 1, [0], segments)


def test_steps_of_the_same_elements_wait_as_one():
    used, segments = UsedNoise(), ((0, 0, 10), (1, 0, 5))
    for step in range(40):
        used.claim("a", step, [0, 3], segments)
    assert len(used._waiting) == 1
    for step in (39, 5):
        with pytest.raises(ReusedNoiseError):
            used.claim("a", step, [3], ((1, 2, 1),))
    used.claim("a", 40, [0, 3], segments)
