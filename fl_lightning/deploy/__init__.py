"""Clients that live elsewhere: a node keeps its own records, key, budget and ledger.

`python -m fl_lightning.deploy node --config node.yaml` starts the service that holds them;
docs/deployment.md says what else a deployment needs.
"""
