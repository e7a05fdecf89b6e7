"""The few figures of README.md: named configurations of committed results, and nothing else."""

from __future__ import annotations

import json
import statistics

from bench import accuracy_report, headline, newcomer, report, report_rounds
from bench.measure import quantiles, ratios

KERNEL_CASE = "ResNet-18: L1 Laplace"
STEP_CASE = "CNN, batch 500"
ROUND_CASE = "CNN, 50 of 200 clients"
CPU = "intel-xeon-processor-2-cores"


def figures() -> str:
    """A list of sentences, one a figure."""
    parts = report.latest()[CPU]
    lines = [
        _accuracy(),
        _best_accuracy(),
        _kernels(parts["kernels"]["results"][KERNEL_CASE]),
        _step(parts["dp_step"]["results"][STEP_CASE]),
        _rounds(parts["rounds"]["results"][ROUND_CASE]),
        *_tests(),
    ]
    return "\n".join(f"- {line}" for line in lines)


def _of(name: str) -> str:
    runs = json.loads(headline.RESULTS.read_text())[name]["runs"].values()
    values = [100 * run["summary"]["test_accuracy"] for run in runs]
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} %"


def _accuracy() -> str:
    private, plain = "digits, IID, ε=8 (default run)", "digits, IID, FedAvg without privacy"
    return (
        f"The default run reaches {_of(private)} on digits with ε = 8 for every record; without "
        f"privacy it is {_of(plain)}."
    )


def _best_accuracy() -> str:
    rows = [line.split(" | ") for line in accuracy_report.best_table().splitlines()]
    ten = {row[1]: row[2] for row in rows if row[0].strip("| ").startswith("IID, 10 clients")}
    return (
        f"The best configuration for Fashion-MNIST reaches {ten['8']} % at ε = 8, {ten['3']} % at "
        f"ε = 3, {ten['1']} % at ε = 1 and {ten['none']} % without privacy."
    )


def _kernels(case: dict) -> str:
    sides, start = case["sides"], report.base_of(case)

    def cell(name: str | None) -> str:
        assert name is not None
        return f"{1e3 * quantiles(sides[name]['seconds'])[0]:.3g} ms"

    wide, fast = (cell(report.side_of(case, name)) for name in report.CONFIGURATIONS)
    return (
        f"Clipping and noise of one update of ResNet-18 (11.7 million numbers, L1, Laplace) take "
        f"{wide} by default (wide, ChaCha20) and {fast} with fast, ChaCha20; a loop in plain "
        f"PyTorch takes {cell(start)}."
    )


def _step(case: dict) -> str:
    sides, start = case["sides"], report.base_of(case)

    def cell(name: str | None) -> str:
        assert name is not None
        return f"{ratios(sides[name]['seconds'], sides[start]['seconds'])[0]:.2f}"

    wide, fast = (cell(report.side_of(case, name)) for name in report.CONFIGURATIONS)
    return (
        f"A private training step of a CNN at batch 500 takes {wide} times the step without "
        f"privacy by default and {fast} times with fast, ChaCha20; Opacus' hooks take "
        f"{cell('Opacus, hooks, flat')} times."
    )


def _rounds(case: dict) -> str:
    rivals = report_rounds.RIVALS.values()
    over = [report_rounds.over_rival(case, report_rounds.DEFAULT, names) for names in rivals]
    flower, pfl, lightning, loop = over
    return (
        f"A round of 50 CNN clients with clipping, noise and ledger (client+local, one process) is "
        f"{flower} as fast as Flower's simulation without privacy, {pfl} pfl's best, {lightning} a "
        f"Lightning Trainer a client and {loop} a plain loop."
    )


def _tests() -> list[str]:
    """How long the quick tests take, where a newcomer ran them."""
    found = json.loads(newcomer.RESULT.read_text())
    where, steps = found["machine"], {s["title"]: s["seconds"] for s in found["steps"]}
    if newcomer.TESTS not in steps:
        return []
    minutes = steps[newcomer.TESTS] / 60
    return [f"`make test` takes {minutes:.1f} minutes on {where['cores']} cores once installed."]
