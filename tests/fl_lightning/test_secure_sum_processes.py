"""Secure sums of node services that are processes: one is killed within a round and comes again."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("cryptography")

from fl_lightning import FederatedDataModule, FederatedModule, PrivacyConfig
from fl_lightning.deploy.__main__ import main
from fl_lightning.deploy.frames import ask
from fl_lightning.deploy.secure_sum.__main__ import main as identity
from fl_lightning.deploy.secure_sum.federated import with_secure_sums
from fl_lightning.ledger import read, verify
from fl_lightning.models import MLP
from fl_lightning.release.federation import Federation, number_members, parse_member
from fl_lightning.values.message import decode, encode
from tests.fl_lightning.nodes import trainer

ROOT = Path(__file__).resolve().parents[2]
NODES, ROUNDS = 3, 3
MODEL = {"class_path": "fl_lightning.models.MLP", "init_args": {"in_features": 64, "hidden": [8]}}


def write_config(folder: Path, policy: dict) -> None:
    names = range(NODES)
    for k in names:
        (folder / f"{k}").mkdir(exist_ok=True)
        (folder / f"{k}" / "policy.yaml").write_text(yaml.safe_dump(policy))
        options = {
            "folder": str(folder / f"{k}" / "holder"),
            "socket": str(folder / f"{k}.sock"),
            "policy": str(folder / f"{k}" / "policy.yaml"),
            "data": {"source": "digits", "num_clients": NODES},
            "client": k,
            "network": MODEL,
        }
        (folder / f"{k}" / "node.yaml").write_text(yaml.safe_dump(options))


class Services:
    """Node services, each a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: dict[int, subprocess.Popen] = {}

    def start(self, k: int) -> None:
        config = str(self.folder / f"{k}" / "node.yaml")
        command = [sys.executable, "-m", "fl_lightning.deploy", "node", "--config", config]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path}
        with (self.folder / f"{k}.log").open("ab") as log:
            self.processes[k] = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def wait(self) -> None:
        end = time.monotonic() + 240
        for k, process in self.processes.items():
            while True:
                with contextlib.suppress(OSError):
                    ask(self.folder / f"{k}.sock", encode({"do": "hello"}), timeout=30)
                    break
                assert process.poll() is None, (self.folder / f"{k}.log").read_text()
                assert time.monotonic() < end
                time.sleep(0.2)

    def kill(self, k: int) -> None:
        self.processes[k].kill()
        self.processes[k].wait()

    def ask(self, requests: Mapping[int, bytes]) -> dict[int, bytes]:
        answers = {}
        for k, data in requests.items():
            with contextlib.suppress(OSError):
                answers[k] = ask(self.folder / f"{k}.sock", data, timeout=120)
        return answers


@pytest.fixture
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    made = Services(tmp_path_factory.mktemp("s"))
    yield made
    for k in made.processes:
        made.kill(k)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", ["sum-shares", "sum-survivors"])
def test_a_node_service_that_is_killed_within_a_round(
    services: Services, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = services.folder
    write_config(folder, {"epsilon": 50.0, "delta": 1e-3})
    main(["digest", "--config", str(folder / "0" / "node.yaml")])
    for k in range(NODES):
        assert identity([str(folder / f"{k}" / "holder")]) == 0
    digest, *names = capsys.readouterr().out.split()
    secure = {"identities": names, "corrupt": 0}
    policy = {"epsilon": 50.0, "delta": 1e-3, "networks": [digest], "secure_sum": secure}
    write_config(folder, policy | {"settings": ["client+secure_sum"]})
    for k in range(NODES):
        services.start(k)
    services.wait()

    def through(requests: Mapping[int, bytes]) -> dict[int, bytes]:
        head, _ = decode(next(iter(requests.values())))
        if head["do"] == stage and head["round"] == 0:
            services.kill(1)
        if head["do"] == "sum-terms" and head["terms"]["round"] == 2:
            services.start(1)
            services.wait()
        return services.ask(requests)

    hello = services.ask(dict.fromkeys(range(NODES), encode({"do": "hello"})))
    members = number_members([parse_member(decode(data)[0]) for data in hello.values()])
    privacy = PrivacyConfig(setting="client+secure_sum", min_survivors=2, epsilon=50.0, delta=1e-3)
    torch.manual_seed(0)
    run = FederatedModule(
        MLP(in_features=64, hidden=[8]), privacy, sampling_rate=1.0, local_steps=1,
        run_dir=str(folder / "server"),
    )  # fmt: skip
    run.federation = with_secure_sums(Federation(members, through), 0)
    trainer(ROUNDS).fit(run, FederatedDataModule("digits", num_clients=NODES))
    lines = read(folder / "server")[1]
    assert [line.members(NODES).tolist() for line in lines] == [[0, 1, 2], [0, 2], [0, 1, 2]]
    assert verify(folder / "server") == []
    for k in range(NODES):
        services.kill(k)
        (ledger,) = (folder / f"{k}" / "holder" / "runs").iterdir()
        assert verify(ledger) == []
        rounds = [line.round for line in read(ledger)[1]]
        # Killed before its masked numbers left, it has no line; after, it has.
        assert rounds == ([0, 1, 2] if k != 1 else [2] if stage == "sum-shares" else [0, 2])
