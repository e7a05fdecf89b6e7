"""Files of public data sets, tables, text and Hugging Face data sets."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fl_lightning.data import (
    FederatedDataModule,
    by_author,
    cifar10,
    csv,
    from_arrays,
    from_hugging_face,
    shakespeare,
    text_files,
)
from fl_lightning.data import cifar as cifar_files
from fl_lightning.data import text as text_source
from fl_lightning.data.download import RemoteFile, find
from fl_lightning.data.text import NUM_CODES, VOCABULARY, encode
from fl_lightning.text_model import CharTransformer

# --- fetching ---


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """A web server on this machine with one file."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "file.txt").write_text("content")
    handler = functools.partial(Quiet, directory=str(tmp_path / "site"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


def look(remote: RemoteFile, folder: Path, download: bool) -> Path:
    return find(remote, names=("file.txt",), folders=[folder], download=download, hint=", ask")


def test_a_missing_file_is_fetched_once_and_only_when_allowed(site: str, tmp_path: Path) -> None:
    remote = RemoteFile("file.txt", site + "file.txt", f"md5:{hashlib.md5(b'content').hexdigest()}")
    folder = tmp_path / "data"
    with pytest.raises(FileNotFoundError, match=r"set download to true, ask, or fetch http://127"):
        look(remote, folder, download=False)
    path = look(remote, folder, download=True)
    assert path.read_text() == "content"
    (tmp_path / "site" / "file.txt").unlink()
    assert look(remote, folder, download=True) == path


def test_a_wrong_checksum_is_refused(site: str, tmp_path: Path) -> None:
    remote = RemoteFile("file.txt", site + "file.txt", "md5:" + "0" * 32)
    with pytest.raises(ValueError, match="hash"):
        look(remote, tmp_path / "data", download=True)
    assert not (tmp_path / "data" / "file.txt").exists()


def test_no_network_says_what_to_do(site: str, tmp_path: Path) -> None:
    remote = RemoteFile("none.txt", site + "none.txt", "md5:" + "0" * 32)
    with pytest.raises(FileNotFoundError, match=r"Put none\.txt into"):
        find(remote, names=("none.txt",), folders=[tmp_path], download=True, hint="")


# --- CIFAR-10 ---


def batches(count: int = 4) -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    rows = {n: rng.integers(0, 256, (count, 3073), np.uint8) for n in names}
    for row in rows.values():
        row[:, 0] %= 10
    return {n: row.tobytes() for n, row in rows.items()}


def pack(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, raw in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))


def test_cifar10_from_the_archive_and_from_its_files(tmp_path: Path) -> None:
    files = batches()
    pack(tmp_path / "cifar-10-binary.tar.gz", files)
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    for name, raw in files.items():
        (unpacked / name).write_bytes(raw)
    first, second = cifar10(tmp_path), cifar10(unpacked)
    assert first.x_train.shape == (20, 3, 32, 32)
    assert first.x_test.shape == (4, 3, 32, 32)
    for name in ("x_train", "y_train", "x_test", "y_test"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    row = np.frombuffer(files["data_batch_2.bin"], np.uint8)[:3073]
    assert first.y_train[4] == row[0]
    assert first.x_train[4, 1, 2, 3] == pytest.approx(row[1 + 1024 + 2 * 32 + 3] / 127.5 - 1)


def test_cifar10_refuses_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"archive or its \.bin files"):
        cifar10(tmp_path)
    files = batches()
    pack(tmp_path / "cifar-10-binary.tar.gz", {n: files[n] for n in files if "3" not in n})
    with pytest.raises(ValueError, match=r"lacks data_batch_3\.bin"):
        cifar10(tmp_path)
    whole = (tmp_path / "cifar-10-binary.tar.gz").read_bytes()
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a whole tar archive"):
        cifar10(tmp_path)
    pack(tmp_path / "cifar-10-binary.tar.gz", {**files, "test_batch.bin": b"abc"})
    with pytest.raises(ValueError, match=r"test_batch\.bin has 3 bytes"):
        cifar10(tmp_path)


def test_cifar10_is_fetched_by_its_known_sum() -> None:
    assert cifar_files._ARCHIVE.known_hash == "md5:c32a1d4ab5d03f1284b67883e8d87530"


# --- tables ---

TABLE = "age,site,income,ill\n50,a,1.5,0\n70,b,,1\n20,a,3,1\n"


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(TABLE)
    data = csv(str(path), "ill", client="site", ranges={"age": (0, 60)}, test_path=str(path))
    assert data.x_train[:, 0].tolist() == pytest.approx([50 / 30 - 1, 1.0, 20 / 30 - 1])
    assert data.x_train[[0, 2], 1].tolist() == [1.5, 3.0]
    assert data.x_train[1, 1].isnan()
    assert data.y_train.tolist() == [0, 1, 1]
    assert data.client_train is not None
    assert data.client_train.tolist() == [0, 1, 0]
    assert data.name == "table"
    assert torch.equal(data.x_test.nan_to_num(), data.x_train.nan_to_num())


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("a,b\n", {}, "at least one row"),
        (TABLE, {"label": "sick"}, "label='sick' is not a column of .*: age, site"),
        (TABLE, {"client": "who"}, "client='who' is not a column"),
        (TABLE, {}, "row 2, column 'site': 'a' is no number"),
        (TABLE, {"client": "site", "label": "income"}, "row 2: label must be an integer, got 1.5"),
        (TABLE + "1,2\n", {"client": "site"}, "row 5: 2 cells for 4 columns"),
        (TABLE, {"client": "site", "ranges": {"x": (0, 1)}}, "ranges: 'x' is not a column"),
        (TABLE, {"client": "site", "ranges": {"age": (1, 1)}}, "'age' must be finite, low"),
        (TABLE, {"columns": ["age", "size"]}, "columns='size' is not a column"),
        (TABLE, {"columns": ["age", "ill"]}, "different ones without label='ill'"),
        (TABLE, {"columns": ["age"], "ranges": {"income": (0, 1)}}, "'income' is not a col.*: age"),
        (TABLE, {"columns": []}, "no columns of numbers"),
        (TABLE, {"categories": {"site": ["a"]}}, "'site' must be two different values or more"),
        (TABLE, {"categories": {"site": ["a", "c"]}}, "3, column 'site': 'b' is none of a, c"),
        (TABLE, {"categories": {"age": "ab"}, "ranges": {"age": (0, 1)}}, "'age' has categories"),
        (TABLE, {"client": "site", "classes": [0, 2]}, "row 3, column 'ill': '1' is none of 0, 2"),
        (TABLE, {"client": "site", "classes": [0, 0]}, "classes must be two different values"),
        (TABLE, {"classes": [0, 1], "num_classes": 2}, "num_classes=2 has no meaning with classes"),
        (TABLE, {"test_fraction": 1.0}, "test_fraction=1.0 must lie in"),
        (TABLE, {"test_fraction": 0.5, "test_path": "t"}, "no meaning with test_path"),
    ],
)
def test_csv_refuses(tmp_path: Path, text: str, options: dict, message: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        csv(str(path), **{"label": "ill", **options})


def test_csv_takes_columns_categories_and_classes_by_public_values(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("id,site,sex,age,score\n7,b,F,30,10\n8,a, M ,60,0\n9,b,M,0,2\n")
    data = csv(
        str(path), "score", client="site", columns=["age", "sex"], classes=[0, 2, 4, 10],
        categories={"sex": ["F", "M"]}, ranges={"age": (0, 60)},
    )  # fmt: skip
    assert data.x_train.tolist() == [[0, 1, 0], [1, 0, 1], [-1, 0, 1]]
    assert data.y_train.tolist() == [3, 0, 1]
    assert data.num_classes == 4
    assert data.client_train is not None
    assert data.client_train.tolist() == [0, 1, 0]


def test_csv_holds_rows_for_the_test_the_same_in_every_run(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("x,who,y\n" + "".join(f"{i},{i % 7},{i % 2}\n" for i in range(100)))
    data = csv(str(path), "y", client="who", test_fraction=0.3)
    train, test = data.x_train[:, 0], data.x_test[:, 0]
    assert (len(train), len(test)) == (70, 30)
    assert sorted(torch.cat([train, test]).tolist()) == list(range(100))
    assert train.tolist() == sorted(train.tolist())
    assert test.tolist() != list(range(70, 100))
    assert data.y_test.tolist() == [int(v) % 2 for v in test]
    assert data.client_train is not None
    first = {int(v) % 7: int(c) for v, c in zip(train, data.client_train, strict=True)}
    assert [first[int(v) % 7] for v in train] == data.client_train.tolist()
    again = csv(str(path), "y", client="who", test_fraction=0.3)
    assert torch.equal(again.x_test, data.x_test)
    assert len(csv(str(path), "y", client="who").x_test) == 0


# --- text ---


def test_windows_do_not_overlap_and_the_end_is_held_for_the_test() -> None:
    data = by_author({"a": "abcdefghij" * 3, "b": "x", "c": "éb\n~" * 5}, name="t", length=4)
    assert data.num_classes == NUM_CODES
    assert data.x_train.dtype == torch.int64
    letters = "".join(
        VOCABULARY[i] for i in torch.cat([data.x_train[:2], data.y_train[:2, None]], 1).flatten()
    )
    assert letters == "abcdefghij"
    assert data.client_train is not None
    assert data.client_train.bincount().tolist() == [5, 3]
    assert data.x_train[5, 0] == NUM_CODES - 1
    assert len(by_author({"a": "ab" * 20}, name="t", length=3, stride=1).y_test) == 1


def test_the_vocabulary_is_public_and_complete() -> None:
    assert encode(VOCABULARY).tolist() == list(range(len(VOCABULARY)))
    assert encode("\té€").tolist() == [NUM_CODES - 1] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length=0"),
        ({"stride": 0}, "stride=0"),
        ({"test_fraction": 1.0}, "test_fraction=1.0"),
        ({"length": 99}, "no author of t has 100 characters"),
    ],
)
def test_by_author_refuses(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        by_author({"a": "abc" * 9}, name="t", **options)


def test_shakespeare_by_role(tmp_path: Path) -> None:
    speeches = "First Citizen:\nBefore we proceed.\nHear me.\n\nAll:\nSpeak, speak.\n\n"
    (tmp_path / "input.txt").write_text(speeches * 8)
    data = shakespeare(tmp_path, length=10, test_fraction=0)
    assert data.client_train is not None
    assert len(data.client_train.unique()) == 2
    assert text_source._PLAYS.known_hash.startswith("sha256:86c4e6aa")
    (tmp_path / "input.txt").write_text("no speech")
    with pytest.raises(ValueError, match="no speeches"):
        shakespeare(tmp_path)


def test_text_files_make_natural_clients(tmp_path: Path) -> None:
    for name, count in (("one", 30), ("two", 90), ("three", 60)):
        (tmp_path / f"{name}.txt").write_text("to be or not to be " * count)
    data = FederatedDataModule(
        "text_files", num_clients=2, partition="natural", data_dir=str(tmp_path),
        source_args={"length": 10}, val_fraction=0.0,
    )  # fmt: skip
    assert data.client_sizes.tolist() == [1026 // 11, 1539 // 11]
    logits = CharTransformer(length=10, width=8, heads=2)(data.x[:3])
    assert logits.shape == (3, NUM_CODES)
    with pytest.raises(FileNotFoundError, match=r"no files \*\.txt"):
        text_files(tmp_path / "empty")
    with pytest.raises(ValueError, match="num_clients=4 must be at most 3"):
        FederatedDataModule(
            "text_files", num_clients=4, partition="natural", data_dir=str(tmp_path)
        ).setup()


def test_the_character_model_is_causal_and_refuses_bad_sizes() -> None:
    torch.manual_seed(0)
    model = CharTransformer(length=6, width=8, heads=2, depth=2).double()
    x = torch.randint(0, NUM_CODES, (2, 6))
    hidden: list[torch.Tensor] = []
    model.blocks[1].register_forward_hook(lambda _m, _i, out: hidden.append(out))
    model(x)
    changed = x.clone()
    changed[:, 4] = (changed[:, 4] + 1) % NUM_CODES
    model(changed)
    torch.testing.assert_close(hidden[0][:, :4], hidden[1][:, :4])
    assert not torch.allclose(hidden[0][:, 5], hidden[1][:, 5])
    for options in ({"heads": 5}, {"depth": 0}, {"width": 0}):
        with pytest.raises(ValueError, match=str(next(iter(options.values())))):
            CharTransformer(**options)


# --- Hugging Face ---


class Table(dict):
    """What is used of `datasets.Dataset`."""

    def __init__(self, columns: dict, classes: int | None = None) -> None:
        super().__init__(columns)
        self.column_names = list(columns)
        self.features = {name: SimpleNamespace() for name in columns}
        if classes:
            self.features["label"].num_classes = classes
        self.info = SimpleNamespace(dataset_name="stand-in")


def test_hugging_face_stand_in() -> None:
    train = Table({"image": [[0.0, 1.0], [2.0, 3.0]], "label": [0, 1], "user": ["u", "v"]}, 5)
    data = from_hugging_face({"train": train}, client="user")
    assert data.x_train.tolist() == [[0.0, 1.0], [2.0, 3.0]]
    assert (data.num_classes, data.name) == (5, "stand-in")
    assert data.client_train is not None
    assert data.client_train.tolist() == [0, 1]
    with pytest.raises(ValueError, match="x='pixels' is not a column: image, label, user"):
        from_hugging_face({"train": train}, x="pixels")
    with pytest.raises(ValueError, match="split 'train', got test"):
        from_hugging_face({"test": train})
    with pytest.raises(ValueError, match=r"one shape, got \[\(1,\), \(2,\)\]"):
        from_hugging_face({"train": Table({"image": [[0.0], [1.0, 2.0]], "label": [0, 1]})})


def test_hugging_face_images(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pixels = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    )
    made = datasets.Dataset.from_dict({"image": list(pixels), "label": [0, 2]}, features=features)
    made.save_to_disk(str(tmp_path / "saved"))
    arguments = {"path": str(tmp_path / "saved")}
    data = FederatedDataModule(
        "hugging_face", num_clients=1, val_fraction=0.0, source_args=arguments
    )
    assert data.num_classes == 3
    expected = torch.tensor(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(data.x, expected)


# --- who holds what ---


def test_natural_needs_owners_and_keeps_the_largest() -> None:
    x, owner = torch.arange(12.0)[:, None], ["a"] * 2 + ["b"] * 6 + ["c"] * 4
    data = FederatedDataModule(
        from_arrays(x, [0] * 12, client=owner), num_clients=2, partition="natural", val_fraction=0.0
    )
    assert data.client_sizes.tolist() == [6, 4]
    assert sorted(data.x[data.partition.client(1)].flatten().tolist()) == [8, 9, 10, 11]
    with pytest.raises(ValueError, match="needs data that says who holds a record"):
        FederatedDataModule(from_arrays(x, [0] * 12), num_clients=2, partition="natural").setup()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([0, 1]), r"int64 \[3\]"),
        (torch.tensor([0, 2, 2]), "every id from 0"),
        (torch.tensor([-1, 0, 1]), "every id from 0"),
    ],
)
def test_client_ids_are_checked(ids: torch.Tensor, message: str) -> None:
    whole = from_arrays(torch.zeros(3, 1), [0, 0, 0])
    with pytest.raises(ValueError, match=message):
        type(whole)(whole.x_train, whole.y_train, whole.x_test, whole.y_test, 1, "t", ids)
