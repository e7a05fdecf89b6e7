"""Take the result of a run away: `python -m fl_lightning.export RUN [--out FOLDER]`.

Writes the network as a plain state_dict (`model.safetensors`), a model card with what its privacy
is (`README.md`) and the run's privacy statement. Nothing secret of the run folder goes in.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_lightning.ledger import Ledger, LedgerError
from fl_lightning.output.console import say
from fl_lightning.privacy.simulated import simulated_reason

if TYPE_CHECKING:
    from torch import Tensor

_PREFIX = "network."


def export(run: str | Path, out: str | Path | None = None) -> Path:
    """Write the model of a finished or stopped run with its model card.

    Args:
        run: folder of the run.
        out: folder to write to; None is `RUN/export`. Files of an earlier export are replaced.

    Returns:
        The folder, with `model.safetensors`, `README.md` and `privacy_statement.md`.

    Raises:
        FileNotFoundError: no checkpoint there.
        LedgerError: the ledger cannot be trusted, is in use by a run, or misses releases that the
            model was made of.
        ValueError: the checkpoint has no network, is damaged, or does not say what run it is of.

    Guarantees:
        Epsilon and delta are recomputed from the ledger. Releases after the checkpoint are
        included: they left their clients, whatever became of the model. Network, data and setting
        are those of the checkpoint, whatever was asked for later. A run always gives the same
        bytes.

    Edge cases:
        | run | card |
        |---|---|
        | setting `none` | says that there is no privacy; no statement |
        | public seed, or a generator that is no basis for a claim | calls the run simulated |
        | `abstract` | calls epsilon nominal |
        | personal layers | says how a client fits its own |
        | low-rank adapters of peft | writes them beside the weights, in peft's format |
        | trained from Python | names the network's class, and not its arguments |
        | no test set, or a stopped run | the test accuracy is "-" |
    """
    from fl_lightning.ledger.statement import privacy_statement
    from fl_lightning.networks.adapters import write_adapters

    run = Path(run).expanduser()
    checkpoint = _load(run)
    known = checkpoint["aadp_fl"]["run"]
    weights = _network(checkpoint)
    with ExitStack() as stack:
        ledger = None
        if known["setting"] != "none":
            ledger = stack.enter_context(Ledger.open(run))
            written, needed = len(ledger), checkpoint["aadp_fl"]["releases"]
            if written < needed:
                raise LedgerError(
                    f"{ledger.path} has {written} releases, but the model was made of {needed}: "
                    "part of the ledger is missing, so nothing can be said of its privacy"
                )
        statement = None if ledger is None else privacy_statement(ledger)
        facts = _facts(run, known, ledger)
    folder = run / "export" if out is None else Path(out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: str(value) for name, value in facts.items()}
    (folder / "model.safetensors").write_bytes(to_safetensors(weights, {"format": "pt", **plain}))
    write_adapters(known["network"], weights, folder)
    card = _card(facts, known["network"], weights) + _personal_note(known.get("personal"))
    (folder / "README.md").write_text(card, encoding="utf-8")
    if statement is not None:
        (folder / "privacy_statement.md").write_text(statement, encoding="utf-8")
    return folder


def to_safetensors(weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A file in the format safetensors: the same bytes for the same arguments.

    The package itself writes several entries of metadata in an order that changes from one call to
    the next. Here the header is written once more, with them in their own order.
    """
    from safetensors.torch import save

    raw = save(dict(weights), dict(metadata))
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    header["__metadata__"] = dict(metadata)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + raw[end:]


def _load(run: Path) -> dict[str, Any]:
    """The checkpoint, which says what run it is of."""
    from fl_lightning.output.checkpoint import CHECKPOINT, AtomicCheckpointIO

    path = run / CHECKPOINT
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: is {run} the folder of a run?")
    checkpoint = AtomicCheckpointIO().load_checkpoint(path, map_location="cpu", weights_only=True)
    if "run" not in checkpoint.get("aadp_fl", {}):
        raise ValueError(f"{path} does not say what run it is of: it was saved by another version")
    return checkpoint


def _network(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    weights = {
        name.removeprefix(_PREFIX): value.detach().clone().contiguous()
        for name, value in sorted(checkpoint["state_dict"].items())
        if name.startswith(_PREFIX)
    }
    if not weights:
        raise ValueError("the checkpoint has no network")
    return weights


def _facts(run: Path, known: Mapping[str, Any], ledger: Ledger | None) -> dict[str, Any]:
    """What the card and the file's own metadata say, in order."""
    from fl_lightning.ledger.client_reports import (
        any_nominal,
        headline,
        report_clients,
        shared_noise,
    )
    from fl_lightning.ledger.risks import risk_figures, run_risks
    from fl_lightning.ledger.statement_search import search_sentence

    summary = run / "summary.json"
    found = json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else {}
    finished = found.get("rounds") == known["rounds"]
    facts: dict[str, Any] = {
        "network": known["network"]["class_path"],
        "data": known["source"],
        "clients": known["clients"],
        "partition": known["partition"],
        "rounds": known["rounds"],
        "test_accuracy": found.get("test_accuracy") if finished else None,
        "setting": known["setting"],
    }
    if finished and found.get("test_metrics"):
        facts["test_metrics"] = ", ".join(f"{n} {v:.4g}" for n, v in found["test_metrics"].items())
    if finished and "val_private_accuracy" in found:
        values = found["val_private_accuracy"], found["val_private_standard_error"]
        facts["private_validation_accuracy"] = "{:.4g}, noise {:.2g}".format(*values)
    if ledger is None:
        return {**facts, "privacy": "none: updates were released without noise"}
    header = ledger.header
    reports = report_clients(header, ledger.releases)
    active = [report for report in reports.values() if report.releases]
    kind = "nominal, no guarantee" if any_nominal(reports) else "proven"
    kind = "nominal, no guarantee" if header["setting"] == "abstract" else kind
    reason = simulated_reason(header)
    facts |= {"noise": shared_noise(header)} if shared_noise(header) else {}
    if header.get("search"):
        words = search_sentence(header).partition("costs ")[2]
        facts["chosen_by_a_search_of"] = words.partition(" (")[0]
    return facts | {
        "data": header.get("dataset", facts["data"]),
        "privacy": f"simulated: {reason}, protects nobody" if reason else kind,
        "epsilon": max((r.epsilon for r in active), default=0.0),
        "delta": max((r.delta for r in active), default=0.0),
        "largest_advantage_of_an_attack": risk_figures(run_risks(header, ledger.releases))[
            "attack_advantage_max"
        ],
        "summary": headline(reports),
        "unit": header["privacy_unit"],
        "trust": header["trust"],
        "adjacency": header["adjacency"],
        "mechanism": header["mechanism"],
        "noise_form": header.get("noise_form", "wide"),
        "ledger": f"{len(ledger)} releases, last hash {ledger.head_hash}",
    }


def _card(
    facts: Mapping[str, Any], network: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> str:
    """The model card in Markdown."""
    from fl_lightning.ledger.client_reports import show_bound, show_number

    show = {"epsilon": show_bound}
    shown = {
        name: "-"
        if value is None
        else show.get(name, show_number)(value)
        if isinstance(value, float)
        else value
        for name, value in facts.items()
    }
    rows = "\n".join(f"| {name.replace('_', ' ')} | {value} |" for name, value in shown.items())
    arguments = ", ".join(f"{k}={v!r}" for k, v in network.get("init_args", {}).items())
    if "init_args" not in network:
        arguments = "...  # the arguments that it was made with\n"
    module, _, name = network["class_path"].rpartition(".")
    count = sum(value.numel() for value in weights.values())
    return f"""\
# {name} trained with AADP-FL

A network of {count:,} parameters, trained by federated learning.

| fact | value |
|---|---|
{rows}

{_privacy_note(facts)}
## Use

```python
from safetensors.torch import load_file
from {module} import {name}

model = {name}({arguments})
model.load_state_dict(load_file("model.safetensors"))
```
"""


def _personal_note(personal: Mapping[str, Any] | None) -> str:
    """How a client makes the layers that are its own; "" where there are none."""
    if personal is None:
        return ""
    names, steps, lr = (personal[name] for name in ("parameters", "steps", "lr"))
    return f"""
## Personal layers

The file holds the public start of {", ".join(f"`{name}`" for name in names)}. Each client fits them
to records of its own, `x` and `y`, as it did in training; what comes of it is as private as they
are.

```python
from fl_lightning import fit_personal_layers

fit_personal_layers(model, x, y, {names!r}, steps={steps}, lr={lr})
```
"""


def _privacy_note(facts: Mapping[str, Any]) -> str:
    if "epsilon" not in facts:
        return "This model has **no differential privacy**.\n"
    return (
        "Who is protected against whom, under which assumptions, and what is not covered: "
        "[privacy_statement.md](privacy_statement.md). The model may be processed further at no "
        "further cost of privacy; training it on the same data again is a new cost. "
        "`python -m fl_lightning.ledger verify RUN --head HASH` finds the hash above in the "
        "ledger, or another history.\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fl_lightning.export",
        description="Write a run's network as safetensors, with a model card.",
    )
    parser.add_argument("run", help="folder of the run")
    parser.add_argument("--out", default=None, help="folder to write to (default: RUN/export)")
    options = parser.parse_args(arguments)
    try:
        folder = export(options.run, options.out)
    except (OSError, ValueError, LedgerError) as error:
        say(f"error: {error}", file=sys.stderr)
        return 2
    say(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
