"""A private step with one norm over all layers, among the benchmarks."""

import pytest
import torch

from bench import dp_step, parity
from bench import steps as private_steps

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["MLP", "transformer"])
def test_flat_clipping_passes_its_gate(name) -> None:
    setup = private_steps.Setup.build(name, 8, CPU)
    kind, level, build = private_steps.sides(setup, ("chacha20",))["ours, flat, wide, chacha20"]
    assert (kind, level) == ("ours", "all")
    dp_step.gate(dp_step.StepRunner(setup, build), level)
    setup.clips["all"] = [1.5 * clip for clip in setup.clips["all"]]
    with pytest.raises(parity.ParityError, match="clipped gradient"):
        dp_step.gate(dp_step.StepRunner(setup, build), level)
