"""Measurements of this project: `python -m bench.headline`, `python -m bench.cohort`."""
