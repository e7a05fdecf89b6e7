"""Who can reach the socket of a node: its owner, and a group where its holder names one."""

import grp
import os
import stat

import pytest

from fl_lightning.deploy import __main__ as command
from fl_lightning.deploy.service import listen


@pytest.fixture
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("s") / "x.sock"


def another_group():
    """A group that this process may give files to, another than theirs by default if it can."""
    if os.geteuid() == 0:
        return next(g for g in grp.getgrall() if g.gr_gid != os.getegid())
    return grp.getgrgid((set(os.getgroups()) - {os.getegid()} or {os.getegid()}).pop())


def test_the_owner_alone_reaches_a_socket(path):
    with listen(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_group_reaches_it_where_it_is_named(path):
    group = another_group()
    with listen(path, group.gr_name):
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert path.stat().st_gid == group.gr_gid
        assert path.stat().st_uid == os.geteuid()


def test_a_group_that_is_not_there_leaves_no_socket(path):
    with pytest.raises(OSError, match="socket_group=no-such-group"), listen(path, "no-such-group"):
        pass
    assert not path.exists()


def test_a_socket_in_the_private_folder_is_for_no_group(tmp_path, monkeypatch):
    class Options:
        folder, socket, socket_group, client = tmp_path / "node", None, "users", None

    with pytest.raises(ValueError, match="for folder is private"):
        command._serve(None, Options)
    assert not Options.folder.exists()
