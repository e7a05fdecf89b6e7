"""Rounds of federated averaging: this package, other engines, and a plain loop, in turns.

Every engine gets the same records, cohorts, minibatches and first model, so that all of them must
hold the same model after the same number of rounds, to rounding. They run in processes of their
own (see `bench.turns`). This package is timed as it is used, with its ledger and metrics on,
without privacy and under client+local; the others average without privacy, which is less work.
"""

from __future__ import annotations

import csv
import math
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import federation, measure, parity
from bench.child import PYTHON
from bench.turns import Engine

NVFLARE = (
    "2.9 runs at most 100 sites, and where they outnumber its threads it starts a process for each "
    "task: 50 tasks that compute nothing took over half a minute"
)
GATED_ROUNDS = 2
PLANNED = 2000
CLIP = 0.5
FEDAVG: dict[str, Any] = {"setting": "none"}
# The multiplier stands for an ε: calibration is done once, before the first round.
AADP: dict[str, Any] = {
    "setting": "client+local", "noise_multiplier": 1.0, "epsilon": None, "clip_norm": CLIP,
    "delta": 1e-6,
}  # fmt: skip
AGGREGATED: dict[str, Any] = AADP | {
    "setting": "client+aggregator", "cohort_sampling": "fixed", "thresholds": "released",
}  # fmt: skip


@dataclass(frozen=True)
class Side:
    """An engine with its options.

    Attributes:
        engine: Name in `bench.engine`.
        kind: "ours", "peer" or "floor".
        options: For the engine.
        processes: That compute; cores are shared out between them.
        elsewhere: Runs in the peers' environment.
        no_part: Why it is not run at all.
    """

    engine: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    processes: int = 1
    elsewhere: bool = False
    no_part: str = ""

    @property
    def private(self) -> bool:
        return self.options.get("privacy", FEDAVG)["setting"] != "none"


def ours(privacy: dict[str, Any], **options: Any) -> Side:
    processes = options.get("processes", 1)
    return Side("fl_lightning", "ours", {"privacy": privacy, **options}, processes)


def contest(brief: bool, gpu: bool = False) -> dict[str, Side]:
    """The sides of a comparison of engines; on two cores no engine gains from a third process."""
    sides = {
        "plain loop": Side("plain_loop", "floor"),
        "fl_lightning, FedAvg": ours(FEDAVG),
        "fl_lightning, client+local": ours(AADP),
    }
    if not gpu:
        sides["fl_lightning, FedAvg, 2 processes"] = ours(FEDAVG, processes=2)
        sides["fl_lightning, client+local, 2 processes"] = ours(AADP, processes=2)
    if not brief:
        sides["fl_lightning, client+local, checkpoint every round"] = ours(AADP, checkpoint=True)
    return sides | {
        "Lightning Trainer per client": Side("lightning_per_client", "peer"),
        "Flower simulation": Side("flower", "peer", {"processes": 2}, 2, elsewhere=True),
        "pfl, 1 process": Side("pfl", "peer", {"processes": 1}, 1, elsewhere=True),
        "pfl, 2 processes": Side("pfl", "peer", {"processes": 2}, 2, elsewhere=True),
        "NVFlare simulator": Side("nvflare", "peer", no_part=NVFLARE),
    }


@dataclass(frozen=True)
class Case:
    """Sides that are compared.

    Attributes:
        network: See `federation.network`.
        clients, cohort, records: Of the population, of a round, of a client.
        turn: Rounds of a turn.
        sides: By name.
        populations: By side, where sides differ in the population.
        cohorts: By side, where sides differ in the cohort.
    """

    network: str
    clients: int
    cohort: int
    records: int
    turn: int
    sides: dict[str, Side]
    populations: dict[str, int] = field(default_factory=dict)
    cohorts: dict[str, int] = field(default_factory=dict)


def growth(privacy: dict[str, Any], few: bool) -> Case:
    """One cohort of ten out of more and more clients."""
    sizes = (10, 100, 1000, 10_000)[:: 3 if few else 1]
    names = {f"{size:,} clients": size for size in sizes}
    return Case("small", 10, 10, 10, 10, dict.fromkeys(names, ours(privacy)), populations=names)


def cohorts(privacy: dict[str, Any]) -> Case:
    """Larger and larger cohorts of 400 clients."""
    names = {f"cohort of {size}": size for size in (25, 50, 100, 200, 400)}
    return Case("MLP", 400, 50, 20, 2, dict.fromkeys(names, ours(privacy)), cohorts=names)


def cases(device: torch.device, quick: bool) -> dict[str, Case]:
    """Everything that is measured, by title."""
    gpu = device.type == "cuda"
    sides = contest(brief=quick or gpu, gpu=gpu)
    found = {"MLP, 50 of 200 clients": Case("MLP", 200, 50, 50, 1 if quick else 2, sides)}
    if not quick:
        found = {"CNN, 50 of 200 clients": Case("CNN", 200, 50, 50, 1, sides)} | found
    if not (quick or gpu):
        found["10 of more and more clients, FedAvg"] = growth(FEDAVG, few=False)
    found["10 of more and more clients, client+local"] = growth(AADP, few=quick or gpu)
    if not (quick or gpu):
        found["larger and larger cohorts, client+local"] = cohorts(AADP)
        found["100 of 400 clients"] = settings()
    return found


def settings() -> Case:
    """One cohort of a hundred clients, without privacy and under the settings of whole updates."""
    private = {"client+local": ours(AADP), "client+aggregator": ours(AGGREGATED)}
    return Case("MLP", 400, 100, 20, 2, {"no privacy": ours(FEDAVG)} | private)


def build(case: Case, name: str, device: torch.device) -> dict[str, Any]:
    """What the engine of a side is given."""
    from fl_lightning.accounting.cohort import cohort_schedule
    from fl_lightning.data.partition import iid_partition

    clients, cohort = case.populations.get(name, case.clients), case.cohorts.get(name, case.cohort)
    seed, batch = 1, 10
    x, y, x_test, y_test, source = images(clients * case.records, small=case.network == "small")
    partition = iid_partition(len(x), clients, seed)
    owners = torch.stack([torch.as_tensor(partition.client(k)) for k in range(clients)])
    return {
        "network": case.network, "x": x, "y": y, "x_test": x_test, "y_test": y_test,
        "source": source, "owners": owners, "seed": seed, "batch": batch,
        "steps": case.records // batch, "lr": federation.LR, "device": device.type,
        "schedule": torch.from_numpy(cohort_schedule(clients, cohort, PLANNED, seed)),
        "options": case.sides[name].options,
    }  # fmt: skip


def images(count: int, small: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, str]:
    """Fashion-MNIST where it lies on this machine, else blurred noise around ten means."""
    held = 2000
    if not small:
        from fl_lightning.data import fashion_mnist

        try:
            data = fashion_mnist()
            return (
                data.x_train[:count].clone(), data.y_train[:count].clone(),
                data.x_test[:held].clone(), data.y_test[:held].clone(), "Fashion-MNIST",
            )  # fmt: skip
        except FileNotFoundError:
            pass
    generator = torch.Generator().manual_seed(2)
    side = 8 if small else 28
    means = torch.randn(10, 1, side, side, generator=generator)
    y = torch.randint(10, (count + held,), generator=generator)
    x = means[y] + 2 * torch.randn(count + held, 1, side, side, generator=generator)
    return x[:count], y[:count], x[count:], y[count:], "synthetic"


def launch(side: Side, problem: dict[str, Any]) -> Engine:
    """Start a side.

    Raises:
        ImportError: Its library or environment is not there.
        NotImplementedError: It takes no part.
    """
    if side.no_part:
        raise NotImplementedError(side.no_part)
    python = str(PYTHON) if side.elsewhere else sys.executable
    if side.elsewhere and problem["device"] == "cuda":
        raise ImportError("measured on a CPU only")
    if side.elsewhere and not PYTHON.exists():
        raise ImportError(f"no environment {PYTHON.parent.parent.name}: make bench-peers")
    cores = torch.get_num_threads()
    threads = max(1, cores // side.processes)
    command = [python, "-m", "bench.engine", side.engine]
    return Engine(command, problem, {"OMP_NUM_THREADS": str(threads)})


def run(device: torch.device, *, quick: bool, budget: float, only: str = "") -> dict:
    """Every comparison, or those that are named; `budget` seconds for all of them together."""
    todo = {
        title: partial(measure_case, case, device, quick=quick)
        for title, case in cases(device, quick).items()
        if only in title
    }
    return measure.every_case("rounds", todo, budget)


def measure_case(case: Case, device: torch.device, budget: float, quick: bool) -> dict:
    """Start and gate every side, then time those that passed, in turns."""
    entries: dict[str, dict] = {}
    engines: dict[str, Engine] = {}
    problems: dict[str, dict] = {}
    known: dict[tuple, Reference] = {}
    begun = time.perf_counter()
    try:
        for name, side in case.sides.items():
            print(f"  {name}: starting", flush=True)
            entries[name] = entry = {
                "kind": side.kind,
                "clips": "layer" if side.private else "none",
            }
            entry["processes"] = side.processes
            try:
                problems[name] = problem = build(case, name, device)
                key = (len(problem["owners"]), problem["schedule"].shape[1])
                first = time.perf_counter()
                engines[name] = engine = launch(side, problem)
                engine.rounds(1)
                entry["first_call"] = time.perf_counter() - first
                entry["version"] = engine.version
                if key not in known:
                    known[key] = Reference(problem)
                entry["gate"] = gate(engine, side, problem, known[key])
            except Exception as error:
                note_failure(name, entry, error)
                if name in engines:
                    engines.pop(name).close()
        timers = {name: lambda e=engine: e.rounds(case.turn) for name, engine in engines.items()}
        left = budget - (time.perf_counter() - begun)

        def failed(name: str, error: Exception) -> None:
            note_failure(name, entries[name], error)

        samples = measure.interleaved(timers, 5 if quick else 25, 0.8 * left, failed)
        finish(case, engines, entries, problems, samples)
    finally:
        for engine in engines.values():
            engine.close()
    first = next(iter(problems.values()))
    return {
        "network": case.network, "clients": case.clients, "cohort": case.cohort,
        "records": case.records, "batch": first["batch"], "steps": first["steps"],
        "source": first["source"], "populations": case.populations, "cohorts": case.cohorts,
        "rounds_a_turn": case.turn, "sides": entries,
    }  # fmt: skip


def finish(
    case: Case,
    engines: dict[str, Engine],
    entries: dict[str, dict],
    problems: dict[str, dict],
    samples: dict[str, list[float]],
) -> None:
    """Times, memory and accuracy into the entries; accuracies must agree."""
    for name, seconds in samples.items():
        entry, engine = entries[name], engines[name]
        entry["seconds"] = seconds
        entry["accuracy"] = federation.accuracy(problems[name], engine.model()[0])
        entry["peak"] = engine.peak(case.turn)
        problem = problems[name]
        entry["data"] = sum(problem[k].nbytes for k in ("x", "y", "x_test", "y_test"))
        print(
            f"  {name}: {1e3 * measure.quantiles(seconds)[0]:.1f} ms a round, accuracy "
            f"{entry['accuracy']:.3f}, {(entry['peak'] or 0) / 1e6:.0f} MB",
            flush=True,
        )
    if case.populations or case.cohorts:
        return
    public = {
        n: e["accuracy"] for n, e in entries.items() if "accuracy" in e and e["clips"] == "none"
    }
    # Rounding grows with the rounds; a hundredth is the sampling error of the test records.
    if public and max(public.values()) - min(public.values()) > 0.01:
        raise parity.ParityError(f"accuracies after the same rounds differ: {public}")


class Reference:
    """Models of the plain loop after one round and after the gated ones, clipped and not."""

    def __init__(self, problem: dict[str, Any]) -> None:
        self.local, self.problem = federation.Local(problem), problem
        self.models: dict[tuple[float | None, int], dict[str, Tensor]] = {}

    def after(self, rounds: int, clip: float | None) -> dict[str, Tensor]:
        """The model after some rounds with an L2 clip norm of each layer's update."""
        if rounds == 0:
            return federation.start(self.problem)
        if (clip, rounds) not in self.models:
            before = self.after(rounds - 1, clip)
            self.models[clip, rounds] = self.local.round(before, rounds - 1, clip)
        return self.models[clip, rounds]


def gate(engine: Engine, side: Side, problem: dict[str, Any], reference: Reference) -> str:
    """Compare the model of an engine that has done one round.

    Raises:
        parity.ParityError: It is another one.
    """
    if not side.private:
        engine.rounds(GATED_ROUNDS - 1)
        check_model(
            engine.model()[0], reference.after(GATED_ROUNDS, None), reference.after(0, None)
        )
        return "equal model"
    layers = len({name.rpartition(".")[0] for name in federation.start(problem)})
    clip = CLIP / math.sqrt(layers)
    model, facts = engine.model()
    # One client is exchanged for another, or its update for nothing.
    moves = 2 if side.options["privacy"]["setting"] == "client+local" else 1
    cohort = problem["schedule"].shape[1]
    check_noise(model, reference.after(1, clip), Path(facts["folder"]), cohort=cohort, moves=moves)
    silent = {"noise_multiplier": 0.0, "thresholds": "fixed"}
    options = {**side.options, "privacy": {**side.options["privacy"], **silent}}
    quiet = launch(side, problem | {"options": options})
    try:
        quiet.rounds(GATED_ROUNDS)
        check_model(quiet.model()[0], reference.after(GATED_ROUNDS, clip), reference.after(0, None))
    finally:
        quiet.close()
    return "equal clipped model, noise as stated"


def check_model(
    have: dict[str, Tensor], want: dict[str, Tensor], start: dict[str, Tensor], rtol: float = 1e-3
) -> None:
    """Models are equal to a part of what was learnt, which float32 sums in other orders keep to.

    Raises:
        parity.ParityError: Otherwise.
    """
    for name, value in want.items():
        learnt = float((value - start[name]).abs().max())
        worst = float((have[name] - value.cpu()).abs().max())
        if not worst <= rtol * learnt:
            raise parity.ParityError(f"{name} is off by {worst:.1e}, learnt was {learnt:.1e}")


def check_noise(
    have: dict[str, Tensor], want: dict[str, Tensor], folder: Path, *, cohort: int, moves: int
) -> None:
    """The noise in the mean is that of the round's table, and the table keeps the multiplier.

    Raises:
        parity.ParityError: Otherwise.
    """
    with (folder / "layers.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["round"] == "0"]
    names = list(dict.fromkeys(row["layer"] for row in rows))
    budget = 0.0
    for layer in names:
        own = [row for row in rows if row["layer"] == layer]
        scales = [float(row["noise_scale"]) for row in own]
        budget += (moves * float(own[0]["clip_norm"]) / scales[0]) ** 2
        noise = torch.cat([(have[n] - want[n].cpu()).flatten() for n in want
                           if n.rpartition(".")[0] == layer]).double()  # fmt: skip
        ratio = float(noise.square().mean().sqrt()) / (math.hypot(*scales) / cohort)
        # Five standard deviations of an empirical standard deviation.
        if not abs(ratio - 1) <= 5 / math.sqrt(2 * noise.numel()):
            raise parity.ParityError(f"noise of {layer} is {ratio:.3f} of what is stated")
    if abs(budget - 1 / AADP["noise_multiplier"] ** 2) > 1e-3 * budget:
        raise parity.ParityError(f"clip norms and noise give a multiplier of {budget**-0.5:.3f}")


def note_failure(name: str, entry: dict, error: Exception) -> None:
    """Why a side is not timed: ours must not fail, others are skipped."""
    from bench.kernels import note_failure as note

    note(name, entry, error)
