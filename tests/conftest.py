"""Tests that run in several processes share the cores."""

import os

# Read when torch is loaded. Threads of OpenMP that wait for each other by turning keep a core from
# the threads that they wait for, where there are more of them than cores: 20 times the CPU seconds
# of a small network's steps, measured with two threads on a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

_PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _PROCESSES > 1:
    # Two at least: some tests are of work that several threads share.
    torch.set_num_threads(max(2, torch.get_num_threads() // _PROCESSES))
