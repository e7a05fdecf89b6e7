"""What a server can see of a record in the release of the client that holds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fl_lightning.attacks import analytic, intervals
from fl_lightning.attacks.attacked import load_run
from fl_lightning.attacks.optimised import Search, invert
from fl_lightning.attacks.victim import Upload, check_victim, upload, victims
from fl_lightning.data import FederatedDataModule
from fl_lightning.module import FederatedModule

ANALYTIC, SEARCH, NOTHING = "first dense layer", "search", "no release: the mean image"
TRUTH = "records"


@dataclass(frozen=True)
class Inversion:
    """What attacks made of the releases of some clients. Private: it shows records.

    Args:
        images: by attack, what it found [V·B, ...] in [0, 1]; `TRUTH` are the records.
        figures: SSIM, PSNR or shares of tokens with intervals, as JSON.
    """

    images: Mapping[str, Tensor]
    figures: Mapping[str, Any]


def invert_run(
    folder: str | Path,
    *,
    count: int = 8,
    records: int = 1,
    search: Search | None = None,
    seed: int = 0,
) -> Inversion:
    """Attack what a client of a finished run would send in round 0; the folder is only read.

    Args:
        folder: of the run.
        count: clients, each with records of its own.
        records: of each.
        search: how the attacker searches; None: as tuned.
        seed: of the attacker.

    Raises:
        FileNotFoundError, LedgerError, ValueError: see `load_run`, `victims` and `attack`.
    """
    run = load_run(folder)
    multiplier = None if run.multiplier is None else float(run.multiplier[0])
    chosen = victims(run.data, count=count, records=records, seed=seed)
    return attack(
        run.module, run.data, chosen, multiplier=multiplier, search=search or Search(), seed=seed
    )


def attack(
    module: FederatedModule,
    data: FederatedDataModule,
    chosen: Sequence[tuple[Tensor, Tensor]],
    *,
    multiplier: float | None,
    search: Search,
    seed: int,
) -> Inversion:
    """Make the releases and attack them by every way that the network leaves open.

    Args:
        module: of the run, with the network that the releases are made from.
        data: of the run, for what is public of it.
        chosen: records [B, ...] and labels [B] of each client.
        multiplier: noise multiplier of the clients; None without privacy.
        search: how the attacker searches.
        seed: of noise and guesses.

    Raises:
        ValueError: records are neither images in [0, 1] nor tokens, or no single release is seen.
    """
    check_victim(module)
    text = not data.x.is_floating_point()
    low, high = (0.0, 1.0) if text else span_of(data.x)
    uploads = [
        upload(module, x, y, multiplier=multiplier, seed=seed + i)
        for i, (x, y) in enumerate(chosen)
    ]
    facts: dict[str, Any] = {
        "setting": module.privacy.setting,
        "noise_multiplier": multiplier,
        "clients": len(chosen),
        "records": len(chosen[0][0]),
    }
    if text:
        return Inversion({}, facts | {"tokens": _tokens(module, uploads, chosen)})
    labels, right = _labels(module, uploads, chosen)
    truth = torch.cat([x for x, _ in chosen])
    shape = tuple(data.x.shape[1:])
    shape = tuple(data.x.shape[1:])
    found = {SEARCH: invert(module, uploads, labels, shape, (low, high), search=search, seed=seed)}
    first = analytic.first_dense(module.network)
    if first is not None and len(chosen[0][0]) == 1:
        found[ANALYTIC] = torch.stack([_analytic(u, first[0], shape, (low, high)) for u in uploads])
    images = {n: _matched(v, chosen) for n, v in found.items()}
    images[NOTHING] = _mean_of_others(data.x, truth).expand_as(truth)
    truth, *rest = ((v - low) / (high - low) for v in (truth, *images.values()))
    images = dict(zip(images, rest, strict=True))
    figures = {n: quality(v, truth) for n, v in images.items()}
    return Inversion(
        {TRUTH: truth, **images}, facts | {"labels_right": asdict(right), "attacks": figures}
    )


def quality(found: Tensor, truth: Tensor) -> dict[str, Any]:
    """SSIM and PSNR in dB of images [n, (C,) H, W] in [0, 1], means with intervals, and each."""
    from torchmetrics.functional.image import (
        peak_signal_noise_ratio,
        structural_similarity_index_measure,
    )

    one, other = (_with_channel(v.float()) for v in (found, truth))
    similar = structural_similarity_index_measure(one, other, data_range=1.0, reduction="none")
    # An exact copy would have infinitely many dB.
    noise = peak_signal_noise_ratio(
        one, other, data_range=1.0, reduction="none", dim=(1, 2, 3)
    ).clamp(max=100.0)
    assert isinstance(similar, Tensor)
    return {
        "ssim": asdict(intervals.mean(similar.reshape(-1).tolist())),
        "psnr": asdict(intervals.mean(noise.reshape(-1).tolist())),
        "ssim_of_each": [round(v, 4) for v in similar.reshape(-1).tolist()],
    }


def _with_channel(images: Tensor) -> Tensor:
    return images[:, None] if images.ndim == 3 else images


def span_of(x: Tensor) -> tuple[float, float]:
    """The public range of pixels, from 0 or from -1 to 1.

    Raises:
        ValueError: records are no images, or lie in neither range.
    """
    if x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[1] not in (1, 3)):
        raise ValueError(
            f"records of shape {[*x.shape[1:]]} are no images; inversion is shown for images "
            "[H, W] or [C, H, W] and for tokens"
        )
    low, high = float(x.min()), float(x.max())
    if low < -1 or high > 1:
        raise ValueError(f"records from {low:g} to {high:g}: pixels must be in [0, 1] or [-1, 1]")
    return (0.0 if low >= 0 else -1.0), 1.0


def _labels(
    module: FederatedModule, uploads: Sequence[Upload], chosen: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, intervals.Estimate]:
    """Inferred labels [V, B], and how many of them are right; the true ones without a last bias."""
    name = analytic.last_bias(module.network)
    truth = torch.stack([y.sort().values for _, y in chosen])
    if name is None or name not in uploads[0].gradient:
        return truth, intervals.share(truth.numel(), truth.numel())
    guessed = [analytic.labels_of(u.gradient[name], u.records).sort().values for u in uploads]
    labels = torch.stack(guessed)
    return labels, intervals.share(int((labels == truth).sum()), truth.numel())


def _analytic(sent: Upload, name: str, shape: Sequence[int], span: tuple[float, float]) -> Tensor:
    """Image of one record [1, *shape] from the first dense layer."""
    prefix = f"{name}." if name else ""
    weight, bias = sent.gradient[f"{prefix}weight"], sent.gradient[f"{prefix}bias"]
    if sent.noise[f"{prefix}weight"] == 0:
        row = analytic.dense_input(weight, bias)
    else:
        row = analytic.direction_of_input(weight, bias, positive=span[0] == 0)
        row = row / row.abs().quantile(0.99).clamp(min=1e-12)
    return row.clamp(*span).reshape(1, *shape)


def _matched(found: Tensor, chosen: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Each client's images in the order that fits its records best, [V·B, ...]."""
    from scipy.optimize import linear_sum_assignment

    rows = []
    for images, (x, _) in zip(found, chosen, strict=True):
        cost = (images[:, None] - x[None]).square().flatten(2).mean(2)
        which, place = linear_sum_assignment(cost.numpy())
        rows.append(images[torch.from_numpy(which[np.argsort(place)])])
    return torch.cat(rows)


def _mean_of_others(x: Tensor, truth: Tensor) -> Tensor:
    """The mean of all records but the attacked ones: what is known without any release."""
    return (x.sum(0) - truth.sum(0)) / max(1, len(x) - len(truth))


def _tokens(
    module: FederatedModule, uploads: Sequence[Upload], chosen: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, Any]:
    """Share of a client's tokens that are found, and of those found that are right."""
    names = [n for n, m in module.network.named_modules() if isinstance(m, nn.Embedding)]
    names = [n for n in names if f"{n}.weight" in uploads[0].gradient]
    if not names:
        raise ValueError(f"network={type(module.network).__name__}: it trains no embedding")
    name = f"{names[0]}.weight"
    recall, precision, known = [], [], []
    for sent, (x, _) in zip(uploads, chosen, strict=True):
        truth = set(x.flatten().tolist())
        found = set(analytic.tokens_of(sent.gradient[name], noise=sent.noise[name]))
        recall.append(len(found & truth) / len(truth))
        precision.append(len(found & truth) / max(1, len(found)))
        told = analytic.tokens_of(sent.gradient[name], noise=1.0, count=len(truth))
        known.append(len(set(told) & truth) / len(truth))
    vocabulary = uploads[0].gradient[name].shape[0]
    mean = float(np.mean([len(set(x.flatten().tolist())) for x, _ in chosen]))
    return {
        "found": asdict(intervals.mean(recall)),
        "right": asdict(intervals.mean(precision)),
        "found_if_their_number_is_known": asdict(intervals.mean(known)),
        "by_chance_if_their_number_is_known": mean / vocabulary,
    }


def picture(found: Inversion) -> Any:
    """Figure: the records, and what each attack made of them; None for text."""
    from fl_lightning.attacks.pictures import gallery

    if not found.images:
        return None
    rows = {name: [_shown(i) for i in images[:12]] for name, images in found.images.items()}
    attacks = found.figures["attacks"]
    names = {n: n if n == TRUTH else f"{n}\nSSIM {attacks[n]['ssim']['value']:.2f}" for n in rows}
    columns = [""] * len(rows[TRUTH])
    return gallery({names[n]: v for n, v in rows.items()}, columns)


def _shown(image: Tensor) -> np.ndarray:
    image = image.float()
    if image.ndim == 3:
        image = image[0] if len(image) == 1 else image.movedim(0, -1)
    return image.numpy()
