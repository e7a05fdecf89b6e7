"""Rounds against other engines: every engine computes the same model, and the gate can fail."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import federation, parity, report_rounds, rounds

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
LOOP = rounds.Side("plain_loop", "floor")
OURS = {
    "plain loop": LOOP,
    "fl_lightning, FedAvg": rounds.ours(rounds.FEDAVG),
    "fl_lightning, client+local": rounds.ours(rounds.AADP),
}
SMALL = rounds.Case("small", 12, 4, 20, 1, OURS)


@pytest.fixture(scope="module")
def problem():
    return rounds.build(SMALL, "plain loop", CPU)


def test_reference_by_hand(problem) -> None:
    """One round written down with autograd alone: two steps of four clients, averaged."""
    start = federation.start(problem)
    model, total = federation.network("small"), {n: torch.zeros_like(p) for n, p in start.items()}
    for client in problem["schedule"][0].tolist():
        weights = {n: p.clone().requires_grad_() for n, p in start.items()}
        for rows in federation.batches(problem, client, 0):
            out = torch.func.functional_call(model, weights, (problem["x"][rows],))
            loss = torch.nn.functional.cross_entropy(out, problem["y"][rows])
            grads = torch.autograd.grad(loss, list(weights.values()))
            weights = {
                n: (p - problem["lr"] * g).detach().requires_grad_()
                for (n, p), g in zip(weights.items(), grads, strict=True)
            }
        for name, value in weights.items():
            total[name] += value.detach() / 4
    after = rounds.Reference(problem).after(1, None)
    for name, value in total.items():
        torch.testing.assert_close(after[name], value)
    assert len(federation.batches(problem, 0, 0)) == problem["steps"] == 2


def test_clipped_updates_keep_the_norm_of_a_layer() -> None:
    update = {
        "a.weight": torch.full((3, 4), 2.0),
        "a.bias": torch.ones(3),
        "b.weight": torch.ones(1),
    }
    clipped = federation.clipped(update, 1.5)
    layer = torch.cat([clipped["a.weight"].flatten(), clipped["a.bias"]])
    assert float(layer.norm()) == pytest.approx(1.5)
    assert torch.equal(clipped["b.weight"], update["b.weight"])


def test_gate_rejects_other_models(problem) -> None:
    reference = rounds.Reference(problem)
    start, right = reference.after(0, None), reference.after(2, None)
    rounds.check_model(right, right, start)
    wrong = {
        "a round less": reference.after(1, None),
        "clipped": reference.after(2, 0.05),
        "other weights": {n: start[n] + 1.01 * (p - start[n]) for n, p in right.items()},
        "nan": {n: p * torch.nan for n, p in right.items()},
    }
    for model in wrong.values():
        with pytest.raises(parity.ParityError):
            rounds.check_model(model, right, start)


@pytest.mark.parametrize("factor", [2 / 3, 1.0, 3 / 2])
def test_noise_of_a_round_is_what_its_table_says(tmp_path: Path, factor: float) -> None:
    torch.manual_seed(0)
    scales = {"a": 3.0, "b": 4.0}
    clip = {name: scale / (2 * 2**0.5) for name, scale in scales.items()}
    lines = ["round,client,layer,noise_scale,clip_norm"]
    lines += [f"0,{k},{name},{scales[name]},{clip[name]}" for k in range(4) for name in scales]
    (tmp_path / "layers.csv").write_text("\n".join(lines) + "\n")
    want = {f"{name}.weight": torch.zeros(20, 30) for name in scales}
    have = {f"{n}.weight": factor * s / 2 * torch.randn(20, 30) for n, s in scales.items()}
    if factor == 1.0:
        rounds.check_noise(have, want, tmp_path, cohort=4, moves=2)
        (tmp_path / "layers.csv").write_text("\n".join(lines).replace(",3.0,", ",2.9,") + "\n")
    with pytest.raises(parity.ParityError):
        rounds.check_noise(have, want, tmp_path, cohort=4, moves=2)


def test_one_noise_of_a_sum_is_what_its_table_says(tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = "round,client,layer,noise_scale,clip_norm\n0,-1,a,3.0,3.0\n"
    (tmp_path / "layers.csv").write_text(text)
    want = {"a.weight": torch.zeros(20, 30)}
    rounds.check_noise({"a.weight": 3 / 4 * torch.randn(20, 30)}, want, tmp_path, cohort=4, moves=1)
    for factor in (2 / 3, 3 / 2):
        have = {"a.weight": factor * 3 / 4 * torch.randn(20, 30)}
        with pytest.raises(parity.ParityError):
            rounds.check_noise(have, want, tmp_path, cohort=4, moves=1)


def test_prices_of_settings_are_over_the_first() -> None:
    sides = {
        "no privacy": {"kind": "ours", "seconds": [1.0, 2.0, 3.0]},
        "client+local": {"kind": "ours", "seconds": [3.0, 6.0, 9.0]},
    }
    case = {"network": "MLP", "sides": sides, "populations": {}, "cohorts": {}}
    assert report_rounds.summary({"a cohort": case})[-4:] == [
        "| MLP, a cohort | no privacy | client+local |",
        "|---|---|---|",
        "| ms a round | 2e+03 | 6e+03 |",
        "| over no privacy | 1.00 × | 3.00 × |",
    ]


@pytest.mark.slow
def test_engines_of_this_package_pass_and_are_timed() -> None:
    result = rounds.measure_case(SMALL, CPU, 1.0, True)
    sides = result["sides"]
    assert [s for s in sides.values() if "seconds" in s] == list(sides.values()), sides
    assert sides["fl_lightning, FedAvg"]["gate"] == "equal model"
    assert sides["fl_lightning, client+local"]["gate"] == "equal clipped model, noise as stated"
    assert sides["fl_lightning, FedAvg"]["accuracy"] == sides["plain loop"]["accuracy"]
    assert all(s["peak"] > 50e6 for s in sides.values())
    assert len(report_rounds.full_table(result)) == 5
    assert "client+local" in "\n".join(report_rounds.summary({"small": result}))


def test_a_side_that_computes_something_else_is_not_timed() -> None:
    other = replace(LOOP, options={"rounds": 1})
    case = replace(SMALL, sides={"plain loop": LOOP, "off": other})
    engine = rounds.launch(LOOP, rounds.build(case, "plain loop", CPU))
    try:
        engine.rounds(1)
        wrong = rounds.build(case, "off", CPU)
        wrong["lr"] *= 1.05
        with pytest.raises(parity.ParityError):
            rounds.gate(engine, other, wrong, rounds.Reference(wrong))
    finally:
        engine.close()
    assert engine.process.poll() == 0


def test_an_engine_that_cannot_start_says_why() -> None:
    with pytest.raises(ImportError, match="KeyError"):
        rounds.launch(rounds.Side("no_such_engine", "peer"), rounds.build(SMALL, "plain loop", CPU))


@pytest.mark.slow
def test_a_gpu_machine_needs_little_more_than_lightning(tmp_path: Path) -> None:
    """Rounds run, ledger and all, where nothing else is installed than Lightning brings along."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "absent = {'dp_accounting', 'jsonargparse', 'wandb', 'opacus', 'numba', 'matplotlib',\n"
        "          'scipy', 'sklearn', 'pfl', 'hypothesis', 'pandas', 'rich', 'pooch',\n"
        "          'safetensors', 'docstring_parser'}\n"
        "class Without:\n"
        "    def __init__(self, finder):\n"
        "        self.finder = finder\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] not in absent:\n"
        "            return self.finder.find_spec(name, path, target)\n"
        "sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]\n"
    )
    (tmp_path / "run.py").write_text(
        "import importlib.util, torch\n"
        "assert importlib.util.find_spec('dp_accounting') is None\n"
        "from bench import __main__, rounds\n"
        "sides = {'a': rounds.ours(rounds.FEDAVG), 'b': rounds.ours(rounds.AADP)}\n"
        "case = rounds.Case('small', 12, 4, 20, 1, sides)\n"
        "done = rounds.measure_case(case, torch.device('cpu'), 1.0, True)['sides']\n"
        "assert all('seconds' in side for side in done.values()), done\n"
    )
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, str(tmp_path / "run.py")], cwd=ROOT, capture_output=True, text=True,
        env={"PYTHONPATH": paths, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
