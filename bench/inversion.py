"""What a server sees of one record in one release: images and tokens, before and after.

    python -m bench inversion               # a few minutes; writes results, pictures and the page

A client with one record of Fashion-MNIST releases once, by the project's own release path. The
whole ε is spent in that one release, which is the least noise that a run of this ε can have. The
search's weight of the total variation is chosen for each kind of privacy by records of its own.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from bench import machine, pages
from bench.accuracy_report import table
from fl_lightning import FederatedDataModule, FederatedModule, PrivacyConfig, from_arrays
from fl_lightning.accounting.budget import Budget
from fl_lightning.attacks.inversion import ANALYTIC, NOTHING, SEARCH, TRUTH, attack
from fl_lightning.attacks.optimised import Search
from fl_lightning.attacks.pictures import gallery, png
from fl_lightning.attacks.victim import victims
from fl_lightning.data.sources import load
from fl_lightning.models import CNN, MLP
from fl_lightning.text_model import CharTransformer

RESULTS = machine.ROOT / "bench" / "results" / "inversion.json"
PAGE = machine.ROOT / "docs" / "attacks.md"
IMAGES = machine.ROOT / "docs" / "images"
VICTIMS, STEPS, SEED, TUNING_SEED = 8, 300, 1, 2
VARIATIONS = (1e-3, 3e-2, 0.3)
CASES: dict[str, Mapping[str, Any]] = {
    "without privacy": {"setting": "none"},
    "abstract, nominal ε = 8": {"setting": "abstract", "mechanism": "laplace"},
    "ε = 8": {"epsilon": 8.0},
    "ε = 3": {"epsilon": 3.0},
    "ε = 1": {"epsilon": 1.0},
}
NETWORKS = {
    "dense": lambda: MLP(784, 10, hidden=[32]),
    "convolution": lambda: CNN(image_size=28, channels=[32], kernel_sizes=[8], strides=[4]),
}


def module_of(network: Any, options: Mapping[str, Any]) -> tuple[FederatedModule, float | None]:
    """A run of one round and one step, and the noise multiplier of its whole ε."""
    module = FederatedModule(network, PrivacyConfig(**options, seed=1), sampling_rate=1.0)
    if not module.privacy.private:
        return module, None
    budget = Budget(module.privacy, [1], 1.0, module.layout.dims)
    budget.calibrate(1)
    return module, float(budget.multiplier[0])


def made(name: str) -> Any:
    """A network of public random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NETWORKS[name]()


def images() -> FederatedDataModule:
    """A thousand training records, which victims are drawn from."""
    arrays = load("fashion_mnist")
    x, y = arrays.x_train[:1000], arrays.y_train[:1000]
    return FederatedDataModule(
        from_arrays(x, y, num_classes=10), num_clients=10, val_fraction=0.0, seed=0
    )


def texts() -> FederatedDataModule:
    """Windows of 80 characters of the license of this project."""
    text = (machine.ROOT / "LICENSE").read_text(encoding="ascii", errors="ignore")
    codes = torch.tensor([ord(c) for c in text])
    x = codes[: len(codes) // 81 * 81].view(-1, 81)
    return FederatedDataModule(
        from_arrays(x[:, :80], x[:, 80], num_classes=128, codes=True),
        num_clients=2,
        val_fraction=0.0,
    )


def tuned(data: FederatedDataModule, options: Mapping[str, Any]) -> Search:
    """The weight that other records are seen best with."""
    chosen = victims(data, count=4, records=1, seed=TUNING_SEED)
    found = {}
    for weight in VARIATIONS:
        module, z = module_of(made("dense"), options)
        search = Search(STEPS // 2, variation=weight, noisy_variation=weight)
        result = attack(module, data, chosen, multiplier=z, search=search, seed=TUNING_SEED)
        found[weight] = result.figures["attacks"][SEARCH]["ssim"]["value"]
    best = max(found, key=found.__getitem__)
    return Search(STEPS, variation=best, noisy_variation=best)


def run_all() -> None:
    """Attack every case, then write results, pictures and the page."""
    warnings.simplefilter("ignore")
    start, load_before = time.process_time(), os.getloadavg()[0]
    data, text = images(), texts()
    chosen = victims(data, count=VICTIMS, records=1, seed=SEED)
    windows = victims(text, count=VICTIMS, records=1, seed=SEED)
    found: dict[str, Any] = {"cases": {}}
    shown: dict[str, dict[str, list[np.ndarray]]] = {name: {} for name in NETWORKS}
    for case, options in CASES.items():
        search = tuned(data, options)
        own = found["cases"][case] = {"variation": search.variation}
        for name in NETWORKS:
            module, z = module_of(made(name), options)
            result = attack(module, data, chosen, multiplier=z, search=search, seed=SEED)
            own[name] = result.figures
            for attack_name, values in result.images.items():
                words = attack_name if attack_name == TRUTH else f"{case}\n{attack_name}"
                if attack_name != NOTHING:
                    shown[name][words] = [v[0].numpy() for v in values]
        module, z = module_of(CharTransformer(num_classes=128), options)
        own["text"] = attack(module, text, windows, multiplier=z, search=search, seed=SEED).figures
        print(case, round(time.process_time() - start, 1), "s", flush=True)
    found["cpu_seconds"] = round(time.process_time() - start, 1)
    found["load"] = round(load_before, 1)
    RESULTS.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n")
    for name, rows in shown.items():
        picture = gallery(rows, [""] * VICTIMS)
        (IMAGES / f"inversion_{name}.png").write_bytes(png(picture, dpi=80))
    report()


def results() -> dict[str, Any]:
    """Committed results; empty where nothing was run."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def image_table(found: dict[str, Any]) -> str:
    """SSIM and PSNR of every attack in every case."""
    rows = []
    for case, own in found["cases"].items():
        dense, convolution = (own[n]["attacks"] for n in NETWORKS)
        attacks = (dense[ANALYTIC], dense[SEARCH], convolution[SEARCH])
        label = 100 * own["dense"]["labels_right"]["value"]
        rows.append((case, *map(_quality, attacks), f"{label:.0f} %"))
    nothing = next(iter(found["cases"].values()))["dense"]["attacks"][NOTHING]
    rows.append(("mean image, no release at all", *[_quality(nothing)] * 3, "10 %"))
    head = ("privacy", "first dense layer", "search, dense", "search, convolution", "label right")
    return table(head, rows)


def _quality(one: dict[str, Any]) -> str:
    ssim, psnr = one["ssim"], one["psnr"]
    return f"{ssim['value']:.2f} ({ssim['low']:.2f}–{ssim['high']:.2f}), {psnr['value']:.0f} dB"


def text_table(found: dict[str, Any]) -> str:
    """Shares of tokens."""
    rows = []
    for case, own in found["cases"].items():
        tokens = own["text"]["tokens"]
        names = ("found", "right", "found_if_their_number_is_known")
        rows.append((case, *(f"{100 * tokens[n]['value']:.0f} %" for n in names)))
    chance = next(iter(found["cases"].values()))["text"]["tokens"]
    share = chance["by_chance_if_their_number_is_known"]
    rows.append(("by chance", "–", "–", f"{100 * share:.0f} %"))
    head = ("privacy", "tokens found", "of those named, right", "found, their number known")
    return table(head, rows)


def report() -> None:
    """The page's tables; nothing where nothing was run."""
    found = results()
    if not found:
        return
    note = (
        f"{VICTIMS} clients with one record each; means with 95 % intervals over them. "
        f"{found['cpu_seconds'] / 60:.0f} minutes of one CPU core."
    )
    text = f"{image_table(found)}\n\n{text_table(found)}\n\n{note}"
    pages.put(PAGE, "inversion", text)
