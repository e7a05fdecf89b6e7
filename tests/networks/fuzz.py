"""Whether a random network is refused, or clipped exactly.

python -m tests.networks.fuzz 0 2000      seeds from 0 to 1999, and what is wrong
python -m tests.networks.fuzz 17          one seed: its source and what was seen
"""

from __future__ import annotations

import collections
import logging
import random
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fl_lightning.local.batches import Batch
from tests.networks.measure import difference, quiet, rule_of, spread, sums_of
from tests.networks.oracle import Gradients, Rule, clipped_sum, double, record_gradients
from tests.networks.product import (
    RECORD_SETTINGS,
    Product,
    Refused,
    Setting,
    Ways,
    accepted,
    batch_of,
    dataset,
)
from tests.networks.programs import Program, draw, shrink

# What one record may add, over what it is clipped to: alone and beside others.
BOUND = 1 + 1e-6
# Sums are float32; the largest seen of networks that are right is some 1e-5 clip norms a record.
ROUNDING = 2e-4
# Gradients that cancel have no more digits: so many times what float32 autograd is off by itself.
SLACK = 10
BATCH_SIZES = (0, 1, 2, 3, 4, 5)
POOL = 12
# Clip-in-backward is where most can go wrong.
_SETTINGS = (*(s for s in RECORD_SETTINGS if s.noise_form == "wide"), *RECORD_SETTINGS[::2]) + (
    Setting(),
) * 6


@dataclass(frozen=True)
class Verdict:
    """What came of one program.

    Args:
        outcome: "exact" or "refused", which are right; "moves", "differs" or "crash"; "invalid" for
            a program that plain autograd cannot run.
        way: what made the sums.
        figure: the largest move or difference.
        words: the project's, or an error's.
    """

    outcome: str
    way: str = ""
    figure: float = 0.0
    words: str = ""

    @property
    def right(self) -> bool:
        """Whether the project kept its word."""
        return self.outcome in ("exact", "refused", "invalid")


@dataclass(frozen=True)
class Trial:
    """A program with everything else that a seed decides."""

    program: Program
    setting: Setting
    clients: int
    sizes: tuple[int, ...]
    max_examples: int
    seed: int
    execution: str = "auto"

    def __str__(self) -> str:
        return (
            f"# seed {self.seed}: {self.setting}, {self.execution}; {self.clients} client(s), "
            f"batches of {self.sizes}, max_examples {self.max_examples}; "
            f"records: {self.program.kind}\n{self.program.source()}"
        )


def trial(seed: int) -> Trial:
    """The trial of a seed."""
    coins = random.Random(f"trial {seed}")
    return Trial(
        draw(seed), coins.choice(_SETTINGS), coins.choice((1, 1, 2)),
        tuple(coins.choice(BATCH_SIZES) for _ in range(2)), coins.choice((2**40, 2)), seed,
        coins.choice(("auto", "vmap")),
    )  # fmt: skip


def judge(trial: Trial, *, thorough: bool = True) -> Verdict:
    """Run the project's own code on a trial and compare it with the definition.

    Args:
        trial: what is run.
        thorough: more batches, and more records in the place of one.
    """
    program, generator = trial.program, torch.Generator().manual_seed(trial.seed)
    x = program.records(POOL, generator)
    y = torch.randint(0, 3, (POOL,), generator=generator)
    weights = [_weights(program, client) for client in range(trial.clients)]
    try:
        known = [_gradients(program, state, x, y) for state in weights]
    except Exception as error:
        return Verdict("invalid", words=repr(error))
    network, loss = program.make()
    network = quiet(network)
    given = None if program.loss == "cross entropy" else loss
    try:
        module, vmaps = accepted(network, given, dataset(x, y, 3), trial.setting, trial.execution)
    except Refused as refused:
        return Verdict("refused", words=str(refused))
    except Exception as error:
        return Verdict("crash", "check", words=repr(error))
    layout = module.layout
    rule = rule_of(trial.setting, layout.names, known[0])
    product = Product(
        module, trial.setting, rule, layout, Ways(vectorize=vmaps), trial.max_examples
    )
    params = [{n: state[n].detach().clone() for n in layout.names} for state in weights]
    try:
        return _compare(trial, product, params, known, x, y, 2 if thorough else 1)
    except Refused as refused:
        return Verdict("refused", str(product.ways), words=str(refused))
    except Exception as error:
        return Verdict("crash", str(product.ways), words=repr(error))


def _weights(program: Program, client: int) -> dict[str, Tensor]:
    """A client's weights: what is not trained is the same for all."""
    network, other = program.make()[0], program.make(client)[0]
    trained = {n for n, p in network.named_parameters(remove_duplicate=False) if p.requires_grad}
    own = other.state_dict()
    return {n: own[n] if n in trained else v for n, v in network.state_dict().items()}


def _gradients(program: Program, state: dict[str, Tensor], x: Tensor, y: Tensor) -> list[Gradients]:
    """The definition's gradients of one client's records."""
    network, loss = program.make()
    network.load_state_dict(state)
    # Random numbers are not compared, but a network that cannot run must show.
    return record_gradients(double(quiet(network)), loss.double(), x, y)


def _own_rounding(
    trial: Trial, rule: Rule, known: list[list[Gradients]], x: Tensor, y: Tensor
) -> float:
    """How far gradients by float32 autograd are from those in float64, in clip norms."""
    largest = 0.0
    for client, gradients in enumerate(known):
        network, loss = trial.program.make()
        network.load_state_dict(_weights(trial.program, client))
        for one, other in zip(record_gradients(quiet(network), loss, x, y), gradients, strict=True):
            sums = (clipped_sum([gradient], rule, gradient) for gradient in (one, other))
            largest = max(largest, spread(rule, *sums))
    return largest


def _compare(
    trial: Trial,
    product: Product,
    params: list[Gradients],
    known: list[list[Gradients]],
    x: Tensor,
    y: Tensor,
    effort: int,
) -> Verdict:
    """Sums against the definition, and how far single records move them."""
    coins = random.Random(f"records {trial.seed}")
    far = move = 0.0
    for size in trial.sizes[:effort]:
        rows = [coins.sample(range(POOL), coins.randint(0, size)) for _ in range(trial.clients)]
        rows[0] = coins.sample(range(POOL), size)
        batch = _padded(rows, x, y)
        if not trial.program.random:
            gradients = [[of[i] for i in some] for some, of in zip(rows, known, strict=True)]
            far = max(far, difference(product, params, batch, gradients))
        else:
            product.sums(params, batch)
        move = max(move, _moves(trial, product, params[:1], rows[0], x, y, effort, coins))
    way = str(product.ways)
    if not move <= BOUND:
        return Verdict("moves", way, move)
    if not far <= ROUNDING and not far <= SLACK * _own_rounding(trial, product.rule, known, x, y):
        return Verdict("differs", way, far)
    return Verdict("exact", way, max(move, far))


def _padded(rows: list[list[int]], x: Tensor, y: Tensor) -> Batch:
    """A batch of clients with different numbers of records, one row at least."""
    width = max(1, *map(len, rows))
    index = torch.tensor([some + [0] * (width - len(some)) for some in rows])
    mask = torch.tensor([[1.0] * len(some) + [0.0] * (width - len(some)) for some in rows])
    return batch_of(x[index], y[index], mask)


def _moves(
    trial: Trial,
    product: Product,
    params: list[Gradients],
    rows: list[int],
    x: Tensor,
    y: Tensor,
    effort: int,
    coins: random.Random,
) -> float:
    """The most that one record adds: alone, and to the others of a batch."""
    rule, largest = product.rule, 0.0
    some = coins.sample(range(POOL), 2 * effort - 1)
    for i in some[:effort]:
        alone = sums_of(product, params, _padded([[i]], x, y))
        largest = max(largest, *rule.moves(alone).values())
    if not rows:
        return largest
    place = coins.randrange(len(rows))
    others = rows[:place] + rows[place + 1 :]
    smaller = [sums_of(product, params, _without(rows, place, x, y))]
    if not trial.program.random:
        smaller.append(sums_of(product, params, _padded([others], x, y)))
    for record in (rows[place], *some):
        with_it = [*rows[:place], record, *rows[place + 1 :]]
        whole = sums_of(product, params, _padded([with_it], x, y))
        largest = max([largest, *(spread(rule, whole, less) for less in smaller)])
    return largest


def _without(rows: list[int], place: int, x: Tensor, y: Tensor) -> Batch:
    """The batch with padding in a record's place."""
    mask = torch.ones(1, len(rows))
    mask[0, place] = 0
    return batch_of(x[rows][None], y[rows][None], mask)


def smallest(trial: Trial, outcome: str) -> Trial:
    """The trial with the smallest program that comes out the same."""
    small = shrink(
        trial.program, lambda program: judge(replace(trial, program=program)).outcome == outcome
    )
    return replace(trial, program=small)


def run(
    seeds: Iterable[int], *, thorough: bool = True
) -> tuple[collections.Counter[str], list[tuple[Trial, Verdict]]]:
    """How many came out how, and those that are wrong."""
    counts: collections.Counter[str] = collections.Counter()
    wrong = []
    for seed in seeds:
        this = trial(seed)
        verdict = judge(this, thorough=thorough)
        counts[f"{verdict.outcome} {verdict.way}".strip()] += 1
        if not verdict.right:
            wrong.append((this, verdict))
    return counts, wrong


def report(wrong: list[tuple[Trial, Verdict]]) -> str:
    """The wrong ones as small as they go."""
    lines = []
    for this, verdict in wrong:
        small = smallest(this, verdict.outcome)
        seen = judge(small)
        lines.append(f"{seen.outcome} by {seen.way} {seen.figure:.6g} {seen.words[:300]}\n{small}")
    return "\n\n".join(lines)


def main(arguments: list[str]) -> None:
    """Command line; see the module."""
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    numbers = [int(a) for a in arguments]
    if len(numbers) == 1:
        print(trial(numbers[0]), judge(trial(numbers[0])), sep="\n")
        return
    counts, wrong = run(range(*numbers))
    print(*(f"{number:6d} {what}" for what, number in sorted(counts.items())), sep="\n")
    print(report(wrong))


if __name__ == "__main__":
    main(sys.argv[1:])
