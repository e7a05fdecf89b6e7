"""Private evaluation: right answers of clients, bounded and noised."""

from __future__ import annotations

import torch
from torch import Tensor

from aadp_kernels import NoiseKey, sample_noise
from fl_lightning.privacy.config import PrivacyConfig


def bounded_answers(right: Tensor, records: Tensor, unit: str) -> Tensor:
    """What each client gives to an evaluation: one unit moves its number by at most 1.

    Args:
        right: right answers of each client [k]. Private.
        records: held-out records of each client, at least 1 [k]. Public.
        unit: "record": numbers of records, of which one is right or wrong; "client": the share of
            right ones, whatever the client's records are.

    Returns:
        float64 [k], from 0 to `records`, or to 1.
    """
    counted = torch.minimum(right.double().nan_to_num(0.0).clamp(min=0), records.double())
    return counted if unit == "record" else counted / records.double()


def noised_answers(
    answers: Tensor, multipliers: Tensor, clients: Tensor, privacy: PrivacyConfig, key: NoiseKey
) -> tuple[Tensor, Tensor]:
    """Release the clients' numbers, or under a trusted aggregator their one sum.

    Args:
        answers: of `bounded_answers`, of sensitivity 1 [k].
        multipliers: noise multiplier of each client [k]; sensitivity is 1, so it is the scale.
        clients: ids, which noise is drawn under [k].
        privacy: setting, mechanism and form of the noise.
        key: bound to the answers.

    Returns:
        (noised numbers, weights): [k] each, or [1] and [k] of a sum. In a sum a client weighs what
        keeps it within its own multiplier: z/z_k, z being the least, and z is the noise scale.
    """
    if privacy.summed:
        least = multipliers.min()
        weights = least / multipliers
        exact, scale = (weights * answers).sum()[None], least[None]
        clients = torch.zeros(1, dtype=torch.int64)
    else:
        weights, exact, scale = torch.ones_like(multipliers), answers, multipliers
    noise = sample_noise(
        exact.shape,
        mechanism=privacy.mechanism,
        scale=scale,
        key=key,
        step=0,
        client=clients,
        dtype=torch.float64,
        form=privacy.noise_form,
    )
    return exact + noise, weights
