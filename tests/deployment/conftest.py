"""Nodes need everything that the extra `federated` brings; a machine of GPUs has less."""

from fl_lightning.requirements import PACKAGES, installed

if not all(map(installed, PACKAGES)):
    collect_ignore_glob = ["test_*.py"]
