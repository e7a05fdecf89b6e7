"""Attack a finished run: `python -m fl_lightning.attacks membership|inversion RUN`.

`membership` asks of every training record, and of as many held-out ones, whether it was trained on:
by the loss of the last model, by likelihood ratio from shadow models (LiRA), and by all releases.
`inversion` lets one client release what a few of its records make of the first model, by the run's
own clipping and noise, and tries to see the records in it.

The folder of the run gets `membership.json` or `inversion.json` and a picture in `plots`. They tell
of single records, so they are as private as the records. Ledger and model are only read.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from fl_lightning.attacks.files import json_bytes, write_all
from fl_lightning.ledger import LedgerError
from fl_lightning.output.console import say, speak_any_encoding


def membership(options: argparse.Namespace) -> None:
    """Attack membership, write what was found, and say it."""
    from fl_lightning.attacks.membership import attack_run, picture
    from fl_lightning.attacks.pictures import png

    found = attack_run(
        options.run, shadows=options.shadows, watch=not options.no_replay, seed=options.seed
    )
    figures = found.figures()
    say("attack                      AUC (95 %)             right alarms at 1 % false ones (95 %)")
    for name, one in figures["attacks"].items():
        area, power = one["auc"], one["tpr_at_0.01"]
        say(
            f"{name:27} {area['value']:.3f} ({area['low']:.3f}-{area['high']:.3f})    "
            f"{100 * power['value']:5.1f} % ({100 * power['low']:.1f}-{100 * power['high']:.1f})"
        )
    if figures["ceiling"] is not None:
        say(f"at most, by the ledger:{100 * figures['ceiling']['tpr_at_0.01']:33.1f} %")
    folder = Path(options.run).expanduser()
    _written(
        {
            folder / "membership.json": json_bytes(figures),
            folder / "plots" / "membership.png": png(picture(found)),
        }
    )


def inversion(options: argparse.Namespace) -> None:
    """Attack releases of single clients, write what was found, and say it."""
    from fl_lightning.attacks.inversion import invert_run, picture
    from fl_lightning.attacks.pictures import png

    found = invert_run(
        options.run, count=options.victims, records=options.records, seed=options.seed
    )
    for name, one in found.figures.get("attacks", {}).items():
        similar, decibel = one["ssim"], one["psnr"]
        say(
            f"{name:27} SSIM {similar['value']:.3f} ({similar['low']:.3f}-{similar['high']:.3f})"
            f"    PSNR {decibel['value']:.1f} dB"
        )
    if "tokens" in found.figures:
        tokens = found.figures["tokens"]
        say(f"tokens found: {100 * tokens['found']['value']:.1f} %, "
            f"{100 * tokens['right']['value']:.1f} % of those named are right")  # fmt: skip
    folder = Path(options.run).expanduser()
    files = {folder / "inversion.json": json_bytes(found.figures)}
    drawn = picture(found)
    if drawn is not None:
        files[folder / "plots" / "inversion.png"] = png(drawn)
    _written(files)


def _written(files: dict[Path, bytes]) -> None:
    say(f"{', '.join(map(str, write_all(files)))}: as private as the records")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fl_lightning.attacks", description="Attack a finished run."
    )
    commands = parser.add_subparsers(dest="attack", required=True)
    one = commands.add_parser("membership", help="was a record trained on?")
    one.add_argument("run", help="folder of the run")
    one.add_argument("--shadows", type=int, default=64, help="shadow models; 0: none (default 64)")
    one.add_argument(
        "--no-replay",
        action="store_true",
        help="do not compute the run again to attack all its releases",
    )
    two = commands.add_parser("inversion", help="what does a client's release show?")
    two.add_argument("run", help="folder of the run")
    two.add_argument("--victims", type=int, default=8, help="clients attacked (default 8)")
    two.add_argument("--records", type=int, default=1, help="records of each (default 1)")
    for command in (one, two):
        command.add_argument("--seed", type=int, default=0, help="of the attacker (default 0)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    options = _parser().parse_args(arguments)
    speak_any_encoding()
    torch.set_float32_matmul_precision("highest")
    for name in ("pytorch_lightning", "pytorch_lightning.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    try:
        if options.seed < 0:
            raise ValueError(f"seed={options.seed} must be at least 0")
        {"membership": membership, "inversion": inversion}[options.attack](options)
    except (OSError, ValueError, LedgerError) as error:
        say(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
