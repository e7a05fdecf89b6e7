"""Benchmarks: `python -m bench kernels dp_step [--quick] [--device cuda] [--out DIR]`.

    kernels   fused clipping and noise against what one would write, and against other packages
    dp_step   a private training step against the same step without privacy, and other packages
    rounds    federated rounds against other engines, and their growth with the number of clients
    headline  accuracy of the shipped configurations (an hour)
    accuracy  every method of clipping under one ledger (hours; --only takes a study)
    cohort    clients trained together against one after another
    faults    accuracy, ε and rounds given up where clients fail (minutes)
    processes a round in one process and in two (four minutes)
    correlated noise that is drawn again: what it leaves in a model, and its time (five minutes)
    shared_noise  whole clients under noise that rounds share: accuracy (an hour; wants chem97)
    pretrained  topics of news by a frozen encoder and a head, under privacy (ten minutes)
    natural   tests of 50 clinics, tweets of 16 accounts, under privacy (twenty minutes)
    lora      LoRA against a frozen encoder's head, AADP against flat clipping on it (five hours)
    personal_layers  heads of clients' own against one global model, on digits (ten minutes)
    margin    what dividing the budget over layers wins, by what it can win (ten minutes)
    audit     attacks on runs of every setting: ε shown beside ε proven (ten minutes)
    nodes     a release of a node beside the simulation, and behind Flower (four minutes)
    membership  attacks on membership without privacy, abstract, and at ε = 8, 3 and 1 (ten minutes)
    inversion images and tokens from a client's release, before and after (ten minutes)
    start     from a command to its first answer, from an empty cache and from a full one (minutes)
    newcomer  a clone, `make fit` and its first picture, with nothing in any cache (minutes)
    picture   the picture on README's first screen, by one run (half a minute)
    traffic   a model of the L2 cache under the kernel's order; no GPU is used (two minutes)
    report    tables and plots of the committed results, into docs/ and README.md

Nothing is timed that has not computed the right thing in the same run. Results are written to
DIR/<machine>_<date>.json after every part. On a GPU torch, triton and numpy are enough.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import time
import warnings
from pathlib import Path

# The profiler's own messages, one a call, would hide ours.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch

from aadp_kernels import compiling
from bench import machine

RESULTS = machine.ROOT / "bench" / "results"
MEASURED = ("kernels", "dp_step", "rounds")
PARTS = (
    *MEASURED,
    "headline",
    "accuracy",
    "cohort",
    "faults",
    "processes",
    "correlated",
    "shared_noise",
    "tuning",
    "pretrained",
    "natural",
    "lora",
    "personal_layers",
    "margin",
    "audit",
    "nodes",
    "membership",
    "inversion",
    "start",
    "newcomer",
    "picture",
    "traffic",
    "report",
    "all",
)
MODULES = {"traffic": "bench.cache_model"}


def measure_part(part: str, device: torch.device, options: argparse.Namespace) -> list[str]:
    """Run a part and write it beside the other results of the day; what of it failed, line by line.

    That is sides of ours, and cases that could not even be built.
    """
    found = machine.record(device)
    start = time.perf_counter()
    module = importlib.import_module(f"bench.{part}")
    # On a GPU the three parts together stay within nine minutes.
    cuda = 90.0 if part == "rounds" else 180.0
    default = 75.0 if options.quick else cuda if device.type == "cuda" else 900.0
    budget = default if options.budget is None else options.budget
    with compiling("now"):
        results = module.run(device, quick=options.quick, budget=budget, only=options.only)
    broken = {title: case["failed"] for title, case in results.items() if "failed" in case}
    results = {title: case for title, case in results.items() if title not in broken}
    for case in results.values():
        case["commit"] = found["commit"] + ("+" if found["dirty"] else "")
    found["seconds"] = round(time.perf_counter() - start, 1)
    quick, out = options.quick, options.out
    name = f"{machine.slug(found)}_{found['date']}{'_quick' if quick else ''}.json"
    path = out / name
    data = json.loads(path.read_text()) if path.exists() else {}
    # Cases that are measured alone join those that were measured before.
    before = data[part] if options.only and part in data else {"results": {}}
    data[part] = {"machine": found, "results": before["results"] | results}
    unbuilt = {t: r for t, r in before.get("failed", {}).items() if t not in results} | broken
    if unbuilt:
        data[part]["failed"] = unbuilt
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    print(f"\n{part}: {found['seconds']} s, {path}", flush=True)
    return [f"{title}: {reason}" for title, reason in broken.items()] + [
        f"{title}: {name}: {side['failed']}"
        for title, case in results.items()
        for name, side in case["sides"].items()
        if "failed" in side
    ]


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="part", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="under five minutes on two cores")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--budget", type=float, help="seconds a part, beside what has begun")
    parser.add_argument("--only", default="", help="cases whose title contains this")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device")
    # Peers warn about their own hooks; what matters here raises.
    warnings.simplefilter("ignore")
    failed = []
    for part in MEASURED if "all" in options.parts else options.parts:
        if part in MEASURED:
            failed += measure_part(part, device, options)
        elif part == "report":
            importlib.import_module("bench.report").report()
        elif part == "accuracy":
            importlib.import_module("bench.accuracy").run_all(options.only)
        else:
            module = importlib.import_module(MODULES.get(part, f"bench.{part}"))
            module.run(None) if part == "headline" else module.run_all()
    if failed:
        raise SystemExit("\n".join(["", "failed:", *failed]))


if __name__ == "__main__":
    main()
