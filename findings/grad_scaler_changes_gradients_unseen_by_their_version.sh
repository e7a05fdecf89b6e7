#!/usr/bin/env bash
# torch 2.13.0: torch.amp.GradScaler.unscale_ writes into gradients without raising their version
# counter, unlike every other operation in place.
#
# Package:   torch==2.13.0 (CPU)
# Input:     a gradient, GradScaler(device="cpu").unscale_(optimizer), then gradient._version.
# Expected:  the values change and so does _version, as after grad.mul_ or torch._foreach_mul_.
# Seen:      the values change, _version stays.
# Why here:  a private optimizer must notice when somebody changes a clipped sum before noise is added
#            (a factor above 1 passes the clip norm). Autograd's version counter notices clip_grad_norm_
#            and hand-written scaling; this one passes. aadp_kernels refuses GradScaler.step by name;
#            unscale_ followed by optimizer.step() divides the sum, which can only shorten it if the
#            scale is at least 1.
#
# Exits 0 while torch behaves so, 1 once it does not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch

weight = torch.nn.Parameter(torch.ones(3))
optimizer = torch.optim.SGD([weight], lr=0.1)
scaler = torch.amp.GradScaler(device="cpu", init_scale=4.0)


def raised(change) -> tuple[bool, bool]:
    """Whether the gradient's values and its version differ after `change`."""
    optimizer.zero_grad()
    scaler.scale(weight.sum()).backward()
    values, version = weight.grad.clone(), weight.grad._version
    change()
    return not torch.equal(values, weight.grad), weight.grad._version > version


found = {
    "torch._foreach_mul_": raised(lambda: torch._foreach_mul_([weight.grad], 0.25)),
    "clip_grad_norm_": raised(lambda: torch.nn.utils.clip_grad_norm_([weight], 1.0)),
    "GradScaler.unscale_": raised(lambda: scaler.unscale_(optimizer)),
}
for name, (values, version) in found.items():
    print(f"{name}: values {'change' if values else 'stay'}, version {'raised' if version else 'stays'}")
sys.exit(list(found.values()) != [(True, True), (True, True), (True, False)])
PYTHON
