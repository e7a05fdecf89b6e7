"""The ledger of sums, one line a round, against a line for every client and round.

Both ledgers are of the same sums of clients with unequal weights and ε. The lines for every client
are those of schema 0, which this package still reads. One process, on whatever machine it is:

    python -m bench.ledger [--clients 2000] [--rounds 150]

And a ledger of many lines, of releases of single clients, opened and verified as it is gone through
(four minutes for a million lines; the time is of the processor, the memory that at the peak):

    python -m bench.ledger --lines 1000000
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from aadp_kernels import tail_cutoff, vote_noise
from fl_lightning.accounting.sum_costs import (
    client_multipliers,
    extra_of,
    largest_extra,
    spent_digest,
)
from fl_lightning.ledger import Ledger, read, verify
from fl_lightning.privacy.weights import sum_weights
from fl_lightning.values.event import NoiseEvent
from fl_lightning.values.release import ALL_CLIENTS, Release

LAYERS, SHARE = (8, 4), 0.05


def header_of(clients: int, rounds: int) -> dict[str, Any]:
    """Facts of a run of sums, calibrated in closed form: no coins, one noise a round."""
    from fl_lightning.accounting.composition import calibrate

    sizes = [float(10 + k % 91) for k in range(clients)]
    targets, delta = [(4.0, 6.0, 8.0)[k % 3] for k in range(clients)], 1e-5
    # Down by what the cut tails cost.
    z = {
        e: calibrate(
            mechanism="gaussian", sampling_rate=1.0, steps=rounds, epsilon=e, delta=delta * 0.999
        )
        for e in set(targets)
    }
    return {
        "schema": 1,
        "run_id": "bench",
        "setting": "client+aggregator",
        "privacy_unit": "client",
        "trust": "aggregator",
        "adjacency": "zero_out",
        "mechanism": "gaussian",
        "delta": [delta] * clients,
        "epsilon": targets,
        "noise_multiplier": [z[e] for e in targets],
        "noise_multiplier_given": False,
        "sampling_rate": 1.0,
        "affordable_steps": rounds,
        "simulated": True,
        "noise_form": "wide",
        "tail_cutoff": tail_cutoff("gaussian", "wide"),
        "thresholds": "quantile",
        "vote_share": SHARE,
        "weighting": "records",
        "weights": sizes,
        "min_survivors": None,
        "cohort_rate": None,
        "client_sizes": sizes,
        "clients_per_round": clients,
        "planned_steps": [rounds] * clients,
        "layers": [f"layer{i}" for i in range(len(LAYERS))],
        "dims": list(LAYERS),
    }


def sum_of(header: dict[str, Any], round: int, spent: np.ndarray) -> Release:
    """The line of a sum of everybody."""
    weights, calibrated = (
        np.array(header[name], dtype=float) for name in ("weights", "noise_multiplier")
    )
    z, _ = sum_weights(weights, calibrated, mechanism="gaussian", vote_share=SHARE)
    votes = vote_noise(
        z, num_layers=len(LAYERS), vote_share=SHARE, mechanism="gaussian", adjacency="zero_out"
    )[1]
    line = Release(
        client=ALL_CLIENTS,
        round=round,
        first_step=round,
        steps=1,
        mechanism="gaussian",
        noise_multiplier=z,
        sampling_rate=1.0,
        adjacency="zero_out",
        vote_noise_scale=votes,
        num_layers=len(LAYERS),
        clip_norm=(0.6398166741645538, 0.6398166741645538),
        shares=(0.7149165125326328, 0.2850834874673673),
        binding=f"{round:064x}",
        digest=f"{round + 2**40:064x}",
        largest_weight=float(weights.max()),
        spent=spent_digest(spent),
    )
    own, deltas = client_multipliers(header, line), np.array(header["delta"])
    extra = largest_extra(line.event, own, deltas, extra_of(header, votes=True))
    return replace(line, tail_delta=extra.delta)


def for_every_client(header: dict[str, Any], line: Release) -> list[Release]:
    """The lines of schema 0 of the same sum."""
    extra, alone = extra_of(header, votes=True), {"largest_weight": None, "spent": None}
    found = []
    for client, z in enumerate(client_multipliers(header, line).tolist()):
        cost = extra(NoiseEvent("gaussian", z), header["delta"][client]).delta
        own = {"client": client, "noise_multiplier": z, "tail_delta": cost}
        found.append(replace(line, **own, **alone))
    return found


def grown(folder: Path, header: dict[str, Any], rounds: int) -> list[int]:
    """Bytes in use after a tenth, a half and all of the rounds, from the first on."""
    gc.collect()
    tracemalloc.start()
    spent, seen = np.zeros(len(header["delta"]), dtype=np.int64), []
    with Ledger.create(folder, header) as ledger:
        for round in range(rounds):
            ledger.append([sum_of(header, round, spent)])
            spent += 1
            if round + 1 in (rounds // 10, rounds // 2, rounds):
                gc.collect()
                seen.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    return seen


def compare(clients: int, rounds: int, folder: Path) -> dict[str, float]:
    """Bytes and seconds of verify of both forms, in this process, one after the other."""
    header = header_of(clients, rounds)
    old = {k: v for k, v in header.items() if k in read_by_schema_0(header)}
    spent = np.zeros(clients, dtype=np.int64)
    with Ledger.create(folder / "sums", header) as sums, Ledger.create(folder / "all", old) as each:
        for round in range(rounds):
            line = sum_of(header, round, spent)
            sums.append([line])
            each.append(for_every_client(header, line))
            spent += 1
    found: dict[str, float] = {"clients": clients, "rounds": rounds}
    verify(folder / "sums")  # imports what it needs
    for name in ("all", "sums"):
        found[f"bytes_{name}"] = (folder / name / "ledger.jsonl").stat().st_size
        start = time.perf_counter()
        assert verify(folder / name) == []
        found[f"verify_seconds_{name}"] = time.perf_counter() - start
    assert len(read(folder / "sums")[1]) == rounds
    for name in ("bytes", "verify_seconds"):
        found[f"{name}_ratio"] = found[f"{name}_all"] / found[f"{name}_sums"]
    return found


def single_header(clients: int, rounds: int) -> dict[str, Any]:
    """Facts of a run of `client+local` with a given multiplier and no target."""
    sums = ("weights", "weighting", "min_survivors", "cohort_rate")
    return header_of(clients, 1) | dict.fromkeys(sums) | {
        "setting": "client+local",
        "trust": "local",
        "adjacency": "replace_one",
        "epsilon": ["inf"] * clients,
        "noise_multiplier": 1.0,
        "noise_multiplier_given": True,
        "affordable_steps": None,
        "thresholds": "fixed",
        "vote_share": 0.0,
        "weighting": "records",
        "planned_steps": [rounds] * clients,
    }  # fmt: skip


def write_lines(folder: Path, lines: int, clients: int = 100) -> None:
    """A ledger of releases of single clients, with clip norms and digests of their own."""
    rounds, chance = -(-lines // clients), np.random.default_rng(0)
    header = single_header(clients, rounds)
    cost = extra_of(header, votes=False)(NoiseEvent("gaussian", 1.0, adjacency="replace_one"), 1e-5)
    with Ledger.create(folder, header) as ledger:
        for round in range(rounds):
            norms = chance.random((clients, len(LAYERS)))
            ledger.append([
                Release(
                    client=client, round=round, first_step=round, steps=1, mechanism="gaussian",
                    noise_multiplier=1.0, sampling_rate=1.0, adjacency="replace_one",
                    num_layers=len(LAYERS), clip_norm=tuple(norms[client].tolist()),
                    shares=(0.7149165125326328, 0.2850834874673673), binding=f"{round:064x}",
                    digest=f"{round * clients + client + 2**40:064x}", tail_delta=cost.delta,
                )
                for client in range(clients)
            ])  # fmt: skip


def gone_through(folder: Path, what: str) -> dict[str, float]:
    """Seconds of the processor, and memory at the peak, of a process that does one thing."""
    code = (
        "import pathlib, re, sys, time\n"
        "from fl_lightning.ledger import Ledger, verify\n"
        "status = pathlib.Path('/proc/self/status')\n"
        "memory = lambda: int(re.search(r'VmHWM:\\s*(\\d+)', status.read_text())[1])\n"
        "import fl_lightning.ledger.verdict\n"
        "before, start, what = memory(), time.process_time(), sys.argv[2]\n"
        "if what == 'verify':\n"
        "    assert verify(sys.argv[1]) == [], verify(sys.argv[1])[:3]\n"
        "else:\n"
        "    with Ledger.open(sys.argv[1]) as ledger:\n"
        "        what == 'open' or [None for _ in ledger.releases]\n"
        "print(time.process_time() - start, 1024 * (memory() - before))"
    )
    command = [sys.executable, "-c", code, str(folder), what]
    seconds, memory = subprocess.run(
        command, check=True, capture_output=True, text=True, env=os.environ
    ).stdout.split()
    return {f"{what}_seconds": float(seconds), f"{what}_bytes": int(memory)}


def many_lines(lines: int) -> dict[str, float]:
    """Figures of a ledger of many lines."""
    with tempfile.TemporaryDirectory() as folder:
        write_lines(Path(folder), lines)
        found: dict[str, float] = {"lines": lines}
        for what in ("open", "resume", "verify"):
            found |= gone_through(Path(folder), what)
        return found


def read_by_schema_0(header: dict[str, Any]) -> set[str]:
    """Names of the facts that headers of schema 0 had."""
    new = "schema noise_multiplier noise_multiplier_given sampling_rate affordable_steps vote_share"
    return set(header) - {*new.split(), "weights", "weighting", "clients_per_round"}


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.ledger", description=__doc__)
    parser.add_argument("--clients", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--lines", type=int, default=None, help="of a ledger of single releases")
    parser.add_argument("--out", default=None, help="folder to keep both ledgers in")
    options = parser.parse_args()
    if options.lines is not None:
        print(json.dumps(many_lines(options.lines), indent=2))
        return
    with contextlib.ExitStack() as stack:
        folder = options.out or stack.enter_context(tempfile.TemporaryDirectory())
        found = compare(options.clients, options.rounds, Path(folder))
        header = header_of(options.clients, 500)
        memory = grown(Path(folder) / "memory", header, 500)
    for rounds, size in zip((50, 250, 500), memory, strict=True):
        found[f"bytes_in_use_after_{rounds}_rounds"] = size
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
