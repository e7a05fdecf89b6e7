#!/usr/bin/env bash
# opacus 1.6.0: per-sample gradients of EmbeddingBag (hooks, the default) count a token that stands
# several times in a sample's bag once, without an error.
#
# Packages:  opacus==1.6.0, torch==2.13.0 (CPU)
# Input:     GradSampleModule around nn.EmbeddingBag(mode="sum"), called with tokens and offsets; one
#            bag holds a token twice, another three times.
# Expected:  grad_sample[i] is the gradient of the loss of sample i alone: a token's row has the
#            gradient of the bag as often as the token stands in it.
# Seen:      each row has it once; bags without repetition are exact.
# Why here:  bags of words repeat their words. Norms come out too small, so what is clipped and trained
#            is not the network's gradient (sums stay within the clip norm). Our adapter refuses the
#            layer in this mode by name.
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
from torch import nn

torch.manual_seed(0)
bags = [[0, 1, 2], [3, 3, 1], [2, 2, 2]]
tokens, offsets = torch.tensor(sum(bags, [])), torch.tensor([0, 3, 6])
layer = nn.EmbeddingBag(5, 4, mode="sum")
alone = []
for bag in bags:
    layer.zero_grad()
    layer(torch.tensor(bag), torch.tensor([0])).square().sum().backward()
    alone.append(layer.weight.grad.clone())
layer.zero_grad()
GradSampleModule(layer, loss_reduction="sum")(tokens, offsets).square().sum().backward()
seen = layer.weight.grad_sample
expected_once = [torch.stack([g / max(1, bag.count(t)) for t, g in enumerate(grad)])
                 for bag, grad in zip(bags, alone)]
for bag, have, want, once in zip(bags, seen, alone, expected_once):
    print(bag, "relative error", f"{float((have - want).norm() / want.norm()):.2g}",
          "counted once" if torch.allclose(have, once, atol=1e-5) else "otherwise")
errors = [float((h - w).norm() / w.norm()) for h, w in zip(seen, alone)]
once = all(torch.allclose(h, o, atol=1e-5) for h, o in zip(seen, expected_once))
sys.exit(not (once and errors[0] < 1e-5 and min(errors[1:]) > 0.1))
PYTHON
