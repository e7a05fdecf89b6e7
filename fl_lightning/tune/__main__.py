"""The command: `python -m fl_lightning.tune SEARCH.yaml [--run_dir FOLDER] [fit's options]`."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fl_lightning.command.shipped import with_shipped
from fl_lightning.ledger import LedgerError
from fl_lightning.ledger.search_checks import SearchLossError
from fl_lightning.output.checkpoint import CHECKPOINT
from fl_lightning.output.console import say, speak_any_encoding
from fl_lightning.tune.plan import SearchPlan, check_given, given_seed
from fl_lightning.tune.search import Search
from fl_lightning.tune.shown import shown_by_wandb

_ABOUT = """\
Random search whose choice is charged: the search, and the run that it chooses, keep (epsilon,
delta). SEARCH.yaml has epsilon, delta, trials, config, fixed and space
(configs/searches/digits.yaml), or is a random sweep of W&B (configs/sweeps/digits.yaml), whose
run_cap is the mean number of runs. What follows it are options of fit, for all runs. A search that
was stopped goes on by the same command.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fl_lightning.tune",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("search", type=Path, help="YAML file of the search")
    parser.add_argument("--run_dir", type=Path, required=True, help="folder of the search, private")
    parser.add_argument(
        "--read_test_set",
        type=str,
        choices=("true", "false"),
        default="true",
        help="whether the chosen model reads the test set, once",
    )
    for name in ("epsilon", "delta"):
        words = "of the whole search, where the file has none: a number, or a list for the clients"
        parser.add_argument(f"--{name}", type=json.loads, metavar="NUMBERS", help=words)
    parser.add_argument(
        "--wandb", metavar="PROJECT", help="W&B's project that gets the chosen run, and no other"
    )
    options, given = parser.parse_known_args(arguments)
    speak_any_encoding()
    budget = {n: getattr(options, n) for n in ("epsilon", "delta")}
    folder = options.run_dir.expanduser()
    try:
        check_given(_joined(given))
        plan = SearchPlan.read(options.search, {n: v for n, v in budget.items() if v is not None})
        chosen = _search(plan, folder, given, options.read_test_set)
        if chosen is not None and options.wandb:
            say(shown_by_wandb(chosen, folder / "wandb_of_chosen", options.wandb))
    except (ValueError, OSError, LedgerError, SearchLossError) as error:
        say(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _search(plan: SearchPlan, folder: Path, given: list[str], test: str) -> Path | None:
    files = [f"--config={name}" for name in plan.config]
    common = with_shipped([*files, *_words(plan.fixed), *_joined(given)])
    seed = given_seed(common, [_config(argument) for argument in common])

    def run(options: Mapping[str, Any], place: Path, facts: dict[str, Any]) -> None:
        _candidate([*common, *_words(options)], place, facts)

    search = Search(plan, folder, _clients(common), seed, run)
    try:
        best = search.best(say)
        if best is None:
            say("no candidate was drawn, which was possible: nothing is shown")
            return None
        place = folder / "trials" / f"{best:05d}"
        shown = {**plan.options(1.0, search.clients), **search.options(best)}
        shown |= {"read_test_set": test == "true", **_kept(place)}
        _candidate([*common, *_words(shown)], place, search.facts)
        target = search.show(best)
    finally:
        search.close()
    facts = search.facts
    say(
        f"chosen: {target}; epsilon {max(facts['epsilon']):g} at delta {max(facts['delta']):g} "
        "(largest over the clients) for the whole search; everything else in the folder stays "
        "private"
    )
    return target


def _joined(given: Sequence[str]) -> list[str]:
    """Every option and its value as one word."""
    found: list[str] = []
    for word in given:
        if word.startswith("--") or not found or "=" in found[-1]:
            found.append(word)
        else:
            found[-1] += f"={word}"
    return found


def _candidate(arguments: list[str], place: Path, facts: dict[str, Any]) -> None:
    """Train a candidate, or go on with it; what it prints goes to a file of its folder."""
    from fl_lightning import fit

    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    resume = ["--ckpt_path", "last"] if (place / CHECKPOINT).is_file() else []
    before = os.environ.get("WANDB_MODE")
    os.environ["WANDB_MODE"] = "disabled"  # what a candidate logs would be shown
    log = place.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with log.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
            fit.main([*arguments, "--run_dir", str(place), *resume], search=facts)
    except SystemExit as error:
        if error.code not in (None, 0):
            raise ValueError(f"a candidate of the search could not be trained; see {log}") from None
    finally:
        os.environ.pop("WANDB_MODE")
        if before is not None:
            os.environ["WANDB_MODE"] = before


def _kept(place: Path) -> dict[str, Any]:
    """ε that a candidate was calibrated for, which may be less than planned."""
    from fl_lightning.ledger import read

    header, _ = read(place)
    epsilons = header["epsilon"]
    return {"privacy.epsilon": epsilons[0] if len(set(epsilons)) == 1 else epsilons}


def _config(argument: str) -> dict[str, Any]:
    if not argument.startswith("--config="):
        return {}
    path = Path(argument.partition("=")[2]).expanduser()
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}


def _clients(arguments: list[str]) -> int:
    """Clients of a run with these options."""
    count: Any = 10
    for argument in arguments:
        data = _config(argument).get("data")
        count = data.get("num_clients", count) if isinstance(data, dict) else count
        name, _, value = argument.partition("=")
        count = value if name == "--data.num_clients" else count
    return int(count)


def _words(options: Mapping[str, Any]) -> list[str]:
    return [f"--{name}={v if isinstance(v, str) else json.dumps(v)}" for name, v in options.items()]


if __name__ == "__main__":
    sys.exit(main())
