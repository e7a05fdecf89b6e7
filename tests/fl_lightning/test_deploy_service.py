"""The service as a holder starts it: a process, a socket, a policy of its own."""

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from fl_lightning import FederatedModule, fit
from fl_lightning.deploy.__main__ import main
from fl_lightning.deploy.frames import ask, receive_frame, send_frame
from fl_lightning.deploy.service import listen, serve
from fl_lightning.ledger import verify
from fl_lightning.release.agreement import network_digest
from fl_lightning.values.message import decode, encode
from tests.fl_lightning import nodes as n

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def short(tmp_path_factory):
    """A folder with a short name: that of a socket may have some hundred characters."""
    return tmp_path_factory.mktemp("s")


def write_config(folder: Path, personal: Sequence[str] = (), **policy) -> Path:
    options = {
        "personal_layers": list(personal),
        "folder": str(folder / "holder"),
        "policy": str(folder / "policy.yaml"),
        "data": {"source": "digits", "num_clients": 5},
        "client": 2,
        "network": {"class_path": "fl_lightning.models.CNN"},
    }
    (folder / "policy.yaml").write_text(yaml.safe_dump({"epsilon": 8.0, "delta": 1e-5} | policy))
    (folder / "node.yaml").write_text(yaml.safe_dump(options))
    return folder / "node.yaml"


def printed_digest(folder: Path, capsys) -> str:
    main(["digest", "--config", str(write_config(folder))])
    return capsys.readouterr().out.strip()


def test_the_digest_has_the_start_of_layers_that_stay(short, capsys, monkeypatch, tmp_path):
    """The same at the server, whose run names the same layers and the same seed."""
    printed = []
    for personal in ((), ["fc1"], ["fc1"]):
        main(["digest", "--config", str(write_config(short, personal))])
        printed.append(capsys.readouterr().out.strip())
    assert printed[0] != printed[1] == printed[2]
    seen = []

    def stop(module, stage):
        seen.append(network_digest(module.network, module.loss))
        raise ValueError("enough")

    monkeypatch.setattr(FederatedModule, "setup", stop)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    with pytest.raises(SystemExit):
        fit.main([
            *("--run_dir", str(tmp_path / "run"), "--trainer.logger", "false"),
            *("--model.network", "fl_lightning.models.CNN", "--model.personal_layers", "[fc1]"),
            *("--privacy.setting", "client+local", "--privacy.delta", "0.01"),
        ])  # fmt: skip
    assert seen == printed[1:2]


def test_a_service_answers_until_it_is_stopped(short, capsys):
    digest = printed_digest(short, capsys)
    config = write_config(short, networks=[digest])
    command = [sys.executable, "-m", "fl_lightning.deploy", "node", "--config", str(config)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    path = short / "holder" / "node.sock"
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            end = time.monotonic() + 120
            while not path.exists():
                assert process.poll() is None, process.stdout.read()
                assert time.monotonic() < end
                time.sleep(0.1)
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            hello, _ = decode(ask(path, encode({"do": "hello"})))
            assert hello["epsilon"] == 8.0
            assert 280 < hello["records"] < 290
            assert hello["number"] == 2
            terms = n.terms_of(n.terms(rules={"sampling_rate": 1.0, "local_steps": 1}))
            terms |= {"network": digest}
            joined, _ = decode(ask(path, encode({"do": "join", "terms": terms, "known": 0})))
            assert joined["lines"] == []
        finally:
            process.send_signal(signal.SIGTERM)
            out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    assert "node stopped" in out
    assert not path.exists()
    (run,) = (short / "holder" / "runs").iterdir()
    assert (run / "privacy_statement.md").is_file()
    assert verify(run) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"networks": ["0" * 64]}, "did its source change?"),
        ({"epsilon": 0.0}, "epsilon=0.0 must be positive"),
        ({"networks": ["abc"]}, "not a digest"),
        ({"answer_seconds": -1.0}, "answer_seconds=-1.0"),
    ],
)
def test_a_wrong_policy_is_one_line(change, words, short, capsys, monkeypatch):
    monkeypatch.setattr("fl_lightning.deploy.__main__._serve", lambda *_: None)
    with pytest.raises(SystemExit) as stopped:
        main(["node", "--config", str(write_config(short, **change))])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (short / "holder" / "runs").exists()


@pytest.fixture
def served(short):
    """A service in a thread that answers in capitals."""
    done = threading.Event()
    ready = threading.Event()

    def start(**options):
        thread = threading.Thread(
            target=serve,
            args=(short / "x.sock", bytes.upper),
            kwargs={"ready": ready.set, "stopped": done.is_set, "most": 1000, **options},
        )
        thread.start()
        assert ready.wait(10)
        return short / "x.sock", thread

    yield start
    done.set()


def test_messengers_that_hang_up_or_send_too_much_keep_nobody_waiting(served):
    path, _ = served()
    for data in (b"", b"\1", b"\xff" * 8, b"\x10" + b"\0" * 7 + b"abc"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
            stream.connect(str(path))
            stream.sendall(data)
    assert ask(path, b"abc", timeout=10) == b"ABC"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
        stream.settimeout(10)
        stream.connect(str(path))
        with contextlib.suppress(ConnectionError):
            send_frame(stream, b"a" * 1001)
        with pytest.raises(ConnectionError):
            receive_frame(stream, 1000)
    assert ask(path, b"abc", timeout=10) == b"ABC"


def test_answers_leave_at_a_time_that_shows_no_work(served):
    path, _ = served(answer_seconds=0.5)
    begun = time.monotonic()
    ask(path, b"abc", timeout=10)
    assert time.monotonic() - begun >= 0.5


def test_a_socket_has_one_service_and_a_dead_one_leaves_none(short):
    path = short / "x.sock"
    with (
        listen(path),
        pytest.raises(OSError, match="belongs to a node that is running"),
        listen(path),
    ):
        pass
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    dead.bind(str(path))
    dead.close()
    with listen(path) as door:
        assert door.getsockname() == str(path)
    path.write_text("a file")
    with pytest.raises(OSError, match="not a socket"), listen(path):
        pass
