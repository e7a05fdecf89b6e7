"""Clients trained together against the same clients one after another, in one run.

    python -m bench.cohort run       # about two minutes, on a quiet machine
    python -m bench.cohort report    # write the table into docs/benchmarks.md

Times are of local training of one cohort (all local steps), interleaved, median of 9; both ways
must give the same updates, without noise, before anything is timed. "Chosen" is what
`execution: auto` takes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from aadp_kernels import Layout, NoiseKey
from bench import pages
from bench.headline import ROOT, machine
from fl_lightning.local.batches import Batch
from fl_lightning.local.execution import faster_execution
from fl_lightning.local.gradient import CohortGradient, plain_gradient
from fl_lightning.local.training import train_cohort
from fl_lightning.models import CNN, MLP
from fl_lightning.module import cross_entropy
from fl_lightning.privacy.clipping import clipped_sums
from fl_lightning.privacy.config import PrivacyConfig
from fl_lightning.privacy.history import ReleasedHistory
from fl_lightning.privacy.mechanism import PrivateRecordGradient

RESULTS = ROOT / "bench" / "results" / "cohort.json"
PLACE = (pages.BENCHMARKS, "cohort table")
REPEATS = 9


def networks() -> dict[str, nn.Module]:
    """About 20,000 and 51,000 parameters, on 28×28 images."""
    torch.manual_seed(0)
    return {
        "CNN": CNN(
            image_size=28, channels=[16, 32], kernel_sizes=[6, 4], strides=[2, 2], hidden=[]
        ),
        "MLP": MLP(in_features=784, hidden=[64]),
    }


def batches(clients: int, records: int, steps: int) -> list[Batch]:
    """Random records of the shape of Fashion-MNIST."""
    generator = torch.Generator().manual_seed(1)
    return [
        Batch(
            torch.randn(clients, records, 1, 28, 28, generator=generator),
            torch.randint(10, (clients, records), generator=generator),
            torch.ones(clients, records),
            torch.full((clients,), float(records)),
            torch.ones(clients, dtype=torch.bool),
        )
        for _ in range(steps)
    ]


def trainer(
    network: nn.Module, steps: list[Batch], private: bool, noise: float
) -> Callable[[bool], dict]:
    """Function (vectorize) → updates of the cohort."""
    layout = Layout.build(dict(network.named_parameters()))
    params = {name: p.detach() for name, p in network.named_parameters()}
    k = len(steps[0].x)

    def hook(vectorize: bool):
        if not private:
            return plain_gradient(CohortGradient(network, cross_entropy, vectorize=vectorize))
        sums = clipped_sums(
            network,
            cross_entropy,
            layout,
            p=2,
            vectorize=vectorize,
            max_examples=8192,
            example=steps[0].x[0, :1],
        )
        config = PrivacyConfig(noise_multiplier=noise, epsilon=None)
        return PrivateRecordGradient(
            sums,
            ReleasedHistory(config, k, layout.dims),
            layout,
            key=NoiseKey.from_seed(0),
            clients=torch.arange(k),
            multiplier=torch.full((k,), noise, dtype=torch.float64),
        )

    def run(vectorize: bool) -> dict[str, Tensor]:
        def stream() -> Iterator[Batch]:
            yield from steps

        with torch.no_grad():
            return train_cohort(params, stream(), hook(vectorize), lr=0.1)

    return run


def measure(network: nn.Module, steps: list[Batch], private: bool) -> dict:
    """Parity without noise first, then interleaved times with it."""
    silent = trainer(network, steps, private, noise=0.0)
    together, alone = silent(True), silent(False)
    for name, value in together.items():
        torch.testing.assert_close(value, alone[name], rtol=1e-3, atol=1e-4)
    run = trainer(network, steps, private, noise=1.0)
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(REPEATS):
        for vectorize in (True, False):
            start = time.perf_counter()
            run(vectorize)
            times[vectorize].append(time.perf_counter() - start)
    chosen, _ = faster_execution(run)
    return {
        "together": times[True],
        "alone": times[False],
        "chosen": "together" if chosen else "alone",
    }


def run_all() -> None:
    """Every case, into the result file."""
    cases = {}
    for name, network in networks().items():
        for clients, records, steps, private in (
            (50, 10, 5, False),
            (50, 10, 5, True),
            (10, 540, 1, True),
        ):
            size = sum(p.numel() for p in network.parameters())
            what = "record+local" if private else "no privacy"
            label = f"{name} {size / 1000:.0f}k, {clients} × {records}, {steps} steps, {what}"
            cases[label] = measure(network, batches(clients, records, steps), private)
            print(label, {k: v for k, v in cases[label].items() if k == "chosen"}, flush=True)
    text = json.dumps({"machine": machine(), "cases": cases}, indent=1, ensure_ascii=False)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(text + "\n")


def table() -> str:
    """Markdown table of the committed results."""
    lines = [
        "| clients × records a step | together | one after another | ratio | chosen |",
        "|---|---|---|---|---|",
    ]
    for label, case in json.loads(RESULTS.read_text())["cases"].items():
        together, alone = (statistics.median(case[key]) for key in ("together", "alone"))
        lines.append(
            f"| {label} | {1e3 * together:.0f} ms | {1e3 * alone:.0f} ms "
            f"| {alone / together:.2f} | {case['chosen']} |"
        )
    return "\n".join(lines)


def report() -> None:
    """Write the table into its page."""
    pages.put(*PLACE, table())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=["run", "report"])
    run_all() if parser.parse_args().action == "run" else report()
