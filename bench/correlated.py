"""Correlated noise: what it leaves in a model and costs in time; `python -m bench correlated`.

The noise of the last model is computed from matrices and simulated; nothing is trained. Times are
of whole releases, independent and correlated ones in turns.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from aadp_kernels import Correlation, NoiseKey, privatize_
from aadp_kernels.factorization import (
    best_coefficients,
    last_of_sgd,
    model_noise,
    separated_sensitivity,
    sgd_workload,
)
from bench import machine, measure, pages
from bench.cases import CASES
from bench.problem import Problem

RESULTS = machine.ROOT / "bench" / "results" / "correlated.json"
IMAGE = machine.ROOT / "docs" / "images" / "correlated.png"
PAGE = machine.ROOT / "docs" / "correlated.md"
ROUNDS, PERIOD, RATE, DELTA = 200, 20, 0.05, 1e-4  # 1,000 clients, 50 a round
BANDS, EPSILONS, MOMENTA = (2, 4, 8), (1.0, 3.0, 8.0), (0.0, 0.9)
SPEED_CASES, SPEED_BANDS = ("resnet18", "gpt2"), (1, 2, 4)


def run_all() -> None:
    """Compute, measure, and write the page's figures."""
    found = {"machine": machine.record(torch.device("cpu")), "noise": noise(), "speed": speed()}
    found["draw"] = draw_parts()
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    report()


def coefficients(bands: int, momentum: float) -> tuple[float, ...]:
    """The best ones for the last model of the setting above."""
    last = last_of_sgd([1.0] * ROUNDS, momentum=momentum)
    return best_coefficients(bands, last, _sensitivity)


def _sensitivity(d: Any) -> float:
    return separated_sensitivity(d, ROUNDS, PERIOD)


def noise() -> list[dict[str, Any]]:
    """Noise of the last model for each server and number of bands, at equal guarantees."""
    rows = []
    for momentum in MOMENTA:
        last = last_of_sgd([1.0] * ROUNDS, momentum=momentum)
        alone = _sensitivity((1.0,)) * model_noise((1.0,), last)
        for bands in BANDS:
            d = coefficients(bands, momentum)
            computed = _sensitivity(d) * model_noise(d, last)
            rows.append(
                {
                    "momentum": momentum, "bands": bands, "coefficients": d,
                    "of_independent": computed / alone,
                    "simulated": _simulated(d, last) * _sensitivity(d) / alone,
                    "of_poisson": {e: computed / _poisson(e, last) for e in EPSILONS},
                }
            )  # fmt: skip
        rows.append(
            {
                "momentum": momentum, "bands": 1, "of_independent": 1.0,
                "of_poisson": {e: alone / _poisson(e, last) for e in EPSILONS},
            }
        )  # fmt: skip
    return rows


def _simulated(d: tuple[float, ...], last: np.ndarray, elements: int = 40_000) -> float:
    """Standard deviation of the last model's noise, drawn by the kernels."""
    from aadp_kernels import sample_noise

    key, model = NoiseKey.from_seed(1), torch.zeros(elements, dtype=torch.float64)
    for t, weight in enumerate(last[0].tolist()):
        model += weight * sample_noise(
            (elements,), mechanism="gaussian", scale=1.0, key=key, step=t,
            correlation=Correlation(d), dtype=torch.float64,
        )  # fmt: skip
    return float(model.std())


@functools.cache
def _sigma(epsilon: float) -> tuple[float, float]:
    """Noise multipliers: of one Gaussian event, and of each of `ROUNDS` Poisson sampled ones."""
    from fl_lightning.accounting.composition import calibrate

    common = {"mechanism": "gaussian", "epsilon": epsilon, "delta": DELTA}
    one = calibrate(sampling_rate=1.0, steps=1, **common)
    return one, calibrate(sampling_rate=RATE, steps=ROUNDS, **common)


def _poisson(epsilon: float, last: np.ndarray) -> float:
    """Noise of the last model with secret Poisson cohorts, for one event's multiplier 1."""
    one, sampled = _sigma(epsilon)
    return sampled / one * model_noise((1.0,), last)


def speed() -> list[dict[str, Any]]:
    """Seconds of `privatize_`, wide noise, in turns; and of noise that is stored."""
    rows = []
    for name in SPEED_CASES:
        problem = Problem.build(CASES[name], torch.device("cpu"), p=2, mechanism="gaussian")
        sides = {_name(bands): _release(problem, coefficients(bands, 0.9)) for bands in SPEED_BANDS}
        sides["4 bands, stored"] = _stored(problem, coefficients(4, 0.9))
        timers = {
            side: measure.timer(run, problem.device, before=lambda: None)
            for side, run in sides.items()
        }
        for timer in timers.values():
            timer()
        rows.append({"case": name, "elements": problem.elements,
                     "seconds": measure.interleaved(timers, 15, 120.0)})  # fmt: skip
    return rows


def _name(bands: int) -> str:
    return "independent" if bands == 1 else f"{bands} bands"


def _release(problem: Problem, d: tuple[float, ...]) -> Callable[[], None]:
    key, step = NoiseKey.random(), iter(range(8, 1 << 31))
    scale = torch.full_like(problem.clip, problem.scale)
    correlation = None if len(d) == 1 else Correlation(d)

    def run() -> None:
        privatize_(
            problem.tensors, layout=problem.layout, clip=problem.clip, scale=scale, p=2,
            mechanism="gaussian", key=key, step=next(step), correlation=correlation,
        )  # fmt: skip

    return run


def _stored(problem: Problem, d: tuple[float, ...]) -> Callable[[], None]:
    """The same with the noise of the last steps in memory: our clip and noise, torch's sums."""
    key, step = NoiseKey.random(), iter(range(1 << 31))
    zero, scale = torch.zeros_like(problem.clip), torch.full_like(problem.clip, problem.scale)
    shapes = [torch.zeros_like(t) for t in problem.tensors]
    kept = [[t.clone() for t in shapes] for _ in d[1:]]

    def run() -> None:
        privatize_(
            problem.tensors, layout=problem.layout, clip=problem.clip, scale=zero, p=2,
            mechanism="gaussian", key=None, step=0,
        )  # fmt: skip
        fresh = kept.pop()
        for t in fresh:
            t.zero_()
        privatize_(
            fresh, layout=problem.layout, clip=problem.clip * math.inf, scale=scale, p=2,
            mechanism="gaussian", key=key, step=next(step),
        )  # fmt: skip
        for i, value in enumerate(problem.tensors):
            value.add_(fresh[i])
            for back, earlier in enumerate(kept, 1):
                value.add_(earlier[i], alpha=d[back])
        kept.insert(0, fresh)

    return run


def draw_parts(tiles: int = 50, times: int = 2000) -> dict[str, Any]:
    """Nanoseconds an element of what a band repeats, on one thread: the least of many times."""
    from aadp_kernels._cpu import rng, sum_and_write, transform
    from aadp_kernels._cpu._jit import jit

    fill, gaussian, add = rng.fill_words, transform._wide_gaussian, sum_and_write._add_multiple
    whole, size = transform.wide_tile, transform.TILE
    generator = rng.Generator.build("chacha20", list(range(8)), 1)
    words, rows = np.zeros(rng.WORDS, np.uint32), np.zeros(size // 2)
    noise, total = np.zeros(size), np.zeros(size)
    signed = words.view(np.int32)

    # A tile has two fills of words and two transforms.
    @jit
    def of_words(words, state, rounds, blocks, count):
        for k in range(count):
            state[0] = np.uint32(k)
            fill(words, state, rounds, blocks)
            fill(words, state, rounds, blocks)

    @jit
    def of_transform(words, rows, count):
        for _ in range(count):
            gaussian(words, rows)
            gaussian(words, rows)

    @jit
    def of_tile(noise, words, rows, state, rounds, blocks, count):
        for k in range(count):
            whole(noise, words, rows, state, rounds, blocks, k, True)

    @jit
    def of_sum(total, noise, count):
        for _ in range(count):
            add(total, -0.5, noise)

    parts = {
        "ChaCha20": functools.partial(of_words, words, *generator),
        "words to Gaussian noise": functools.partial(of_transform, signed, rows),
        "whole draw": functools.partial(of_tile, noise, words, rows, *generator),
        "adding a draw": functools.partial(of_sum, total, noise),
    }
    least = dict.fromkeys(parts, math.inf)
    for _ in range(times):  # in turns
        for name, run in parts.items():
            least[name] = min(least[name], _seconds(run, tiles))
    least = {name: round(1e9 * found / (tiles * size), 3) for name, found in least.items()}
    return {"machine": machine.record(torch.device("cpu")), "ns": least}


def _seconds(run: Callable[[int], None], tiles: int) -> float:
    start = time.perf_counter()
    run(tiles)
    return time.perf_counter() - start


def draw_table(found: dict[str, Any]) -> str:
    whole = found["ns"]["whole draw"] + found["ns"]["adding a draw"]
    rows = [f"| {name} | {ns:.2f} ns | {ns / whole:.0%} |" for name, ns in found["ns"].items()]
    return "\n".join(["| part | an element | of a band |", "|---|---|---|", *rows])


def report() -> None:
    """The page's tables and its picture, from the committed figures."""
    found = json.loads(RESULTS.read_text())
    pages.put(PAGE, "noise", noise_table(found["noise"]))
    pages.put(PAGE, "speed", speed_table(found["speed"]))
    pages.put(PAGE, "draw", draw_table(found["draw"]))
    draw()


def noise_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| server momentum | noise | of independent noise | simulated | "
        + " | ".join(f"of Poisson cohorts, ε = {e:g}" for e in EPSILONS) + " |",
        "|---|---|---|---|" + "---|" * len(EPSILONS),
    ]  # fmt: skip
    for row in sorted(rows, key=lambda r: (r["momentum"], r["bands"])):
        simulated = f"{row['simulated']:.3f}" if "simulated" in row else ""
        poisson = " | ".join(f"{row['of_poisson'][str(e)]:.2f}" for e in EPSILONS)
        first = f"| {row['momentum']:g} | {_name(row['bands'])} | {row['of_independent']:.3f} |"
        lines.append(f"{first} {simulated} | {poisson} |")
    return "\n".join(lines)


def speed_table(rows: list[dict[str, Any]]) -> str:
    names = list(rows[0]["seconds"])
    lines = [
        "| network | elements | " + " | ".join(names) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    for row in rows:
        first = row["seconds"][names[0]]
        cells = [f"{1e3 * measure.quantiles(first)[0]:.0f} ms"]
        cells += [f"{measure.ratios(row['seconds'][n], first)[0]:.2f} ×" for n in names[1:]]
        lines.append(f"| {row['case']} | {row['elements']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw() -> None:
    """Noise of the model after each round, at equal guarantees of the whole run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained", sharey=False)
    for axis, momentum in zip(axes, MOMENTA, strict=True):
        workload = sgd_workload([1.0] * ROUNDS, momentum=momentum)
        for bands, colour in zip((1, 2, 4), ("#555555", "#0072B2", "#D55E00"), strict=True):
            d = coefficients(bands, momentum)
            each = [model_noise(d, row[None]) * _sensitivity(d) for row in workload]
            axis.plot(range(1, ROUNDS + 1), each, color=colour, label=_name(bands))
        axis.set(title=f"server momentum {momentum:g}", xlabel="round", ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e5e5e5", linewidth=0.6)
    axes[0].set_ylabel("noise in an element of the model")
    axes[0].legend(frameon=False)
    figure.savefig(IMAGE, dpi=110, metadata={"Software": None})
    plt.close(figure)
