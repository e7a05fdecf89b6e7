"""The files for real hosts fit each other and the commands that they start."""

import configparser
import shlex
from pathlib import Path

import pytest
import yaml

from fl_lightning.deploy.__main__ import main

FOLDER = Path(__file__).parents[2] / "examples" / "deployment"


class Unit(configparser.RawConfigParser):
    """A unit file; settings that occur twice count as one."""

    def __init__(self, name):
        super().__init__(strict=False, delimiters=("=",))
        self.optionxform = str
        self.read_string((FOLDER / name).read_text().replace("\\\n", " "))

    def words(self, name="ExecStart"):
        return shlex.split(self["Service"][name])


@pytest.fixture
def compose():
    return yaml.safe_load((FOLDER / "docker-compose.yaml").read_text())["services"]


def node():
    return yaml.safe_load((FOLDER / "node.yaml").read_text())


def test_the_example_of_a_node_is_one(tmp_path, monkeypatch, capsys):
    """With records of its kind, the command prints the digest that the policy wants."""
    rows = [",".join([*map(str, range(i, i + 12)), "ab"[i % 2]]) for i in range(40)]
    names = ",".join([*(f"x{i}" for i in range(12)), "outcome"])
    (tmp_path / "train.csv").write_text("\n".join([names, *rows]) + "\n")
    options = node()
    assert options["policy"] == "/etc/aadp/policy.yaml"
    options["data"]["source_args"]["path"] = str(tmp_path / "train.csv")
    options |= {"policy": str(FOLDER / "policy.yaml"), "folder": str(tmp_path / "node")}
    (tmp_path / "node.yaml").write_text(yaml.safe_dump(options))
    main(["digest", "--config", str(tmp_path / "node.yaml")])
    assert len(capsys.readouterr().out.strip()) == 64
    with pytest.raises(SystemExit):
        main(["node", "--config", str(tmp_path / "node.yaml")])
    assert "do not have the node's own" in capsys.readouterr().err
    assert not (tmp_path / "node").exists()


def test_messenger_and_node_are_two_users_that_meet_at_the_socket(compose):
    service, messenger = Unit("aadp-node.service"), Unit("aadp-supernode.service")
    group = node()["socket_group"]
    assert service["Service"]["User"] != messenger["Service"]["User"]
    assert service["Service"]["Group"] == messenger["Service"]["SupplementaryGroups"] == group
    at = f'socket="{node()["socket"]}"'
    assert messenger.words()[-1] == at
    assert f"--node-config={at}" in compose["supernode"]["command"]
    users = [compose[name]["user"].split(":") for name in ("node", "supernode")]
    assert users[0][0] != users[1][0]
    assert users[0][1] == users[1][1]
    folder = str(Path(node()["socket"]).parent)
    assert service["Service"]["RuntimeDirectory"] == Path(folder).name
    for name in ("node", "supernode"):
        assert f"socket:{folder}" in compose[name]["volumes"]


def test_the_node_has_no_network_and_the_messenger_no_records(compose):
    service = Unit("aadp-node.service")["Service"]
    assert service["PrivateNetwork"] == "yes"
    assert compose["node"]["network_mode"] == "none"
    hidden = Unit("aadp-supernode.service")["Service"]["InaccessiblePaths"]
    records = str(Path(node()["data"]["source_args"]["path"]).parent)
    for private in (records, "/etc/aadp", "/var/lib/aadp"):
        assert f"-{private}" in hidden.split()
    mounted = [volume.split(":")[1] for volume in compose["supernode"]["volumes"]]
    assert mounted == ["/keys", "/run/aadp"]


def test_a_messenger_rests_for_more_than_a_minute(compose):
    """The SuperLink sends away a node that it still takes for online."""
    assert int(Unit("aadp-supernode.service")["Service"]["RestartSec"]) > 60
    assert "sleep 75" in compose["supernode"]["entrypoint"][2]
