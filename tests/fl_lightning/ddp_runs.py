"""Runs of several processes."""

import os
from pathlib import Path

from fl_lightning import ledger as ledgers

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    "WANDB_MODE": "disabled",
}  # fmt: skip


def charged(folder):
    return [(r.client, r.round, r.attempt) for r in ledgers.read(folder)[1]]
