"""One run on two hosts: two network namespaces with a cable between them, one folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fl_lightning import ledger as ledgers
from fl_lightning.output.checkpoint import CHECKPOINT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
HOSTS = {"aadpa": "10.77.0.1", "aadpb": "10.77.0.2"}
ROUNDS = 3
OPTIONS = [
    *("--data.num_clients=5", "--model.execution=loop", "--privacy.seed=7"),
    *("--model.network=fl_lightning.models.LogisticRegression", "--trainer.logger=false"),
    *("--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"),
]
TWO = ["--trainer.strategy=ddp", "--trainer.num_nodes=2", "--trainer.devices=1"]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[None]:
    """Two namespaces, each with an end of one cable named eth0; no other way out."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("needs the right to make network namespaces")
    a, b = HOSTS
    try:
        ip("netns", "add", a)
    except subprocess.CalledProcessError:
        pytest.skip("this system makes no network namespaces")
    try:
        ip("netns", "add", b)
        ip("link", "add", "eth0", "netns", a, "type", "veth", "peer", "name", "eth0", "netns", b)
        for name, address in HOSTS.items():
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "eth0", "up")
        yield
    finally:
        for name in HOSTS:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def by_torchrun(rank: int) -> tuple[list[str], dict[str, str]]:
    run = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    run += [f"--node_rank={rank}", "--master_addr=10.77.0.1", "--master_port=29500"]
    return [*run, "-m", "fl_lightning.fit"], {}


def by_slurm(rank: int) -> tuple[list[str], dict[str, str]]:
    """What `srun` tells its tasks."""
    facts = {
        "JOB_ID": 41, "JOB_NAME": "two-hosts", "NTASKS": 2, "NNODES": 2, "NTASKS_PER_NODE": 1,
        "PROCID": rank, "NODEID": rank, "LOCALID": 0, "NODELIST": ",".join(HOSTS.values()),
    }  # fmt: skip
    return ["-m", "fl_lightning.fit"], {f"SLURM_{k}": str(v) for k, v in facts.items()}


def start(how, folder: Path, *options: str) -> list[subprocess.Popen]:
    """The same command on both hosts."""
    made = []
    for rank, name in enumerate(HOSTS):
        command, environment = how(rank)
        words = [sys.executable, *command, *OPTIONS, *TWO, f"--run_dir={folder}", *options]
        env = os.environ | environment | {
            "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
            "GLOO_SOCKET_IFNAME": "eth0",
        }  # fmt: skip
        made.append(
            subprocess.Popen(
                ["ip", "netns", "exec", name, *words], cwd=ROOT, env=env, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
        )  # fmt: skip
    return made


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / CHECKPOINT, weights_only=False)["state_dict"]


@pytest.mark.parametrize("how", [by_torchrun, by_slurm])
def test_two_hosts_train_the_model_of_one(how, hosts: None, tmp_path: Path) -> None:
    rounds = f"--trainer.max_epochs={ROUNDS}"
    both = start(how, tmp_path / "two", rounds)
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    alone = [sys.executable, "-m", "fl_lightning.fit", *OPTIONS, rounds]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*alone, f"--run_dir={tmp_path / 'one'}"], check=True, env=env, cwd=ROOT, timeout=300
    )
    want, have = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in want.items():
        torch.testing.assert_close(have[name], value, rtol=1e-4, atol=1e-5)
    assert ledgers.verify(tmp_path / "two") == []
    lines = [
        [(r.client, r.round, r.attempt, r.binding) for r in ledgers.read(tmp_path / n)[1]]
        for n in ("one", "two")
    ]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 5 * ROUNDS


def test_a_cable_that_is_cut_ends_both_and_the_run_goes_on(hosts: None, tmp_path: Path) -> None:
    folder = tmp_path / "two"
    both = start(by_slurm, folder, "--trainer.max_epochs=100000")
    end = time.monotonic() + 300
    while (
        not (folder / "rounds.csv").exists() or (folder / "rounds.csv").read_text().count("\n") < 3
    ):
        assert all(process.poll() is None for process in both)
        assert time.monotonic() < end
        time.sleep(0.1)
    ip("-n", "aadpb", "link", "set", "eth0", "down")
    cut = time.monotonic()
    said = [process.communicate(timeout=300)[0] for process in both]
    print(f"both ended {time.monotonic() - cut:.0f} s after the cable was cut")
    assert all(process.returncode not in (0, None) for process in both)
    assert "go on by the same command" in said[0]
    assert ledgers.verify(folder) == []
    before = len(ledgers.read(folder)[1])
    ip("-n", "aadpb", "link", "set", "eth0", "up")
    rounds = before // 5 + 2
    again = start(by_torchrun, folder, f"--trainer.max_epochs={rounds}", "--ckpt_path=last")
    said = [process.communicate(timeout=300)[0] for process in again]
    assert [process.returncode for process in again] == [0, 0], said
    assert len(ledgers.read(folder)[1]) == 5 * rounds
