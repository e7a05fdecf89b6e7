"""The ledger lines of a release: all that its ε follows from, and digests of what was seen."""

from __future__ import annotations

from collections.abc import Callable

from aadp_kernels import NoiseKey, grid
from fl_lightning.accounting.exactness import SamplerCost
from fl_lightning.keys import run_key
from fl_lightning.privacy.config import PrivacyConfig
from fl_lightning.release.claim import Books
from fl_lightning.values.event import NoiseEvent
from fl_lightning.values.release import Release
from fl_lightning.values.round import LayerPolicy


def line_writer(
    books: Books, privacy: PrivacyConfig, policy: LayerPolicy, key: NoiseKey, round: int, steps: int
) -> Callable[..., Release]:
    """Make the function that writes the ledger lines of one release.

    Args:
        books: of the run.
        privacy: the privacy configuration.
        policy: of the release's last noised step, one row a line.
        key: of its coins and noise.
        round: round number.
        steps: noised events in it.

    Returns:
        A function (row, client=, event=, extra=, first_step=, digest=, and what only a sum has) →
        the line of a row of the policy.
    """
    binding = run_key.public_name(key)
    clip_norm, shares = policy.clip_norm.tolist(), policy.shares.tolist()
    votes = policy.vote_noise_scale

    def write(
        row: int,
        *,
        client: int,
        event: NoiseEvent,
        extra: SamplerCost,
        first_step: int,
        digest: str,
        **of_sum: float | str | tuple[int, ...] | None,
    ) -> Release:
        return Release(
            client=client,
            round=round,
            attempt=len(books.ledger.find(client, round)),
            first_step=first_step,
            steps=steps,
            mechanism=event.mechanism,
            noise_multiplier=event.noise_multiplier,
            sampling_rate=event.sampling_rate,
            adjacency=event.adjacency,
            vote_noise_scale=None if votes is None else float(votes[row]),
            num_layers=len(clip_norm[row]),
            clip_norm=tuple(clip_norm[row]),
            shares=tuple(shares[row]),
            binding=binding,
            digest=digest,
            quantum=coarsest_grid(privacy, policy, row),
            epsilon_inflation=steps * extra.epsilon,
            tail_delta=steps * extra.delta,
            guarantee=privacy.guarantee,
            **of_sum,  # pyright: ignore[reportArgumentType]
        )

    return write


def coarsest_grid(privacy: PrivacyConfig, policy: LayerPolicy, row: int) -> float | None:
    """Coarsest grid of the released values of a row, None where they are not on a grid."""
    if privacy.noise_form != "grid":
        return None
    return float(grid.quantum(policy.noise_scale[row], privacy.mechanism).max())
