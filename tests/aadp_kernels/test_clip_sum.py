"""clip_sum_noise against plain float64 arithmetic."""

import math

import pytest
import torch

from aadp_kernels import Layout, NoiseKey, clip_sum_noise, sample_noise
from aadp_kernels._torch import clip_sum as spec
from tests.late import stats

LAYOUT = Layout.build(
    {"a.weight": torch.zeros(5, 3), "a.bias": torch.zeros(5), "b.weight": torch.zeros(7)}
)
CLIP = torch.tensor([4.0, 2.0])


def key():
    """The same key, which remembers nothing."""
    return NoiseKey.from_seed(12)


def gradients(batch=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, *s, generator=generator) for s in LAYOUT.shapes]


def expected_sum(grads, clip, p, mask):
    result = [None] * len(grads)
    for layer, members in enumerate(LAYOUT.members):
        joint = torch.cat([grads[i].double().flatten(1) for i in members], 1)
        finite = torch.isfinite(joint).all(1)
        norm = joint.norm(p=p, dim=1)
        factor = torch.where(norm > clip[layer], clip[layer] / norm, 1.0) * mask
        for i in members:
            kept = grads[i].double()[finite & (mask > 0)]
            result[i] = torch.einsum("b,b...->...", factor[finite & (mask > 0)], kept)
    return result


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("clip", [CLIP, CLIP * 100, torch.tensor([math.inf, 0.0])])
@pytest.mark.parametrize("rows", [1, 1 << 22])
def test_equals_the_formula(p, clip, rows, monkeypatch):
    monkeypatch.setattr(spec, "_ELEMENTS_AT_ONCE", rows)
    grads = gradients()
    grads[0][2, 1, 1] = math.nan
    grads[2][5, 0] = math.inf
    grads[1][7] = math.nan
    mask = torch.tensor([1, 1, 1, 0, 1, 1, 1, 0, 1.0])
    votes_at = torch.tensor([16.0, 5.0])
    sums, stat = clip_sum_noise(
        grads, layout=LAYOUT, clip=clip, scale=None, p=p, mask=mask, votes_at=votes_at
    )
    for got, want in zip(sums, expected_sum(grads, clip.double(), p, mask), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
        assert got.dtype == torch.float32
    assert stat.nonfinite.tolist() == [1, 1]
    for layer, members in enumerate(LAYOUT.members):
        joint = torch.cat([grads[i].double().flatten(1) for i in members], 1)
        live = (mask > 0) & torch.isfinite(joint).all(1)
        ballots = (joint.abs().sum(1) <= votes_at[layer]).double() - 0.5
        assert stat.votes[layer] == ballots[live].sum()
        assert stat.clipped[layer] == (joint.norm(p=p, dim=1) > clip[layer])[live].sum()


@pytest.mark.parametrize("impl", ["torch", "auto"])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("rows", [1, 1 << 22])
def test_a_weight_multiplies_what_is_clipped_and_nothing_else(impl, p, rows, monkeypatch):
    monkeypatch.setattr(spec, "_ELEMENTS_AT_ONCE", rows)
    grads, given = gradients(), {"layout": LAYOUT, "scale": None, "p": p, "impl": impl}
    mask = torch.tensor([1, 1, 1, 0, 1, 1, 1, 0, 1.0])
    weights = torch.tensor([1, 0.5, 0, 0.25, 0.3, 1, 2.0**-60, 1, 0.7], dtype=torch.float64)
    for clip in (CLIP, CLIP * 100):
        given |= {"clip": clip, "mask": mask, "votes_at": torch.tensor([12.0, 5.0])}
        sums, stat = clip_sum_noise(grads, weights=weights, **given)
        _, plain = clip_sum_noise(grads, **given)
        wanted = expected_sum(grads, clip.double(), p, mask * weights)
        for got, want in zip(sums, wanted, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
        for name in ("l1_norm", "votes", "clipped", "nonfinite"):
            assert torch.equal(getattr(stat, name), getattr(plain, name)), name


def test_micro_batches_equal_one_batch_and_noise_goes_in_once():
    grads = gradients(10)
    arguments = {"layout": LAYOUT, "clip": CLIP, "scale": torch.tensor([0.5, 0.0]), "p": 2,
                 "step": 3, "client": 8}  # fmt: skip
    whole, _ = clip_sum_noise(grads, key=key(), **arguments)
    micro = key()
    running = None
    for start in (0, 4, 8):
        part = [g[start : start + 4] for g in grads]
        running, _ = clip_sum_noise(part, accumulate=running, last=start == 8, key=micro,
                                    **arguments)  # fmt: skip
        assert running[0].dtype == (torch.float32 if start == 8 else torch.float64)
    for a, b in zip(whole, running, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    clean, _ = clip_sum_noise(grads, **{**arguments, "scale": None})
    noise = sample_noise((20,), mechanism="gaussian", scale=0.5, key=key(), step=3, client=8)
    torch.testing.assert_close(whole[0] - clean[0], noise[:15].view(5, 3), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole[1] - clean[1], noise[15:], rtol=1e-5, atol=1e-5)
    assert torch.equal(whole[2], clean[2])


@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize("p", [1, 2])
def test_a_record_never_contributes_more_than_the_clip_norm(p, weight):
    for seed in range(200):
        grads = [g.double() for g in gradients(1, seed)]
        weights = torch.tensor([weight], dtype=torch.float64)
        sums, stat = clip_sum_noise(
            grads, layout=LAYOUT, clip=CLIP, scale=None, p=p, weights=weights
        )
        for layer, members in enumerate(LAYOUT.members):
            values = torch.cat([sums[i].flatten() for i in members]).tolist()
            power = math.fsum(abs(v) ** p for v in values)
            assert (power if p == 1 else math.sqrt(power)) <= weight * CLIP[layer].item()
            if not stat.clipped[layer]:
                assert all(torch.equal(sums[i], weight * grads[i][0]) for i in members)


def test_empty_batch_and_all_padding():
    for grads, mask in ((gradients(0), None), (gradients(4), torch.zeros(4))):
        sums, stat = clip_sum_noise(
            grads, layout=LAYOUT, clip=CLIP, scale=None, p=2, mask=mask, votes_at=torch.ones(2)
        )
        assert all(torch.equal(s, torch.zeros_like(s)) for s in sums)
        assert stat.votes.tolist() == [0, 0]
        assert stat.clipped.tolist() == stat.nonfinite.tolist() == [0, 0]


@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
def test_noise_has_the_scale_and_no_other(mechanism):
    grads = [torch.zeros(2, 20_000)]
    sums, _ = clip_sum_noise(
        grads, layout=Layout.build([grads[0][0]]), clip=torch.ones(1), scale=torch.tensor([0.7]),
        p=1, mechanism=mechanism, key=key(),
    )  # fmt: skip
    law = stats.norm if mechanism == "gaussian" else stats.laplace
    assert stats.kstest(sums[0].numpy(), law(scale=0.7).cdf).pvalue > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(sums[0].numpy(), law(scale=0.7 * wrong).cdf).pvalue < 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip": torch.ones(3)}, "clip"),
        ({"clip": torch.tensor([1.0, -1.0])}, "clip"),
        ({"scale": torch.tensor([1.0, math.nan])}, "scale"),
        ({"scale": torch.ones(2), "key": None}, "key"),
        ({"scale": torch.ones(2), "mechanism": "laplace"}, "p must be 1"),
        ({"mask": torch.ones(3)}, "mask"),
        ({"weights": torch.ones(3)}, "weights"),
        ({"weights": torch.full((9,), 1.5)}, "weights"),
        ({"weights": torch.full((9,), math.nan)}, "weights"),
        ({"weights": torch.ones(9), "form": "grid", "scale": torch.ones(2)}, "weights"),
        ({"accumulate": gradients(1)}, "accumulate"),
        ({"p": 0}, "p must"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"layout": LAYOUT, "clip": CLIP, "scale": None, "p": 2, "key": key(), **change}
    with pytest.raises(ValueError, match=message):
        clip_sum_noise(gradients(), **arguments)
