"""The data of all simulated clients as a LightningDataModule."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fl_lightning.data.arrays import Arrays
from fl_lightning.data.fields import Fields
from fl_lightning.data.partition import (
    Partition,
    dirichlet_partition,
    held_out_partition,
    iid_partition,
    natural_partition,
    quantity_partition,
    shards_partition,
)
from fl_lightning.data.sources import load
from fl_lightning.data.transform import transformed
from fl_lightning.data.transform_check import why_not_alone

PartitionName = Literal["iid", "dirichlet", "shards", "quantity", "natural"]
_HOLDOUT_STREAM = 1


@dataclass(frozen=True, eq=False)
class _Prepared:
    arrays: Arrays
    x: Tensor
    y: Tensor
    x_val: Tensor
    y_val: Tensor
    partition: Partition
    transform_problem: str
    owners: tuple[np.ndarray, np.ndarray] | None = None  # of training and held-out records


class FederatedDataModule(pl.LightningDataModule):
    """Records split over clients; a training batch is one round, not records.

    The validation records are held out of the training data before the partition; the test records
    are reached by `test_dataloader` only. Everything is a pure function of the arguments.

    Args:
        source: digits, fashion_mnist, mnist, cifar10, csv, hugging_face, shakespeare, text_files or
            tokenized_text, or the import path (package.module.function) of a function that returns
            Arrays; from Python also such Arrays.
        num_clients: number of clients, at least 1.
        partition: iid (equal sizes), dirichlet (label skew), shards (few labels a client), quantity
            (size skew) or natural (the data's own clients, those with most records).
        alpha: Dirichlet concentration, above 0; smaller is more skewed. For dirichlet and quantity.
        shards_per_client: for shards, at least 1.
        val_fraction: share of the training records held out for validation, in [0, 1).
        min_client_size: records that every client must have, at least 1.
        seed: seed of the hold-out and the partition, at least 0. Public.
        data_dir: folder of the source's files; None looks in the usual places.
        download: whether missing files may be fetched; their checksums are verified.
        source_args: further arguments of the source's function.
        transform: public function that replaces every record, each by itself: scattering (wavelet
            features of images), sentence_features (of texts, by a frozen encoder), hidden_states
            (after an encoder's first layers), or the import path of a function Tensor → Tensor.
            Null: none.
        transform_args: further arguments of the transform.
        eval_batch_size: records per validation or test batch, at least 1.

    Attributes:
        by_owner: whether batches of held-out and test records say whose they are; a run with
            personal layers sets it.

    Raises:
        ValueError: an argument out of range (at once), or data that does not fit (at setup).
        FileNotFoundError: at setup, when files are missing; says how to get them.
    """

    by_owner = False

    def __init__(
        self,
        source: str | Arrays = "digits",
        num_clients: int = 10,
        *,
        partition: PartitionName = "iid",
        alpha: float = 0.5,
        shards_per_client: int = 2,
        val_fraction: float = 0.1,
        min_client_size: int = 2,
        seed: int = 0,
        data_dir: str | None = None,
        download: bool = False,
        source_args: dict[str, Any] | None = None,
        transform: str | None = None,
        transform_args: dict[str, Any] | None = None,
        eval_batch_size: int = 1024,
    ) -> None:
        super().__init__()
        if num_clients < 1:
            raise ValueError(f"num_clients={num_clients} must be >= 1")
        if partition not in get_args(PartitionName):
            names = ", ".join(get_args(PartitionName))
            raise ValueError(f"partition={partition!r} must be one of {names}")
        if shards_per_client < 1:
            raise ValueError(f"shards_per_client={shards_per_client} must be >= 1")
        if not 0 < alpha < float("inf"):
            raise ValueError(f"alpha={alpha} must be finite and > 0")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction={val_fraction} must lie in [0, 1)")
        if min_client_size < 1:
            raise ValueError(f"min_client_size={min_client_size} must be >= 1")
        if seed < 0:
            raise ValueError(f"seed={seed} must be >= 0")
        if transform_args and transform is None:
            raise ValueError(f"transform_args={transform_args} has no meaning without transform")
        if eval_batch_size < 1:
            raise ValueError(f"eval_batch_size={eval_batch_size} must be >= 1")
        self.source = source
        self.num_clients = num_clients
        self.partition_name = partition
        self.alpha = alpha
        self.shards_per_client = shards_per_client
        self.val_fraction = val_fraction
        self.min_client_size = min_client_size
        self.seed = seed
        self.data_dir = data_dir
        self.download = download
        self.source_args = source_args
        self.transform = transform
        self.transform_args = transform_args
        self.eval_batch_size = eval_batch_size

    @cached_property
    def _prepared(self) -> _Prepared:
        arrays = load(
            self.source,
            data_dir=self.data_dir,
            download=self.download,
            source_args=self.source_args,
        )
        problem = ""
        if self.transform is not None:
            raw, how = arrays, (self.transform, self.transform_args)
            arrays = transformed(raw, *how)
            problem = why_not_alone(raw, arrays.x_train, *how)
        num_records = len(arrays.x_train)
        # A stream of its own: the partition draws from default_rng(seed).
        order = np.random.default_rng([self.seed, _HOLDOUT_STREAM]).permutation(num_records)
        held = max(1, round(self.val_fraction * num_records)) if self.val_fraction else 0
        val, train = (torch.from_numpy(np.sort(part)) for part in (order[:held], order[held:]))
        # A copy of all records only where some are taken out of them.
        x, y = arrays.x_train, arrays.y_train
        if held:
            x, y = x[train], y[train]
        owners = None if arrays.client_train is None else arrays.client_train[train]
        partition = self._split(y, owners)
        val_records = arrays.x_train[val], arrays.y_train[val]
        known = arrays.client_train
        both = None if known is None else (known[train].numpy(), known[val].numpy())
        return _Prepared(arrays, x, y, *val_records, partition, problem, both)

    def _split(self, labels: Tensor, owners: Tensor | None) -> Partition:
        clients, seed, least = self.num_clients, self.seed, self.min_client_size
        y = labels.numpy()
        if self.partition_name in ("dirichlet", "shards") and y.ndim != 1:
            raise ValueError(
                f"partition={self.partition_name!r} divides records by their class, but targets of "
                f"shape {list(y.shape[1:])} are no classes; use iid, quantity or natural"
            )
        match self.partition_name:
            case "iid":
                return iid_partition(len(y), clients, seed, min_size=least)
            case "dirichlet":
                return dirichlet_partition(y, clients, seed, alpha=self.alpha, min_size=least)
            case "shards":
                return shards_partition(
                    y, clients, seed, shards_per_client=self.shards_per_client, min_size=least
                )
            case "quantity":
                return quantity_partition(len(y), clients, seed, alpha=self.alpha, min_size=least)
        if owners is None:
            raise ValueError(
                f"partition='natural' needs data that says who holds a record: source "
                f"{self.source if isinstance(self.source, str) else 'arrays'!r} does not "
                "(from_arrays and csv take client)"
            )
        return natural_partition(owners.numpy(), clients, seed, min_size=least)

    def setup(self, stage: str | None = None) -> None:
        """Load and split, once; the attributes below do so themselves when asked earlier."""
        _ = self._prepared

    @property
    def x(self) -> Tensor:
        """float32 or int64 [N, ...], the training records on the CPU. Private."""
        return self._prepared.x

    @property
    def y(self) -> Tensor:
        """int64 [N], their labels, or targets [N, ...] that are no classes. Private."""
        return self._prepared.y

    @property
    def partition(self) -> Partition:
        """Which rows of `x` and `y` each client holds."""
        return self._prepared.partition

    @cached_property
    def client_sizes(self) -> Tensor:
        """int64 [K], records per client. Public."""
        return torch.from_numpy(self.partition.sizes)

    @property
    def held_out(self) -> tuple[Tensor, Tensor]:
        """Records and labels that are held out for validation. Private."""
        return self._prepared.x_val, self._prepared.y_val

    @cached_property
    def held_out_partition(self) -> Partition:
        """Which rows of `held_out` each client holds; no training record is among them."""
        known = self._prepared
        return self._dealt(known.y_val, None if known.owners is None else known.owners[1])

    @cached_property
    def test_partition(self) -> Partition:
        """Which test records are whose, dealt as those that are held out.

        Raises:
            ValueError: natural clients, whose test records the data does not name.
        """
        whole = self._prepared.arrays
        if self.partition_name == "natural" and whole.client_test is None:
            raise ValueError(
                f"source {whole.name!r} does not say whose its test records are, so no client's "
                "personal layers can be tested: give client_test (from_arrays), or a client column"
            )
        owners = None if whole.client_test is None else whole.client_test.numpy()
        return self._dealt(whole.y_test, owners)

    def _dealt(self, y: Tensor, owners: np.ndarray | None) -> Partition:
        """Records with labels y, and owners if any are known, as clients would hold them."""
        known, natural = self._prepared, self.partition_name == "natural"
        both = None
        if natural and known.owners is not None and owners is not None:
            both = known.owners[0], owners
        return held_out_partition(
            known.partition,
            self.seed,
            labels=(known.y.numpy(), y.numpy()) if self.num_classes and y.ndim == 1 else None,
            owners=both,
            count=len(y),
        )

    @property
    def num_classes(self) -> int:
        """Public number of classes; 0 where targets are no classes."""
        return self._prepared.arrays.num_classes

    @property
    def fields(self) -> Fields | None:
        """The named inputs that a record is packed from; None where it is one array."""
        return self._prepared.arrays.fields

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one record."""
        return tuple(self.x.shape[1:])

    @property
    def dataset_name(self) -> str:
        """What to call the data in reports."""
        return self._prepared.arrays.name

    @property
    def transform_problem(self) -> str:
        """Why the transform's values are not each of one record alone; "" where they are."""
        return self._prepared.transform_problem

    @property
    def has_test(self) -> bool:
        """Whether the source has test records."""
        return len(self._prepared.arrays.x_test) > 0

    def only(self, client: int) -> FederatedDataModule:
        """The records of one client as a population of one, in the order that they have here.

        Those that it holds out are held out there too.

        Raises:
            ValueError: there is no such client.
        """
        if not 0 <= client < self.num_clients:
            raise ValueError(f"client={client} must be from 0 to {self.num_clients - 1}")
        rows = torch.from_numpy(self.partition.client(client))
        x, y, known = self.x[rows], self.y[rows], self._prepared
        whole = known.arrays
        arrays = Arrays(x, y, x[:0], y[:0], whole.num_classes, whole.name, fields=whole.fields)
        held = torch.from_numpy(self.held_out_partition.client(client))
        x_val, y_val = (values[held] for values in self.held_out)
        fraction = self.val_fraction if len(held) else 0.0
        one = FederatedDataModule(arrays, num_clients=1, val_fraction=fraction, min_client_size=1)
        one.transform, problem = self.transform, known.transform_problem
        alone = Partition(np.arange(len(x)), np.array([0, len(x)]))
        one.__dict__["_prepared"] = _Prepared(arrays, x, y, x_val, y_val, alone, problem)
        return one

    def announce_sizes(self, sizes: list[int]) -> None:
        """Take the records that clients elsewhere say they have in place of a simulation's.

        Args:
            sizes: one number a client, public.
        """
        self.client_sizes = torch.tensor(sizes, dtype=torch.int64)

    def digest(self) -> str:
        """Hex BLAKE2b-256 of the clients' records, labels and partition, bit by bit; cached.

        Private: a plain hash of records lets anyone test guesses of them. Feed it to a keyed
        derivation; do not publish or log it.
        """
        return self._digest

    @cached_property
    def _digest(self) -> str:
        state = hashlib.blake2b(digest_size=32)
        partition = self.partition
        for array in (self.x.numpy(), self.y.numpy(), partition.indices, partition.offsets):
            contiguous = np.ascontiguousarray(array)
            state.update(f"{contiguous.dtype.str}{contiguous.shape}".encode())
            state.update(contiguous.data)
        if self.fields is not None:  # the same numbers, given to other inputs, are other records
            state.update(repr(self.fields).encode())
        return state.hexdigest()

    def train_dataloader(self) -> DataLoader:
        """One item an epoch: the round is `trainer.current_epoch`, the item itself is only 0."""
        return DataLoader(range(1), batch_size=None)  # pyright: ignore[reportArgumentType]

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Batches (x, y) of the held-out records; an empty list where val_fraction is 0.

        With `by_owner`, (x, y, client) of those that a client holds, sorted by it. Each process of
        a Trainer gets its part of every batch, so that no record counts twice.
        """
        if not self.val_fraction:
            return []
        held = self.held_out_partition if self.by_owner else None
        return self._batches(*self.held_out, held)

    def test_dataloader(self) -> DataLoader:
        """Batches of the test records, as those of `val_dataloader`.

        Raises:
            ValueError: the source has none.
        """
        arrays = self._prepared.arrays
        if len(arrays.x_test) == 0:
            raise ValueError(f"source {arrays.name!r} has no test records: give x_test and y_test")
        held = self.test_partition if self.by_owner else None
        return self._batches(arrays.x_test, arrays.y_test, held)

    def _batches(self, x: Tensor, y: Tensor, held: Partition | None) -> DataLoader:
        whole = (x, y)
        if held is not None:
            rows = torch.from_numpy(held.indices)
            owners = np.repeat(np.arange(held.num_clients), held.sizes)
            whole = (x[rows], y[rows], torch.from_numpy(owners))
        size, trainer = self.eval_batch_size, self.trainer
        shares = 1 if trainer is None else trainer.world_size
        rank = 0 if trainer is None else trainer.global_rank
        # Every process has as many batches, though its part of one may be empty.
        batches = [
            tuple(part.tensor_split(shares)[rank] for part in batch)
            for batch in zip(*(tensor.split(size) for tensor in whole), strict=True)
        ]
        return DataLoader(batches, batch_size=None)  # pyright: ignore[reportArgumentType]
