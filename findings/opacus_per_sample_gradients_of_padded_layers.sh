#!/usr/bin/env bash
# opacus 1.6.0: per-sample gradients (hooks, the default) that are not the gradients of the samples,
# without an error, for layers with a padding option.
#
# Packages:  opacus==1.6.0, torch==2.13.0 (CPU)
# Input:     GradSampleModule around nn.Conv2d(padding_mode="circular" | "reflect" | "replicate"),
#            nn.Conv1d(padding_mode="circular") and nn.Embedding(padding_idx=0); ModuleValidator finds
#            nothing to say about any of them.
# Expected:  grad_sample[i] is the gradient of the loss of sample i alone, as for padding_mode="zeros".
# Seen:      the convolutions' differ from it by 20 to 40 % in norm (the input is padded with zeros);
#            the embedding's padding row has a gradient, which torch gives it never.
# Why here:  sums stay within the clip norm, so privacy holds, but what is trained is another network's
#            gradient. A comparison of clipping methods on such layers compares different gradients. Our
#            adapter takes torch.func's gradients for them, or clips in backward.
#
# Exits 0 while opacus behaves so, 1 once it does not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 opacus==1.6.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from opacus.grad_sample import GradSampleModule
from opacus.validators import ModuleValidator
from torch import Tensor, nn

torch.manual_seed(0)


def error(layer: nn.Module, x: Tensor) -> float:
    """Relative error of grad_sample against the gradients of the samples one by one."""
    alone = []
    for i in range(len(x)):
        layer.zero_grad()
        (layer(x[i : i + 1]) + 1).square().sum().backward()
        alone.append(layer.weight.grad.clone())
    layer.zero_grad()
    assert ModuleValidator.validate(layer) == []
    (GradSampleModule(layer, loss_reduction="sum")(x) + 1).square().sum().backward()
    want = torch.stack(alone)
    return float((layer.weight.grad_sample - want).norm() / want.norm())


image, series = torch.randn(3, 2, 5, 5), torch.randn(3, 2, 7)
tokens = torch.tensor([[0, 1, 2], [0, 0, 3], [2, 2, 0]])
right = {"Conv2d, zeros": error(nn.Conv2d(2, 3, 3, padding=1), image)}
wrong = {
    f"Conv2d, {mode}": error(nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode), image)
    for mode in ("circular", "reflect", "replicate")
}
wrong["Conv1d, circular"] = error(
    nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), series
)
right["Embedding"] = error(nn.Embedding(4, 3), tokens)
wrong["Embedding, padding_idx=0"] = error(nn.Embedding(4, 3, padding_idx=0), tokens)
for name, value in (right | wrong).items():
    print(f"{name}: relative error {value:.2g}")
sys.exit(not (max(right.values()) < 1e-5 and min(wrong.values()) > 0.05))
PYTHON
