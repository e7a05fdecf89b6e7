"""Random small networks: every one is refused before it releases anything, or clipped exactly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aadp_kernels.clip_in_backward import watched
from fl_lightning.privacy import clipping
from tests.networks import fuzz
from tests.networks.programs import Program, draw, shrink

QUICK, SLOW = range(100), range(100, 2100)
PLAIN = fuzz.Trial(
    Program("positions", (), "layer", "cross entropy"), fuzz.Setting(), 1, (4, 5), 2**40, 1
)


def with_steps(*names: str, kind: str = "positions") -> fuzz.Trial:
    """A trial of a network of these operations."""
    program = Program(kind, tuple((name, 0) for name in names), "layer", "cross entropy")
    return replace(PLAIN, program=program)


@pytest.mark.parametrize("part", range(4))
def test_every_random_network_is_exact_or_refused(part):
    counts, wrong = fuzz.run(QUICK[part::4], thorough=False)
    assert not wrong, f"{counts}\n{fuzz.report(wrong)}"
    assert counts["invalid"] <= 2, counts
    assert sum(n for what, n in counts.items() if what.startswith("exact")) >= 12, counts


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_every_one_of_two_thousand_random_networks_is_exact_or_refused(part):
    counts, wrong = fuzz.run(SLOW[part::20])
    assert not wrong, f"{counts}\n{fuzz.report(wrong)}"


def test_a_seed_gives_one_program_and_what_it_prints_runs():
    for seed in range(30):
        program = draw(seed)
        assert program == draw(seed)
        network, loss = program.make()
        again, _ = program.make()
        for one, other in zip(network.parameters(), again.parameters(), strict=True):
            assert torch.equal(one, other)
        x = program.records(4, torch.Generator().manual_seed(seed))
        assert loss(network(x), torch.tensor([0, 1, 2, 0])).shape == (4,), program.source()


def test_every_operation_is_drawn():
    from tests.networks.operations import LOSSES, MIXING, ONCE, OTHERWISE

    programs = [draw(seed) for seed in SLOW]
    drawn = {name for program in programs for name, _ in program.steps}
    assert drawn == {operation.name for operation in (*ONCE, *OTHERWISE, *MIXING)}
    assert {program.loss for program in programs} == set(LOSSES)


def test_programs_are_made_as_small_as_they_go():
    program = Program("vector", (("dense", 0), ("PReLU", 1), ("Bias", 2)), "weight", "doubled")
    small = shrink(program, lambda p: any(name == "PReLU" for name, _ in p.steps))
    assert small == Program("vector", (("PReLU", 1),), "layer", "cross entropy")


def test_a_clip_norm_that_is_not_kept_is_found(monkeypatch):
    assert fuzz.judge(PLAIN).outcome == "exact"
    down = clipping.round_down
    monkeypatch.setattr(clipping, "round_down", lambda clip: down(clip) * (1 + 1e-4))
    assert fuzz.judge(PLAIN).outcome == "moves"


def test_a_layer_used_twice_is_found_where_it_is_not_watched(monkeypatch):
    twice = with_steps("both signs")
    assert fuzz.judge(twice).outcome == "exact"
    enter = watched.WatchedForward.enter

    def blind(self, layer, x):
        self._called.clear()
        return enter(self, layer, x)

    monkeypatch.setattr(watched.WatchedForward, "enter", blind)
    assert fuzz.judge(twice).outcome in ("moves", "differs")
