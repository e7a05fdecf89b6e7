"""Adapters for other trainers: `optim`, `clients`, `ddp`, `opacus`. Import the one you use."""
