#!/usr/bin/env bash
# torch 2.13.0: torch.func.functional_call leaves the tensors it was given in the module, for good,
# where one sub-module stands under two names.
#
# Package:   torch==2.13.0 (CPU)
# Input:     a module that holds one nn.Linear under two names, as networks that use a block twice do;
#            parameters by the names that named_parameters() gives.
# Expected:  the module is as before when the call has returned.
# Seen:      module.weight is the tensor of the call, no longer a Parameter and no longer trained;
#            tie_weights=False restores it. Two sub-modules that share a weight are restored.
# Why here:  federated simulators and per-sample gradient code evaluate many clients' or records'
#            weights by functional_call on one module: the weights of the client that came last stay in
#            the global model, without clipping and without noise. fl_lightning does not rely on it.
# Upstream:  pytorch/pytorch#164759, open when this was written.
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
from torch import nn
from torch.func import functional_call


def restored(net: nn.Module, **options: bool) -> bool:
    """Whether the first weight is the same object after a call with zeros in its place."""
    weight = net[0].weight
    client = {name: torch.zeros_like(value) for name, value in net.named_parameters()}
    functional_call(net, client, (torch.ones(1, 2),), **options)
    return net[0].weight is weight


def one_layer_twice() -> nn.Module:
    layer = nn.Linear(2, 2)
    return nn.Sequential(layer, nn.Tanh(), layer)


def one_weight_twice() -> nn.Module:
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Tanh(), nn.Linear(2, 2, bias=False))
    net[2].weight = net[0].weight
    return net


found = {
    "one layer under two names": restored(one_layer_twice()),
    "one layer under two names, tie_weights=False": restored(one_layer_twice(), tie_weights=False),
    "two layers that share a weight": restored(one_weight_twice()),
}
for case, same in found.items():
    print(f"{case}: {'restored' if same else 'keeps the weights of the call'}")
sys.exit(list(found.values()) != [False, True, True])
PYTHON
