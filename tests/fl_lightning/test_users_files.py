"""Files as users have them: words as labels, other letters, palettes, byte order marks, no test."""

from __future__ import annotations

import ast
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from fl_lightning.data import (
    FederatedDataModule,
    by_author,
    csv,
    from_arrays,
    from_hugging_face,
    text_files,
)
from fl_lightning.data.text import NUM_CODES, VOCABULARY, encode
from fl_lightning.export import export
from fl_lightning.fit import main

ROOT = Path(__file__).resolve().parents[2]
ENGLISH = "the quick brown fox jumps over the lazy dog, and on it goes. " * 40


@pytest.fixture
def cwd(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    return tmp_path


# --- text ---


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("Широка страна моя родная, много в ней лесов. " * 30, "'а' "),
        ("人人生而自由,在尊严和权利上一律平等。" * 60, "'人' "),
        (ENGLISH + "ü" * (len(ENGLISH) // 8), "'ü' "),
        ("\x00\x01" * 500, r"'\x00' "),
    ],
)
def test_other_letters_are_refused_with_their_number(text, named):
    outside = sum(letter not in VOCABULARY for letter in text)
    with pytest.raises(ValueError) as caught:
        by_author({"a": text, "b": text}, name="own", length=20)
    for part in ("own", f"{outside} of {len(text)}", f"{2 * outside} of {2 * len(text)}"):
        if part in str(caught.value):
            break
    else:
        pytest.fail(str(caught.value))
    assert named in str(caught.value)


def test_one_author_in_other_letters_among_many():
    texts = {f"author {i}": ENGLISH for i in range(20)} | {"odd": "Ж" * 500}
    with pytest.raises(ValueError, match=r"500 of 500 characters of 'odd'"):
        by_author(texts, name="own", length=20)


def test_a_few_other_letters_are_counted_and_share_one_code(caplog):
    caplog.set_level(logging.INFO, logger="pytorch_lightning")
    text = ENGLISH + "naïve café, “quoted” — €5"
    arrays = by_author({"a": text}, name="own", length=20)
    assert f"6 of {len(text)} characters are outside" in caplog.text
    assert int(arrays.x_test.max()) == NUM_CODES - 1
    caplog.clear()
    by_author({"a": ENGLISH}, name="own", length=20)
    assert not caplog.text


def test_every_letter_has_its_code_and_all_others_the_last():
    assert encode(VOCABULARY).tolist() == list(range(len(VOCABULARY)))
    assert set(encode("éÿ€日😀\x00\t\x7f\u0000\ud800").tolist()) == {NUM_CODES - 1}
    # Their numbers are those of letters, but for multiples of 256.
    assert set(encode("šţ中\U0001f34c").tolist()) == {NUM_CODES - 1}


def test_text_files_with_marks_and_other_line_ends(tmp_path):
    for name, raw in (
        ("a", ENGLISH.encode("utf-8-sig")),
        ("b", ENGLISH.replace(". ", ".\r\n").encode()),
        ("c", ENGLISH.replace(". ", ".\n").encode()),
    ):
        (tmp_path / f"{name}.txt").write_bytes(raw)
    arrays = text_files(tmp_path, length=10)
    owner, last = arrays.client_train, NUM_CODES - 1
    assert owner is not None
    assert not bool((arrays.x_train == last).any())
    assert torch.equal(arrays.x_train[owner == 1], arrays.x_train[owner == 2])


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_files_in_another_encoding_are_refused(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes(("é" + ENGLISH).encode(encoding))
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8: byte 0x.. at 0"):
        text_files(tmp_path)
    (tmp_path / "t.csv").write_bytes("é,label\n1,0\n".encode(encoding))
    with pytest.raises(ValueError, match=r"t\.csv is not UTF-8"):
        csv(str(tmp_path / "t.csv"), "label")


# --- tables and labels ---


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "t.csv").write_bytes("label,größe\n1,2\n0,3\n".encode("utf-8-sig"))
    arrays = csv("~/t.csv", "label", test_path="~/t.csv", ranges={"größe": (2, 3)})
    assert arrays.y_train.tolist() == [1, 0]
    assert arrays.x_train.ravel().tolist() == [-1.0, 1.0]


def test_words_are_numbered_in_their_order(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="pytorch_lightning")
    (tmp_path / "t.csv").write_text("x,kind\n1,dog\n2, cat\n3,dog\n4,cat\n")
    (tmp_path / "u.csv").write_text("x,kind\n1,emu\n2,dog\n")
    arrays = csv(str(tmp_path / "t.csv"), "kind", test_path=str(tmp_path / "u.csv"))
    assert arrays.y_train.tolist() == [1, 0, 1, 0]
    assert arrays.y_test.tolist() == [2, 1]
    assert arrays.num_classes == 3
    assert "public" in caplog.text
    assert "'cat' is 0, 'dog' is 1, 'emu' is 2" in caplog.text
    x = torch.zeros(4, 2)
    for words in (
        ["b", "a", "b", "a"],
        np.array(["b", "a", "b", "a"]),
        np.array(list("baba"), "O"),
    ):
        assert from_arrays(x, words).y_train.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x,kind\n1,dog\n2,3\n", "row 2, column 'kind': 'dog' is no number"),
        ("x,kind\n1,dog\n2,\n", "row 2, column 'kind': 'dog' is no number"),
        ("x,kind\n1,1\n2,\n", "row 3: label must be an integer, got an empty cell"),
        ("x,kind\n1,1\n2,inf\n", "row 3: label must be an integer, got inf"),
        ("x,kind\n" + "".join(f"{i},name {i}\n" for i in range(9)), "9 different words for 9 reco"),
        ("kind\n1\n2\n", "no columns of numbers, only kind"),
        ("x,kind\n1,1\n" + "2" * 200_000 + ",1\n", "no CSV file: field larger"),
    ],
)
def test_a_table_that_cannot_be_meant(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        csv(str(tmp_path / "t.csv"), "kind")


def test_words_beside_numbers_are_refused():
    x = torch.zeros(2, 2)
    for first, second in ((["a", "b"], [0, 1]), ([0, 1], ["a", "b"])):
        with pytest.raises(ValueError, match="integers or words, not both: got 'a' and 0"):
            from_arrays(x, first, x, second)
    with pytest.raises(ValueError, match="integers or words, not both: got 'a' and None"):
        from_arrays(x, np.array(["a", None], "O"))


# --- images ---


class Split(dict):
    """Columns, as a data set of Hugging Face's gives them."""

    column_names = property(lambda self: list(self))
    features = property(lambda self: dict.fromkeys(self))
    info = None


def test_images_with_a_palette_are_their_colours():
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (4, 3), np.uint8)[rng.integers(0, 4, (5, 6))]
    plain = image.fromarray(colours)
    indexed = plain.quantize(4, dither=image.Dither.NONE)
    assert indexed.mode == "P"
    bits = image.fromarray((colours[..., 0] > 99).astype(np.uint8) * 255).convert("1")

    def read(picture):
        split = Split(image=[picture, picture], label=["no", "yes"])
        return from_hugging_face({"train": split}).x_train[0]

    assert torch.equal(read(indexed), read(indexed.convert("RGB")))
    assert torch.allclose(read(indexed), read(plain), atol=2 / 255 * 3)
    assert set(read(bits).unique().tolist()) == {-1.0, 1.0}


# --- no test set ---


def table(path: Path, rows: int = 40) -> None:
    rng = np.random.default_rng(0)
    lines = [f"{a:.3f},{b:.3f},{int(a > 0)}" for a, b in rng.normal(size=(rows, 2))]
    path.write_text("\n".join(["a,b,y", *lines]) + "\n")


def split_without_test() -> object:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 2))
    return from_hugging_face(
        {"train": Split(x=x.tolist(), y=(x[:, 0] > 0).astype(int))}, x="x", y="y"
    )


@pytest.mark.parametrize("val_fraction", ["0", "0.2"])
@pytest.mark.parametrize(
    "source",
    [
        ["--data.source", "csv", "--data.source_args", "{path: t.csv, label: y}"],
        ["--data.source", "tests.fl_lightning.test_users_files.split_without_test"],
    ],
)
def test_a_run_without_a_test_set_ends_properly(cwd, capsys, source, val_fraction):
    table(cwd / "t.csv")
    network = ["--model.network", "fl_lightning.models.LogisticRegression"]
    network += ["--model.network.in_features", "2", "--model.network.num_classes", "2"]
    options = ["--data.num_clients", "2", "--trainer.max_epochs", "2", "--run_dir", "run"]
    options += ["--privacy.delta", "0.01", "--model.execution", "loop", "--trainer.accelerator"]
    main([*source, *network, *options, "cpu", "--data.val_fraction", val_fraction])
    shown = capsys.readouterr().out
    assert "has no test records, so there is no test figure" in shown
    run = cwd / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["test_accuracy"] is None
    assert (summary["sim_only_val_accuracy"] is None) == (val_fraction == "0")
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert {
        *("config.yaml", "ledger.jsonl", "ledger.head", "rounds.csv", "layers.csv", "secret.key"),
        *("checkpoints/last.ckpt", "privacy_statement.md", "summary.json"),
        *("plots/convergence.png", "plots/clients.png", "plots/layers.png"),
    } <= names
    assert "| test accuracy | - |" in (export(run) / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load((run / "config.yaml").read_text())["read_test_set"] is True


def test_text_without_a_test_part():
    arrays = by_author({"a": ENGLISH, "b": ENGLISH}, name="own", length=20, test_fraction=0)
    data = FederatedDataModule(arrays, 2)
    assert not data.has_test
    with pytest.raises(ValueError, match="no test records"):
        data.test_dataloader()


# --- files of the packages' own ---


@pytest.mark.parametrize(
    "path", sorted(p for n in ("aadp_kernels", "fl_lightning") for p in (ROOT / n).rglob("*.py"))
)
def test_text_is_written_and_read_as_utf8(path):
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(call, ast.Call):
            continue
        name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        name = call.func.id if isinstance(call.func, ast.Name) else name
        of = call.func.value if isinstance(call.func, ast.Attribute) else None
        if isinstance(of, ast.Name) and of.id in ("os", "tarfile", "Ledger", "cls", "gzip"):
            continue
        words = [a.value for a in call.args if isinstance(a, ast.Constant)]
        binary = any(isinstance(w, str) and set(w) <= set("rwab+x") and "b" in w for w in words)
        if name in ("open", "fdopen", "read_text", "write_text") and not binary:
            modes = ast.unparse(call)
            assert "encoding=" in modes or "b'" in modes, f"{path.name}:{call.lineno}: {modes}"
