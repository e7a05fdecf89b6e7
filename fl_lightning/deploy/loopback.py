"""A whole federation on 127.0.0.1: `python -m fl_lightning.deploy.loopback`.

Certificates, a SuperLink, SuperNodes with keys of their own, a node service beside each, one run,
and everything shut down again. It is what a deployment on real hosts consists of, with all of its
parts on one machine; docs/deployment.md says what differs there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fl_lightning.deploy.credentials import write_node_key, write_tls
from fl_lightning.deploy.secure_sum.keys import Identity
from fl_lightning.deploy.secure_sum.node import IDENTITY_FILE

APP = Path(__file__).parent / "app"
BIN = Path(sys.executable).parent
# What makes Flower quiet and quick: no telemetry, no look for updates, apps polled ten times a
# second.
_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
}


@dataclass
class Loopback:
    """The parts of a federation on this machine, by name.

    Args:
        folder: for everything that it writes, private; new.
        nodes: how many.
        node: options of every node service, see `fl_lightning.deploy node`; `client` is added.
        policy: of every holder, without its networks; where it has `secure_sum`, the identities of
            all nodes are added to that.
    """

    folder: Path
    nodes: int
    node: Mapping[str, Any]
    policy: Mapping[str, Any]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    ports: list[int] = field(default_factory=list)

    def prepare(self) -> None:
        """Keys, certificates and configuration files."""
        self.folder.mkdir(parents=True, mode=0o700)
        self.ports = _free_ports(self.nodes + 1)
        ca, _, _ = write_tls(self.folder)
        (self.folder / "flwr").mkdir()
        (self.folder / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "loopback"\n[superlink.loopback]\n'
            f'address = "127.0.0.1:{self.ports[0]}"\nroot-certificates = "{ca}"\n',
            encoding="utf-8",
        )
        for k in range(self.nodes):
            write_node_key(self.folder / f"node{k}.key")
            options = {**self.node, "folder": str(self.holder(k)), "client": k}
            options["policy"] = str(self.folder / f"policy{k}.yaml")
            self._config(k).write_text(yaml.safe_dump(options), encoding="utf-8")
        self._write_policies([])
        digest = self._output([sys.executable, "-m", "fl_lightning.deploy", "digest",
                               "--config", str(self._config(0))]).split()[-1]  # fmt: skip
        self._write_policies([digest])

    def _write_policies(self, networks: list[str]) -> None:
        policy: dict[str, Any] = {**self.policy, "networks": networks}
        if "secure_sum" in policy:
            names = [self._identity(k) for k in range(self.nodes)]
            policy["secure_sum"] = {**policy["secure_sum"], "identities": names}
        for k in range(self.nodes):
            path = self.folder / f"policy{k}.yaml"
            path.write_text(yaml.safe_dump(policy), encoding="utf-8")

    def _identity(self, k: int) -> str:
        """What the other holders know the node of client k by; made where there is none."""
        self.holder(k).mkdir(exist_ok=True, mode=0o700)
        return Identity.kept_in(self.holder(k) / IDENTITY_FILE).name

    def holder(self, k: int) -> Path:
        """Private folder of the node service of client k."""
        return self.folder / f"holder{k}"

    def _config(self, k: int) -> Path:
        return self.folder / f"node{k}.yaml"

    def log(self, name: str) -> Path:
        """What a process prints."""
        return self.folder / f"{name}.log"

    def start(self, name: str, command: Sequence[str]) -> None:
        """Start a process of the federation, in a group of its own."""
        with self.log(name).open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self._environment(),
                start_new_session=True,
            )

    def start_service(self, k: int) -> None:
        """Start the node service of client k and wait until its socket is there."""
        config = ["--config", str(self._config(k))]
        self.start(f"service{k}", [sys.executable, "-m", "fl_lightning.deploy", "node", *config])

    def start_superlink(self) -> None:
        """Start the SuperLink."""
        self.start("superlink", [
            str(BIN / "flower-superlink"), "--host", "127.0.0.1", "--port", str(self.ports[0]),
            "--database", str(self.folder / "superlink.db"), *self._tls(),
            "--enable-supernode-auth", "--disable-runtime-dependency-installation",
        ])  # fmt: skip

    def start_supernode(self, k: int) -> None:
        """Start the SuperNode of client k."""
        self.start(f"supernode{k}", [
            str(BIN / "flower-supernode"), "--superlink", f"127.0.0.1:{self.ports[0]}",
            "--root-certificates", str(self.folder / "ca.crt"),
            "--auth-supernode-private-key", str(self.folder / f"node{k}.key"),
            "--host", "127.0.0.1", "--port", str(self.ports[1 + k]), *self._tls(),
            "--node-config", f'socket="{self.holder(k) / "node.sock"}"',
        ])  # fmt: skip

    def _tls(self) -> list[str]:
        files = {"ca-certfile": "ca.crt", "certfile": "server.crt", "keyfile": "server.key"}
        return [f"--ssl-{option}={self.folder / name}" for option, name in files.items()]

    def start_all(self) -> None:
        """Start everything; ready when it returns.

        Raises:
            RuntimeError: a part ended, or was not ready in time; its log says why.
        """
        for k in range(self.nodes):
            self.start_service(k)
        self.start_superlink()
        self.wait("superlink", self._healthy)
        for k in range(self.nodes):
            key = str(self.folder / f"node{k}.key.pub")
            self._output([str(BIN / "flwr"), "supernode", "register", key, "loopback"])
        for k in range(self.nodes):
            self.wait(f"service{k}", (self.holder(k) / "node.sock").exists)
            self.start_supernode(k)

    def wait(self, name: str, ready: Any, seconds: float = 180.0) -> None:
        """Wait until a part is ready.

        Raises:
            RuntimeError: it ended, or was not ready in time.
        """
        end = time.monotonic() + seconds
        while not ready():
            ended = self.processes[name].poll()
            if ended is not None or time.monotonic() > end:
                text = self.log(name).read_text(encoding="utf-8", errors="replace")
                raise RuntimeError(f"{name} is not ready (exit code {ended}): {text[-2000:]}")
            time.sleep(0.2)

    def _healthy(self) -> bool:
        context = ssl.create_default_context(cafile=str(self.folder / "ca.crt"))
        try:
            url = f"https://127.0.0.1:{self.ports[0]}/health"
            with urllib.request.urlopen(url, context=context, timeout=2) as answer:
                return answer.status == 200
        except OSError:
            return False

    def submit(self, options: Mapping[str, Any], *, stream: bool = True) -> str:
        """Start a run, and wait for its end where it is streamed; what `flwr run` printed.

        Args:
            options: of the app, see its pyproject.toml.
            stream: whether to print what the ServerApp prints until it ends.
        """
        words = " ".join(f"{name}={json.dumps(value)}" for name, value in options.items())
        command = [str(BIN / "flwr"), "run", str(APP), "loopback", "-c", words]
        if not stream:
            return self._output(command)
        subprocess.run([*command, "--stream"], env=self._environment(), check=True)
        return ""

    def kill(self, name: str, signum: int = signal.SIGKILL) -> None:
        """Signal a process with all that it started, and wait for its end."""
        process = self.processes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
        process.wait(timeout=60)

    def stop_all(self) -> None:
        """End everything: what does not end by itself is killed."""
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        end = time.monotonic() + 15
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0.1, end - time.monotonic()))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.processes.clear()
        self._end_detached(time.monotonic() + 15)

    def _end_detached(self, end: float) -> None:
        """What a SuperLink starts has a session of its own, and ends once it misses its parent."""
        while (left := self.detached()) and time.monotonic() < end:
            time.sleep(0.1)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def detached(self) -> list[int]:
        """Ids of living processes of this federation, where the system has a /proc."""
        mine, found = f"FLWR_HOME={self.folder / 'flwr'}".encode(), []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mine in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        return found

    def _environment(self) -> dict[str, str]:
        path = f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"  # Flower starts others by name
        return {**os.environ, **_QUIET, "PATH": path, "FLWR_HOME": str(self.folder / "flwr")}

    def _output(self, command: Sequence[str]) -> str:
        done = subprocess.run(
            command, env=self._environment(), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[:4])} failed: {done.stdout} {done.stderr}")
        return done.stdout


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        doors = [stack.enter_context(socket.socket()) for _ in range(count)]
        for door in doors:
            door.bind(("127.0.0.1", 0))
        return [door.getsockname()[1] for door in doors]


@contextlib.contextmanager
def running(loopback: Loopback) -> Iterator[Loopback]:
    """A federation that is up, and down again whatever happens."""
    loopback.prepare()
    try:
        loopback.start_all()
        yield loopback
    finally:
        loopback.stop_all()


# Height and width of the pictures of each source.
_SIZES = {"digits": 8, "fashion_mnist": 28}
SUM = "client+secure_sum"
# Of secure sums: nodes that may work with the server, and whose parts are the whole noise.
_CORRUPT, _SURVIVORS = 1, 2


def demonstration(
    nodes: int, rounds: int, source: str, setting: str = "record+local"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Node options and policy of the default experiment, divided over the nodes."""
    data = {"source": source, "num_clients": nodes, "val_fraction": 0.1, "seed": 1}
    network = {
        "class_path": "fl_lightning.models.CNN",
        "init_args": {"image_size": _SIZES[source]},
    }
    policy: dict[str, Any] = {"epsilon": 8.0, "delta": 1e-5, "rounds": rounds}
    policy["settings"] = [setting]
    if setting == SUM:
        policy["secure_sum"] = {"corrupt": _CORRUPT, "least": _SURVIVORS + _CORRUPT}
    return {"data": data, "network": network}, policy


def server_arguments(
    rounds: int, source: str, setting: str = "record+local", evaluate_every: int = 0
) -> str:
    """Options of the server's half of the demonstration."""
    sums = f" --privacy.min_survivors={_SURVIVORS}" if setting == SUM else ""
    return (
        f"--data.source={source} --model.network.image_size={_SIZES[source]} "
        f"--trainer.max_epochs={rounds} --model.execution=loop --privacy.setting={setting}{sums} "
        f"--privacy.evaluate_every={evaluate_every}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Ten rounds on five nodes, or as many as are asked for."""
    parser = argparse.ArgumentParser(prog="python -m fl_lightning.deploy.loopback")
    parser.add_argument("--nodes", type=int, default=5, help="node services (default 5)")
    parser.add_argument("--rounds", type=int, default=10, help="rounds (default 10)")
    parser.add_argument("--source", choices=tuple(_SIZES), default="digits")
    settings = "record+local", "client+local", SUM
    parser.add_argument("--setting", choices=settings, default=settings[0])
    words = "rounds between private evaluations (default 0: none)"
    parser.add_argument("--evaluate_every", type=int, default=0, metavar="N", help=words)
    parser.add_argument("--folder", type=Path, help="new folder for everything; default: in runs/")
    options = parser.parse_args(arguments)
    stamp = time.strftime("federation-%Y%m%d-%H%M%S")
    folder = (options.folder or Path("runs") / stamp).absolute()
    node, policy = demonstration(options.nodes, options.rounds, options.source, options.setting)
    begun = time.monotonic()
    with running(Loopback(folder, options.nodes, node, policy)) as loopback:
        print(f"{options.nodes} nodes are up after {time.monotonic() - begun:.0f} s: {folder}")
        loopback.submit(
            {
                "arguments": server_arguments(
                    options.rounds, options.source, options.setting, options.evaluate_every
                ),
                "run-dir": str(folder / "run"),
                "nodes": options.nodes,
                "corrupt": _CORRUPT if options.setting == SUM else 0,
            }
        )
    print(f"everything is shut down after {time.monotonic() - begun:.0f} s")
    print(f"the run: {folder / 'run'}")
    print(f"the holders' own ledgers: {folder}/holder*/runs/*/ledger.jsonl")


if __name__ == "__main__":
    main()
