"""Noise scales compose to one mechanism with the multiplier asked for."""

import math

import pytest
import torch

from aadp_kernels import noise_scales, sensitivity, vote_noise

CLIP = torch.tensor([[0.5, 2.0, 1e-3], [1.0, 7.0, 3.0]])
SHARES = torch.tensor([[0.2, 0.3, 0.5], [0.98, 0.01, 0.01]])


@pytest.mark.parametrize("adjacency", ["zero_out", "replace_one"])
@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
def test_scales_compose(mechanism, adjacency):
    multiplier = torch.tensor([1.5, 4.0])
    scale = noise_scales(
        CLIP, SHARES, mechanism=mechanism, noise_multiplier=multiplier, adjacency=adjacency
    )
    ratio = sensitivity(CLIP, adjacency=adjacency) / scale
    total = ratio.square().sum(-1).rsqrt() if mechanism == "gaussian" else 1 / ratio.sum(-1)
    torch.testing.assert_close(total, multiplier.double(), rtol=1e-6, atol=0)
    assert (total >= multiplier.double() * (1 - 1e-12)).all()


def test_sensitivity_doubles_under_replacement():
    assert torch.equal(sensitivity(CLIP, adjacency="zero_out"), CLIP.double())
    assert torch.equal(sensitivity(CLIP, adjacency="replace_one"), 2 * CLIP.double())


def test_zero_multiplier_means_no_noise_even_unclipped():
    clip = torch.tensor([math.inf, 1.0])
    arguments = {"mechanism": "gaussian", "adjacency": "zero_out"}
    scale = noise_scales(clip, torch.tensor([0.5, 0.5]), noise_multiplier=0.0, **arguments)
    assert torch.equal(scale, torch.zeros(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="clip must be finite"):
        noise_scales(clip, torch.tensor([0.5, 0.5]), noise_multiplier=1.0, **arguments)
    with pytest.raises(ValueError, match="noise_multiplier"):
        noise_scales(clip, torch.tensor([0.5, 0.5]), noise_multiplier=-1.0, **arguments)


@pytest.mark.parametrize("shares", [[0.5, 0.6], [1.0, 0.0], [-0.1, 0.5], [0.5, math.nan]])
def test_bad_shares(shares):
    with pytest.raises(ValueError, match="shares"):
        noise_scales(
            torch.ones(2), torch.tensor(shares), mechanism="laplace", noise_multiplier=1.0,
            adjacency="zero_out",
        )  # fmt: skip


@pytest.mark.parametrize(("adjacency", "vote"), [("zero_out", 0.5), ("replace_one", 1.0)])
@pytest.mark.parametrize("num_layers", [1, 4])
def test_votes_and_sums_compose_to_the_total(adjacency, vote, num_layers):
    arguments = {"num_layers": num_layers, "vote_share": 0.05, "adjacency": adjacency}
    z, sigma = vote_noise(3.0, mechanism="gaussian", **arguments)
    assert 1 / z**2 + num_layers * (vote / sigma) ** 2 == pytest.approx(1 / 9)
    lam, beta = vote_noise(3.0, mechanism="laplace", **arguments)
    assert 1 / lam + num_layers * vote / beta == pytest.approx(1 / 3)
    assert vote_noise(0.0, mechanism="gaussian", **arguments) == (0.0, 0.0)


@pytest.mark.parametrize("vote_share", [0.0, 1.0, math.nan])
def test_bad_vote_share(vote_share):
    with pytest.raises(ValueError, match="vote_share"):
        vote_noise(1.0, num_layers=2, vote_share=vote_share, mechanism="gaussian",
                   adjacency="zero_out")  # fmt: skip
