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

# The files that take longest begin first, so that no process ends with one while others wait.
# pytest-xdist would begin with those of many tests.
_LONG = (
    "test_ddp.py", "test_triton_clip_sum.py", "test_fit.py", "test_random_networks.py",
    "test_noise_forms.py", "test_attack_membership.py", "test_cpu_clip.py", "test_cpu.py",
    "test_deploy_node.py", "test_console.py", "test_parity.py", "test_deploy_equality.py",
    "test_examples.py", "test_tune.py",
)  # fmt: skip


def pytest_configure(config):
    if getattr(config.option, "loadscopereorder", False):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    rank = {name: i for i, name in enumerate(_LONG)}
    items.sort(key=lambda item: rank.get(item.path.name, len(_LONG)))
