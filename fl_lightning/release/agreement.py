"""What server and node agree on before the first round, and never change: one JSON object.

The server proposes it; the node compares it with its holder's policy and keeps it. ε and δ are not
in it: they are the holder's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from fl_lightning.keys import binding, digests
from fl_lightning.local.rules import LocalTraining
from fl_lightning.privacy.comparators import Comparator
from fl_lightning.privacy.config import PrivacyConfig
from fl_lightning.rules import Rules

PROTOCOL = 2
# Of the holder, or of no meaning where one client releases for itself.
_NOT_PROPOSED = ("epsilon", "delta", "noise_multiplier", "comparator")


@dataclass(frozen=True)
class Agreement:
    """The terms of one client's part in one run. Public.

    Args:
        run: public name of the server's run.
        client: number of the client in the run, from 0.
        clients: clients of the run.
        network: `network_digest` of what is trained.
        rounds: rounds that the client's noise is planned for.
        span: rounds of the whole run, which private evaluations are planned for.
        privacy: options of `PrivacyConfig` without the holder's own.
        training: of `LocalTraining`.
    """

    run: str
    client: int
    clients: int
    network: str
    rounds: int
    span: int
    privacy: Mapping[str, Any]
    training: Mapping[str, Any]


def network_digest(network: nn.Module, loss: object) -> str:
    """Name of what is trained: source and structure of network and loss, shapes, frozen values.

    Args:
        network: its trained values do not count, whatever else it holds does.
        loss: function or module.

    Returns:
        64 hex digits, the same on every machine with the same source.
    """
    trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
    shapes = [f"{n}:{p.dtype}:{tuple(p.shape)}" for n, p in trained.items()]
    fixed = [t for n, t in network.state_dict().items() if n not in trained]
    if isinstance(loss, nn.Module):
        fixed += loss.state_dict().values()
    return digests.digest([binding.describe(network), binding.describe(loss), *shapes, *fixed])


def propose(
    rules: Rules, *, run: str, client: int, clients: int, network: str, rounds: int, span: int
) -> Agreement:
    """The terms that a server offers to one client.

    Args:
        rules: of the run.
        run, client, clients, network, rounds, span: as in `Agreement`.
    """
    privacy = {n: v for n, v in vars(rules.privacy).items() if n not in _NOT_PROPOSED}
    training = asdict(rules.training)
    return Agreement(run, client, clients, network, rounds, span, privacy, training)


def check_deployable(rules: Rules) -> None:
    """Whether nodes can keep the rules of a run.

    Raises:
        ValueError: naming the option and its value.
    """
    privacy = rules.privacy
    if privacy.setting == "client+secure_sum":
        _check_secure(privacy)
    elif privacy.setting not in ("record+local", "client+local"):
        raise ValueError(
            f"setting={privacy.setting!r}: nodes noise for themselves, under record+local, "
            "client+local or client+secure_sum; other settings are simulated only"
        )
    if privacy.comparator != Comparator():
        raise ValueError("comparator: rules of published methods are simulated only")
    if privacy.noise_multiplier is not None:
        raise ValueError(
            f"noise_multiplier={privacy.noise_multiplier}: nodes calibrate their noise to the ε of "
            "their holders; leave it null"
        )
    if rules.faults.dropout or rules.faults.deadline is not None:
        raise ValueError(
            f"dropout={rules.faults.dropout}, deadline={rules.faults.deadline}: with nodes nothing "
            "fails by chance; leave 0 and null, and give the nodes a timeout"
        )


def _check_secure(privacy: PrivacyConfig) -> None:
    """Whether nodes can add parts of the noise to a secure sum."""
    if privacy.mechanism != "gaussian":
        raise ValueError(
            f"mechanism={privacy.mechanism!r} with setting='client+secure_sum': what nodes send is "
            "rounded, and only for Gaussian parts that is shown to cost nothing"
        )
    if privacy.min_survivors is None:
        raise ValueError(
            "min_survivors=null: nodes need the number whose parts are to be the whole noise"
        )


def parse_agreement(terms: Any) -> Agreement:
    """The agreement of a message, each value of its type.

    Raises:
        ValueError: naming what is missing or of another type.
    """
    names = [*Agreement.__dataclass_fields__]
    if isinstance(terms, dict) and "span" not in terms:  # of a node that began under protocol 1
        terms = {**terms, "span": terms.get("rounds")}
    if not isinstance(terms, dict) or sorted(terms) != sorted(names):
        raise ValueError(f"terms must have {', '.join(names)}")
    for name in ("run", "network"):
        if not (isinstance(terms[name], str) and len(terms[name]) == 64 and _is_hex(terms[name])):
            raise ValueError(f"terms: {name} must be 64 hex digits")
    for name, least in (("client", 0), ("clients", 1), ("rounds", 1), ("span", 1)):
        if type(terms[name]) is not int or not least <= terms[name] < 2**31:
            raise ValueError(f"terms: {name} must be a whole number from {least}")
    if terms["client"] >= terms["clients"]:
        raise ValueError("terms: client must be below clients")
    if not all(isinstance(terms[name], dict) for name in ("privacy", "training")):
        raise ValueError("terms: privacy and training must be objects")
    return Agreement(**terms)


def _is_hex(text: str) -> bool:
    return all(c in "0123456789abcdef" for c in text)


def terms_of(agreement: Agreement) -> dict[str, Any]:
    """The agreement as a message holds it."""
    return asdict(agreement)


def privacy_of(agreement: Agreement, epsilon: float, delta: float) -> PrivacyConfig:
    """The privacy rules of an agreement with the holder's ε and δ.

    Raises:
        ValueError: an option that is unknown, of another type, or out of range.
    """
    return PrivacyConfig(**_typed(PrivacyConfig, agreement.privacy), epsilon=epsilon, delta=delta)


def training_of(agreement: Agreement) -> LocalTraining:
    """The local training of an agreement.

    Raises:
        ValueError: a rule that is unknown or of another type.
    """
    return LocalTraining(**_typed(LocalTraining, agreement.training))


def _typed(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values checked against the annotations of a class; only plain types are among them."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, skip={*_NOT_PROPOSED} if cls is PrivacyConfig else None)
    try:
        return parser.parse_object(dict(values)).as_dict()
    except (ArgumentError, TypeError, KeyError) as error:
        raise ValueError(f"terms: {' '.join(str(error).split())[:300]}") from error
