"""`aadp COMMAND ...`, or `python -m fl_lightning COMMAND ...`: every command under one name."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module, metadata

from fl_lightning.command.early import answer_first

# Command: module that has its main, arguments put before those given, what it does.
COMMANDS: dict[str, tuple[str, list[str], str]] = {
    "fit": ("fl_lightning.fit", [], "train; `aadp fit --help` says all options"),
    "configs": ("fl_lightning.command.shipped", [], "list the shipped configurations"),
    "compare": ("fl_lightning.compare", [], "a table and curves of several runs"),
    "tune": ("fl_lightning.tune.__main__", [], "search options by a choice that is charged"),
    "ledger": ("fl_lightning.ledger.__main__", [], "show or verify the ledger of a run"),
    "audit": ("fl_lightning.audit.__main__", [], "attack copies of a run and compare with its ε"),
    "export": ("fl_lightning.export", [], "write the model of a run, with a model card"),
    "attack": ("fl_lightning.attacks.__main__", [], "attack a run: membership, inversion"),
    "node": ("fl_lightning.deploy.__main__", ["node"], "serve the records of a holder"),
    "digest": ("fl_lightning.deploy.__main__", ["digest"], "name a holder's network for a policy"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its module alone is imported."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print("usage: aadp COMMAND ...\n")
        for name, (_, _, words) in COMMANDS.items():
            print(f"  {name:9} {words}")
        return 0
    if given[0] == "--version":
        print(metadata.version("aadp-fl"))
        return 0
    if given[0] not in COMMANDS:
        near = difflib.get_close_matches(given[0], COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else f": {', '.join(COMMANDS)}"
        print(f"error: there is no command {given[0]!r}{hint}", file=sys.stderr)
        return 2
    if given[0] == "fit":
        answer_first(given)  # before torch and Lightning are imported
    if given[0] == "ledger" and arguments is None:
        # It has no matrices to multiply: threads that wait for some cost a fifth of its time.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    module, before, _ = COMMANDS[given[0]]
    run = import_module(module).main
    if given[0] == "fit" and arguments is None:
        return run() or 0  # the process is the run: it is gone in time after a stop
    return run([*before, *given[1:]]) or 0


if __name__ == "__main__":
    sys.exit(main())
