"""The table of failing clients: accuracy, ε and rounds given up by dropout.

    python -m bench faults            # runs that have no result yet, some minutes; then `report`

Seeds 1, 2, 3 are those of weights, partition, faults and (public, hence simulated) noise; every run
counts, and the accuracy is on the test set after the last round.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import statistics
import tempfile
from pathlib import Path

from bench import pages
from bench.headline import machine, privacy
from bench.machine import ROOT

RESULTS = ROOT / "bench" / "results" / "faults.json"
PLACE = (pages.RESULTS, "faults table")
SEEDS = (1, 2, 3)
DROPOUTS = (0.0, 0.1, 0.3)
SECURE_SUM = [
    *("--privacy.setting", "client+secure_sum", "--privacy.min_survivors", "20"),
    *("--data.num_clients", "100", "--model.clients_per_round", "30", "--privacy.delta", "1e-3"),
    *("--model.sampling_rate", "null", "--model.batch_size", "8", "--model.local_steps", "null"),
    *("--model.network", "fl_lightning.models.LogisticRegression"),
    *("--model.client_lr", "0.5", "--privacy.clip_norm", "0.5"),
]
CASES = {
    "digits, record+local, 10 clients": [],
    "digits, client+secure_sum, 30 of 100 clients, shares of 20 are the noise": SECURE_SUM,
}


def run_case(options: list[str], dropout: float, seed: int) -> dict:
    """One run of the default experiment with options, in this process."""
    from fl_lightning import fit

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        fit.main([
            *("--config", str(ROOT / "configs" / "base.yaml"), *options),
            *("--model.dropout", str(dropout), "--run_dir", folder, "--trainer.logger", "false"),
            *("--seed_everything", str(seed), "--privacy.seed", str(seed)),
        ])  # fmt: skip
        with (Path(folder) / "rounds.csv").open() as file:
            clients = [int(row["clients"]) for row in csv.DictReader(file)]
        summary = json.loads((Path(folder) / "summary.json").read_text())
    return {"summary": summary, "clients": clients, "machine": machine()}


def run_all() -> None:
    """Run what is missing; results are saved after every run."""
    os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, options in CASES.items():
        for dropout in DROPOUTS:
            case = results.setdefault(name, {"options": options, "runs": {}})["runs"]
            done = case.setdefault(str(dropout), {})
            for seed in SEEDS:
                if str(seed) in done:
                    continue
                done[str(seed)] = run_case(options, dropout, seed)
                RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
                accuracy = done[str(seed)]["summary"]["test_accuracy"]
                print(name, dropout, seed, accuracy, flush=True)


def table() -> str:
    """Markdown table of the committed results."""
    lines = [
        "| run | clients that fail | test accuracy, mean ± std | seeds | ε, largest and median "
        "client | clients in a round | rounds given up |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, case in json.loads(RESULTS.read_text()).items():
        for dropout, runs in case["runs"].items():
            found = [r["summary"] for r in runs.values()]
            accuracy = [100 * s["test_accuracy"] for s in found]
            rounds = [c for r in runs.values() for c in r["clients"]]
            lines.append(
                f"| {name} | {100 * float(dropout):.0f} % "
                f"| {statistics.mean(accuracy):.1f} ± {statistics.stdev(accuracy):.1f} % "
                f"| {len(accuracy)} "
                f"| {privacy(found[0])}, {found[0]['epsilon_median']:.3g} "
                f"| {statistics.mean(rounds):.1f} "
                f"| {rounds.count(0)} of {len(rounds)} |"
            )
    return "\n".join(lines)


def report() -> None:
    """Write the table into its page."""
    pages.put(*PLACE, table())
