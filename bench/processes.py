"""Time of a round in one process and in two, by the command line.

    python -m bench processes    # four minutes, alone on two cores

100 clients of 60 random records of Fashion-MNIST's shape, all of them in every round. The ways take
turns, twice; a run is six rounds, of which the first two (compilation) are left out. Every way must
end with the same model to float tolerance, from the same public seed.
"""

from __future__ import annotations

import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from bench import pages
from bench.headline import ROOT, machine
from fl_lightning.data import Arrays, from_arrays
from fl_lightning.output.checkpoint import CHECKPOINT

RESULTS = ROOT / "bench" / "results" / "processes.json"
PLACE = (pages.BENCHMARKS, "processes table")
ROUNDS, SKIPPED, TURNS = 6, 2, 2
WAYS = {
    "1 process, 1 thread": (1, 1),
    "1 process, 2 threads": (1, 2),
    "2 processes, 1 thread": (2, 1),
}
NOISE = ["--privacy.epsilon", "null", "--privacy.noise_multiplier", "1", "--privacy.delta", "1e-3"]
CASES = {
    "CNN 25k, 100 clients, record+local": [*NOISE, "--model.sampling_rate", "0.5"],
    "CNN 25k, 100 clients, client+aggregator": [
        *NOISE, "--privacy.setting", "client+aggregator", "--model.local_steps", "5",
        "--model.sampling_rate", "0.2",
    ],
}  # fmt: skip
COMMON = [
    *("--data.source", "bench.processes.records", "--data.num_clients", "100"),
    *("--data.val_fraction", "0", "--model.execution", "vmap", "--model.client_lr", "0.01"),
    *("--model.network.image_size", "28", "--model.network.channels", "[16, 32]"),
    *("--model.network.kernel_sizes", "[6, 4]", "--model.network.strides", "[2, 2]"),
    *("--model.network.hidden", "[]", "--trainer.max_epochs", str(ROUNDS)),
    *("--trainer.accelerator", "cpu", "--trainer.logger", "false", "--privacy.seed", "1"),
    *("--trainer.enable_progress_bar", "false"),
]


def records() -> Arrays:
    """Random images and labels."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6000, 1, 28, 28, generator=generator)
    y = torch.randint(10, (6000,), generator=generator)
    return from_arrays(x, y, x[:100], y[:100], num_classes=10, name="random")


def run_once(case: str, way: str, folder: Path) -> list[float]:
    """Seconds of the rounds of one run, after the first ones."""
    processes, threads = WAYS[way]
    several = ["--trainer.strategy", "ddp"] if processes > 1 else []
    command = [sys.executable, "-m", "fl_lightning.fit", *COMMON, *CASES[case], *several]
    done = subprocess.run(
        [*command, "--trainer.devices", str(processes), "--run_dir", str(folder)],
        cwd=ROOT,
        env=os.environ
        | dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), str(threads))
        | {"WANDB_MODE": "disabled"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{case}, {way}: {done.stderr[-2000:]}")
    with (folder / "rounds.csv").open() as file:
        return [float(row["seconds"]) for row in csv.DictReader(file)][SKIPPED:]


def run_all() -> None:
    """Every case, into the result file."""
    cases: dict[str, dict[str, list[float]]] = {}
    for case in CASES:
        cases[case] = {way: [] for way in WAYS}
        for _ in range(TURNS):
            models = []
            for way in WAYS:
                with tempfile.TemporaryDirectory() as folder:
                    cases[case][way] += run_once(case, way, Path(folder))
                    state = torch.load(Path(folder) / CHECKPOINT, weights_only=False)
                models.append(state["state_dict"])
            for other in models[1:]:
                for name, value in models[0].items():
                    torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4)
        print(case, {w: round(statistics.median(t), 3) for w, t in cases[case].items()}, flush=True)
    text = json.dumps({"machine": machine(), "cases": cases}, indent=1, ensure_ascii=False)
    RESULTS.write_text(text + "\n")


def table() -> str:
    """Markdown table of the committed results."""
    lines = [
        "| a round of | " + " | ".join(WAYS) + " | times faster than 1 thread | than 2 threads |",
        "|---" * (len(WAYS) + 3) + "|",
    ]
    for case, ways in json.loads(RESULTS.read_text())["cases"].items():
        one, threads, two = (statistics.median(ways[way]) for way in WAYS)
        times = " | ".join(f"{1e3 * t:.0f} ms" for t in (one, threads, two))
        lines.append(f"| {case} | {times} | {one / two:.2f} | {threads / two:.2f} |")
    return "\n".join(lines)


def report() -> None:
    """Write the table into its page."""
    pages.put(*PLACE, table())
