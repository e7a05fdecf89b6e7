"""Sources, IDX files and the data module."""

import gzip
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from jsonargparse import ArgumentParser

from fl_lightning.data import (
    Arrays,
    FederatedDataModule,
    digits,
    fashion_mnist,
    from_arrays,
    mnist,
)
from fl_lightning.data.idx import read_idx

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")


def idx_bytes(array, code=0x08):
    header = struct.pack(">BBBB", 0, 0, code, array.ndim)
    return header + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def idx_folder(tmp_path):
    """Four IDX files: 12 training images and 6 test images; half of the files gzipped."""
    for split, count in (("train", 12), ("t10k", 6)):
        images = np.arange(count * 28 * 28).reshape(count, 28, 28) % 256
        (tmp_path / f"{split}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        labels = gzip.compress(idx_bytes(np.arange(count) % 10))
        (tmp_path / f"{split}-labels-idx1-ubyte.gz").write_bytes(labels)
    return tmp_path


def small(num_records=40, num_test=6):
    x = torch.arange(num_records * 3, dtype=torch.float32).reshape(num_records, 3)
    y = torch.arange(num_records) % 4
    return from_arrays(x, y, -x[:num_test], y[:num_test])


# --- IDX ---


def test_idx_raw_and_gzipped(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    for name, content in (("raw", idx_bytes(array)), ("packed", gzip.compress(idx_bytes(array)))):
        (tmp_path / name).write_bytes(content)
        got = read_idx(tmp_path / name)
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got, array)


WHOLE = idx_bytes(np.arange(24).reshape(2, 3, 4))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"\0\0", "not an IDX file"),
        (b"\1" + WHOLE[1:], "starts with 0x01000803"),
        (idx_bytes(np.zeros(4), code=0x0D), "starts with 0x00000d01"),
        (WHOLE[:9], "truncated: 9 bytes, its header needs 16"),
        (WHOLE[:-1], r"39 bytes, its shape \(2, 3, 4\) needs 40"),
        (WHOLE + b"\0", "41 bytes"),
        (gzip.compress(WHOLE, mtime=0)[:-9], "not a whole gzip file"),
        (gzip.compress(WHOLE, mtime=0)[:-8] + bytes(8), "not a whole gzip file"),
        (b"\x1f\x8b" + bytes(20), "not a whole gzip file"),
    ],
)
def test_idx_refuses_damaged_files(tmp_path, content, message):
    path = tmp_path / "broken-file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_idx(path)
    assert "broken-file" in str(caught.value)


@pytest.mark.parametrize("load", [fashion_mnist, mnist])
def test_idx_dataset(idx_folder, load):
    data = load(idx_folder)
    assert data.x_train.shape == (12, 1, 28, 28)
    assert data.x_test.shape == (6, 1, 28, 28)
    assert data.x_train.dtype == torch.float32
    assert data.y_train.tolist() == [*range(10), 0, 1]
    assert data.num_classes == 10
    raw = torch.arange(12 * 28 * 28).reshape(12, 1, 28, 28) % 256
    torch.testing.assert_close(data.x_train, raw / 127.5 - 1)


def test_idx_dataset_refuses_other_shapes(idx_folder):
    (idx_folder / "train-images-idx3-ubyte").write_bytes(idx_bytes(np.zeros((12, 8, 8))))
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte must hold \[N, 28, 28\]"):
        fashion_mnist(idx_folder)


def test_missing_files_say_how_to_get_them(idx_folder):
    (idx_folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        fashion_mnist(idx_folder)
    hints = ["t10k-labels", str(idx_folder), "four IDX files", "dataset-fashion-mnist", "http://"]
    hints.append("set download to true")
    assert all(hint in str(caught.value) for hint in hints)


@pytest.mark.skipif(
    not DEBIAN_FASHION.is_dir(), reason="needs Debian's package dataset-fashion-mnist"
)
def test_fashion_mnist_as_packaged():
    data = fashion_mnist()
    assert data.x_train.shape == (60_000, 1, 28, 28)
    assert data.x_test.shape == (10_000, 1, 28, 28)
    assert data.x_train.aminmax() == (-1, 1)
    assert torch.bincount(data.y_train).tolist() == [6000] * 10
    assert torch.bincount(data.y_test).tolist() == [1000] * 10


# --- other sources ---


def test_digits_split_is_stratified_and_constant():
    data, again = digits(), digits()
    assert data.x_train.shape == (1437, 1, 8, 8)
    assert data.x_test.shape == (360, 1, 8, 8)
    assert data.x_train.aminmax() == (-1, 1)
    assert torch.equal(data.x_test, again.x_test)
    share = torch.bincount(data.y_test) / (torch.bincount(data.y_test) + data.y_train.bincount())
    assert ((share - 0.2).abs() < 0.01).all()


def test_from_arrays_converts():
    data = from_arrays(np.zeros((4, 2)), np.array([0, 1, 2, 1], np.uint8), num_classes=5)
    assert (data.x_train.dtype, data.y_train.dtype) == (torch.float32, torch.int64)
    assert data.num_classes == 5
    assert data.x_test.shape == (0, 2)
    assert from_arrays([[0.0], [1.0]], [0, 6]).num_classes == 7


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((np.zeros((4, 2)), np.zeros(4)), {}, "y_train must hold integers, got torch.float64"),
        ((np.zeros((4, 2)), [True] * 4), {}, "y_train must hold integers, got torch.bool"),
        ((np.zeros((4, 2)), [0] * 3), {}, "x_train has 4 records but y_train has 3"),
        ((np.zeros(4), [0] * 4), {}, "x_train must be float32 or int64"),
        ((np.zeros((4, 2), complex), [0] * 4), {}, "x_train must hold real numbers"),
        ((np.zeros((4, 2)), np.zeros((4, 1), int)), {}, r"y_train must be \[N\], .*reshape"),
        ((np.zeros((4, 2)), [0, 1, 2, 3]), {"num_classes": 3}, r"\[0, num_classes=3\)"),
        ((np.zeros((4, 2)), [0, 1, -1, 3]), {}, "y_train must lie in"),
        ((np.zeros((4, 2)), [0] * 4, np.zeros((1, 3)), [0]), {}, r"shape \[2\], got \[3\]"),
        ((np.zeros((4, 2)), [0] * 4, np.zeros((1, 2))), {}, "y_test is None"),
        ((np.zeros((4, 2)), [0] * 4), {"y_test": [0]}, "x_test is None"),
    ],
)
def test_from_arrays_refusals(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        from_arrays(*args, **kwargs)


# --- data module ---


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "shards", "quantity"])
def test_validation_is_disjoint_and_nothing_is_lost(partition):
    source = small()
    data = FederatedDataModule(source, num_clients=4, partition=partition, val_fraction=0.25)
    data.setup("fit")
    (x_val, y_val), *rest = data.val_dataloader()
    assert not rest
    assert len(x_val) == 10
    together, labels = torch.cat([data.x, x_val]), torch.cat([data.y, y_val])
    order = together[:, 0].argsort()
    assert torch.equal(together[order], source.x_train)
    assert torch.equal(labels[order], source.y_train)
    assert data.client_sizes.dtype == torch.int64
    assert data.client_sizes.sum() == 30
    assert data.client_sizes.tolist() == data.partition.sizes.tolist()
    assert data.client_sizes.min() >= 2
    assert (data.num_clients, data.num_classes, data.input_shape) == (4, 4, (3,))


def test_test_records_are_reached_by_the_test_loader_only():
    source = small(num_test=6)
    data = FederatedDataModule(source, num_clients=4, eval_batch_size=4)
    assert (data.x >= 0).all()
    assert all((x >= 0).all() for x, _ in data.val_dataloader())
    batches = list(data.test_dataloader())
    assert [len(y) for _, y in batches] == [4, 2]
    assert torch.equal(torch.cat([x for x, _ in batches]), source.x_test)
    changed = from_arrays(source.x_train, source.y_train, source.x_test + 1, source.y_test)
    assert FederatedDataModule(changed, num_clients=4).digest() == data.digest()


def test_no_validation_and_no_test_records():
    data = FederatedDataModule(small(num_test=0), num_clients=4, val_fraction=0.0)
    assert data.val_dataloader() == []
    assert len(data.x) == 40
    with pytest.raises(ValueError, match="no test records"):
        data.test_dataloader()


def test_nan_records_are_kept():
    x = torch.zeros(20, 2)
    x[3] = torch.nan
    data = FederatedDataModule(from_arrays(x, [0, 1] * 10), num_clients=2, val_fraction=0.0)
    assert int(data.x.isnan().any(1).sum()) == 1
    assert len(data.digest()) == 64


def test_digest_follows_records_labels_and_partition():
    source = small()
    x, y = source.x_train.clone(), source.y_train.clone()
    x[7, 1] += 1e-6 * x[7, 1]
    y[7] = (y[7] + 1) % 4

    def digest(arrays=source, **kwargs):
        return FederatedDataModule(
            arrays, **{"num_clients": 4, "val_fraction": 0.0, **kwargs}
        ).digest()

    variants = [
        digest(),
        digest(from_arrays(x, source.y_train)),
        digest(from_arrays(source.x_train, y)),
        digest(num_clients=5),
        digest(seed=1),
        digest(partition="dirichlet"),
        digest(val_fraction=0.1),
    ]
    assert len(set(variants)) == len(variants)
    assert digest() == variants[0]
    assert digest(eval_batch_size=3) == variants[0]


class Probe(pl.LightningModule):
    """Notes the round of each training step and counts the evaluated records."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.rounds, self.validated, self.tested = [], 0, 0
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        self.rounds.append((self.current_epoch, int(batch)))

    def validation_step(self, batch, batch_idx):
        self.validated += len(batch[1])

    def test_step(self, batch, batch_idx):
        self.tested += len(batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.filterwarnings("ignore:.*number of training batches.*")
def test_one_training_step_a_round_under_the_trainer():
    model, data = Probe(), FederatedDataModule(small(), num_clients=4)
    names = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = pl.Trainer(
        max_epochs=3, accelerator="cpu", num_sanity_val_steps=0, **dict.fromkeys(names, False)
    )
    trainer.fit(model, datamodule=data)
    trainer.test(model, datamodule=data, verbose=False)
    assert model.rounds == [(0, 0), (1, 0), (2, 0)]
    assert (model.validated, model.tested) == (3 * 4, 6)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_clients": 0}, "num_clients=0"),
        ({"partition": "sorted"}, "partition='sorted' must be one of iid, dirichlet"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"val_fraction": 1.0}, "val_fraction=1.0"),
        ({"val_fraction": -0.1}, "val_fraction=-0.1"),
        ({"min_client_size": 0}, "min_client_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"eval_batch_size": 0}, "eval_batch_size=0"),
    ],
)
def test_module_refuses_arguments_at_once(kwargs, message):
    with pytest.raises(ValueError, match=message):
        FederatedDataModule(**kwargs)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"source": "cifar"}, "source='cifar' is unknown: use one of digits, fashion_mnist, mnist"),
        ({"source": "no_such_package.load"}, "cannot be imported: No module named"),
        ({"source": "math.pi"}, "is not a function"),
        ({"source": "builtins.dict"}, "must give Arrays .* got dict"),
        ({"source": 3}, "must give Arrays .* got int"),
        (
            {"source": "digits", "data_dir": "here"},
            "source='digits' takes no arguments: .*data_dir",
        ),
        ({"source": small(), "num_clients": 19}, "38 records, but there are 36"),
    ],
)
def test_module_refuses_data_at_setup(args, message):
    data = FederatedDataModule(**args)
    with pytest.raises(ValueError, match=message):
        data.setup()


def user_source() -> Arrays:
    return small(num_records=60)


def test_configured_by_jsonargparse(monkeypatch, idx_folder):
    monkeypatch.setitem(sys.modules, "user_data", sys.modules[__name__])

    def parse(*argv):
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(FederatedDataModule, "data")
        config = parser.parse_args(argv)
        assert parser.parse_string(parser.dump(config)) == config
        assert "Unable" not in parser.dump(config)
        return parser.instantiate(config).data

    assert len(parse().x) == 1293
    skewed = parse("--data.partition=dirichlet", "--data.alpha=0.1", "--data.num_clients=3")
    assert (skewed.partition.num_clients, skewed.alpha) == (3, 0.1)
    folder = f"--data.data_dir={idx_folder}"
    idx = parse("--data.source=fashion_mnist", folder, "--data.num_clients=2")
    assert idx.input_shape == (1, 28, 28)
    assert len(parse("--data.source=user_data.user_source", "--data.val_fraction=0").x) == 60
