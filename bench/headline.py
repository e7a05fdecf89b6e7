"""Accuracy of the shipped configurations: every figure from committed runs.

    python -m bench.headline run            # all cases that have no result yet, about an hour
    python -m bench.headline report         # write the figures into docs/results.md and configs/

A case is a list of configurations and options of `python -m fl_lightning.fit`. Seeds are 1, 2, 3
for weights, partition and (public, hence simulated) noise; every run counts, and the figure is
the test accuracy after the last round.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from bench import pages
from bench.machine import ROOT

RESULTS = ROOT / "bench" / "results" / "headline.json"
PLACE = (pages.RESULTS, "headline table")
SEEDS = (1, 2, 3)
FASHION = ["configs/fashion_mnist_aadp.yaml"]
CASES: dict[str, list[str]] = {
    "digits, IID, ε=8 (default run)": ["configs/base.yaml"],
    "digits, IID, two rounds (smoke test)": ["configs/smoke.yaml"],
    "digits, IID, FedAvg without privacy": ["configs/fedavg.yaml"],
    "digits, Dirichlet(0.5), ε=8": ["configs/dirichlet.yaml"],
    "Fashion-MNIST, IID, ε=8": FASHION,
    "Fashion-MNIST, IID, ε=3": [*FASHION, "configs/epsilon_3.yaml"],
    "Fashion-MNIST, IID, FedAvg without privacy": [
        *FASHION,
        "configs/fashion_mnist_fedavg.yaml",
    ],
    "Fashion-MNIST, IID, FedAvg with the learning rate of the private run": [
        *FASHION,
        "configs/fedavg.yaml",
    ],
    "Fashion-MNIST, Dirichlet(0.5), ε=8": [*FASHION, "configs/dirichlet.yaml"],
    "Fashion-MNIST, Dirichlet(0.5), ε=3": [
        *FASHION,
        "configs/epsilon_3.yaml",
        "configs/dirichlet.yaml",
    ],
    "Fashion-MNIST, Dirichlet(0.5), FedAvg without privacy": [
        *FASHION,
        "configs/fashion_mnist_fedavg.yaml",
        "configs/dirichlet.yaml",
    ],
    "Fashion-MNIST, IID, ε=8, three layers": [
        *FASHION,
        "configs/fashion_mnist_three_layers.yaml",
    ],
    "digits, IID, personal ε of 1, 3, 8": ["configs/digits_personal.yaml"],
    "digits, 50 clients, client+local, ε=8": ["configs/digits_client_local.yaml"],
    "digits, IID, abstract, nominal ε=8": ["configs/digits_abstract.yaml"],
}


def run_case(configs: list[str], seed: int) -> dict:
    """One run in a process of its own; its summary."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fl_lightning.fit"]
        for config in configs:
            command += ["--config", config]
        command += ["--run_dir", folder, "--seed_everything", str(seed)]
        command += ["--privacy.seed", str(seed), "--trainer.logger", "false"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        return json.loads((Path(folder) / "summary.json").read_text())


def git(*args: str) -> str:
    done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def machine() -> dict:
    """Where and with what this is measured."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def run(only: str | None) -> None:
    """Run what is missing; results are saved after every run."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, configs in CASES.items():
        if only and only not in name:
            continue
        for seed in SEEDS:
            done = results.setdefault(name, {"configs": configs, "runs": {}})["runs"]
            if str(seed) in done:
                continue
            done[str(seed)] = {"summary": run_case(configs, seed), "machine": machine()}
            RESULTS.parent.mkdir(parents=True, exist_ok=True)
            RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
            print(name, seed, done[str(seed)]["summary"]["test_accuracy"], flush=True)


def table() -> str:
    """Markdown table of the committed results."""
    lines = [
        "| run | test accuracy, mean ± std of 3 seeds | ε (largest client) | time a run |",
        "|---|---|---|---|",
    ]
    for name, case in json.loads(RESULTS.read_text()).items():
        summaries = [r["summary"] for r in case["runs"].values()]
        accuracy = [100 * s["test_accuracy"] for s in summaries]
        seconds = statistics.median(s["seconds"] for s in summaries)
        lines.append(
            f"| {name} | {statistics.mean(accuracy):.1f} ± {statistics.stdev(accuracy):.1f} % "
            f"| {privacy(summaries[0])} | {seconds:.0f} s |"
        )
    return "\n".join(lines)


def expected(config: Path) -> str:
    """Comment at the top of a configuration: the command and what it gave."""
    name = f"configs/{config.name}"
    results = json.loads(RESULTS.read_text())
    cases = {n: c for n, c in CASES.items() if c[-1] == name and n in results}
    commands = dict.fromkeys(" ".join(f"--config {c}" for c in case) for case in cases.values())
    lines = [f"# python -m fl_lightning.fit {command}" for command in commands]
    lines.append("#")
    lines.append("# Expected test accuracy and time (3 seeds, from bench/results/headline.json):")
    for case in cases:
        summaries = [r["summary"] for r in results[case]["runs"].values()]
        accuracy = [100 * s["test_accuracy"] for s in summaries]
        seconds = statistics.median(s["seconds"] for s in summaries)
        lines.append(
            f"#   {case}: {statistics.mean(accuracy):.1f} ± {statistics.stdev(accuracy):.1f} %, "
            f"{seconds:.0f} s"
        )
    return "\n".join(lines) + "\n"


def without_comment(text: str) -> str:
    """A configuration without the comment at its top."""
    lines = text.splitlines(keepends=True)
    while lines and lines[0].startswith("#"):
        lines.pop(0)
    return "".join(lines)


def privacy(summary: dict) -> str:
    """ε as the run's own summary states it."""
    if summary["privacy"] == "none":
        return "none"
    epsilon = f"{summary['epsilon_max']:.3g}"
    return epsilon if summary["privacy"] == "simulated" else f"{epsilon}, {summary['privacy']}"


def report() -> None:
    """Write the table into its page, and the expected figures into configs/."""
    pages.put(*PLACE, table())
    for config in sorted((ROOT / "configs").glob("*.yaml")):
        config.write_text(expected(config) + without_comment(config.read_text()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=["run", "report"])
    parser.add_argument("--only", help="run the cases whose name contains this")
    arguments = parser.parse_args()
    run(arguments.only) if arguments.action == "run" else report()
