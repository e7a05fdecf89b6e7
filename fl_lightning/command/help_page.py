"""The help of `fit`: the common options, one section, or everything."""

from __future__ import annotations

import ast
import textwrap

from fl_lightning.command.options import Option, options, sections

_WIDTH = 100
_HEAD = """\
usage: aadp fit [--config FILE|NAME ...] [--SECTION.OPTION VALUE ...]

Trains by federated learning with proven differential privacy, reads the test set once, and leaves a
folder with model, ledger, statement, tables and pictures. Without options: digits, 10 clients,
ε = 8 for every record, 20 rounds. `python -m fl_lightning.fit` is the same command.
"""
_COMMON = {
    "The run": ("config", "run_dir", "ckpt_path", "seed_everything", "read_test_set"),
    "Rounds and machine": (
        "trainer.max_epochs", "trainer.accelerator", "trainer.devices", "trainer.logger",
        "trainer.check_val_every_n_epoch",
    ),
    "Who is protected, and how much": (
        "privacy.setting", "privacy.epsilon", "privacy.delta", "privacy.mechanism",
        "privacy.noise_multiplier", "privacy.clip_norm", "privacy.clipping", "privacy.seed",
    ),
    "Data, and who holds it": (
        "data.source", "data.num_clients", "data.partition", "data.alpha", "data.data_dir",
        "data.download", "data.val_fraction",
    ),
    "Network and training": (
        "model.network", "model.clients_per_round", "model.sampling_rate", "model.local_steps",
        "model.client_lr", "model.server_optimizer",
    ),
}  # fmt: skip
_FOR_TRAINER = {
    "trainer.max_epochs": "Number of rounds, for which the noise is calibrated.",
    "trainer.accelerator": "Where to compute: cpu, gpu, auto.",
    "trainer.devices": "Processes that share the clients; with --trainer.strategy ddp.",
    "trainer.logger": "A logger; null: W&B, offline unless you are logged in; false: none.",
    "trainer.check_val_every_n_epoch": "Rounds between two looks at the validation records.",
}
_TAIL = """\
Options of a chosen class stand below it: --model.network CNN --model.network.channels [8,16];
--model.network.help CLASS shows them.

--help.privacy --help.model --help.data --help.trainer   all options of a section
--help.all                                               all options
--print_config                                           the values that a command comes to
aadp configs                                             configurations that come with the package
"""


def page(which: str = "") -> str:
    """A page of help.

    Args:
        which: "": the common options; a section; "all".

    Raises:
        ValueError: a section that there is not.
    """
    if not which:
        return "\n".join([_HEAD, *(_group(t, names) for t, names in _COMMON.items()), _TAIL])
    every = {"run": [n for n in options() if "." not in n]}
    every |= {s: [n for n, o in options().items() if o.section == s] for s in sections()}
    if which != "all" and which not in every:
        raise ValueError(f"--help.{which}: the sections are {', '.join([*every, 'all'])}")
    shown = every if which == "all" else {which: every[which]}
    return "\n".join([*(_group(s, names) for s, names in shown.items()), _TAIL])


def _group(title: str, names: list[str] | tuple[str, ...]) -> str:
    known = options()
    return f"{title}:\n" + "".join(_entry(known[name]) for name in names if name in known)


def _entry(option: Option) -> str:
    """A line with name, values and default, and what it means."""
    takes = _takes(option.type)
    default = f"  [{option.default}]" if option.default else ""
    head = f"  --{option.name} {takes}".rstrip() + default
    words = _FOR_TRAINER.get(option.name, option.words)
    sentences = words.split(". ")
    first = ". ".join(sentences[: 2 if words.startswith("Null") else 1])
    first = first.rstrip(".") + "." if words else ""
    lines = textwrap.wrap(
        first.replace("``", ""), _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6
    )
    return "\n".join([head, *lines]) + "\n"


def _takes(type: str) -> str:
    """What an option takes, in a word."""
    if "Literal[" in type:
        inside = type[type.index("Literal[") + 8 : type.index("]", type.index("Literal["))]
        return "|".join(str(v) for v in ast.literal_eval(f"({inside},)"))
    if "list[float]" in type:
        return "X|[X, ...]"
    for kind, word in (("bool", "true|false"), ("int", "N"), ("float", "X")):
        if kind in type.replace("Optional[", "").split("]")[0]:
            return word
    return "CLASS" if "Module" in type or "Callable" in type else "..." if type else ""
