"""Without compiled kernels a clipped gradient has the norm C, and never more, on every device."""

import pytest
import torch

from aadp_kernels import clipped_linear
from aadp_kernels.clip_in_backward import clip, matrix_rules, other_rules

CLIP = torch.tensor(0.5)


@pytest.fixture(params=["cpu", "accelerator"])
def plain_torch(request, monkeypatch):
    """No compiled kernels; sums and their error bound of a CPU, or of an accelerator."""
    for module in (clip, matrix_rules, other_rules):
        monkeypatch.setattr(module, "record_kernels", lambda _: None)
    if request.param == "accelerator":
        monkeypatch.setattr(clip, "_wide_sums", clip.run_sums)
        for module in (matrix_rules, other_rules):
            monkeypatch.setattr(module, "slack_of", accelerator_slack)


def accelerator_slack(columns, like, norms=1):
    return clip.slack_of(columns, torch.empty(0, dtype=like.dtype, device="meta"), norms)


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(784, 64), (4096, 10), (17, 3)])
@pytest.mark.parametrize("positions", [(), (5,)])
def test_the_norm_is_the_clip_norm_and_not_more(positions, shape, dtype, p):
    torch.manual_seed(0)
    for _ in range(10):
        x = torch.randn(1, *positions, shape[0]).to(dtype)
        weight = torch.randn(shape[1], shape[0], requires_grad=True)
        out = clipped_linear(x.float(), weight, None, clip=CLIP, p=p)
        out.backward(torch.randn_like(out).to(dtype).float())
        norm = weight.grad.double().norm(p).item()
        assert 0.5 * (1 - 4e-6) <= norm <= 0.5


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("columns", [0, 1, 15, 16, 17, 784, 5000])
def test_sums_of_runs_keep_to_their_bound(columns, p):
    x = torch.randn(2, 3, 4, columns, generator=torch.Generator().manual_seed(columns))
    exact = x.double().abs().pow(p).sum((-1, -2))
    norms = clip.run_sums(x, p).pow(1 / p)
    assert norms.dtype == torch.float64
    bound = accelerator_slack(columns, x)
    assert bound <= 2e-6
    assert ((norms - exact.pow(1 / p)).abs() <= bound * norms).all()
    wide = clip._wide_sums(x, p)
    torch.testing.assert_close(wide, exact, rtol=1e-14, atol=0)
