"""Data of the simulated clients: sources, partitions and the Lightning data module."""

from fl_lightning.data.arrays import Arrays, from_arrays
from fl_lightning.data.cifar import cifar10
from fl_lightning.data.hub import from_hugging_face, hugging_face
from fl_lightning.data.idx import fashion_mnist, mnist
from fl_lightning.data.module import FederatedDataModule
from fl_lightning.data.partition import (
    Partition,
    dirichlet_partition,
    iid_partition,
    natural_partition,
    quantity_partition,
    shards_partition,
)
from fl_lightning.data.sources import digits
from fl_lightning.data.tabular import csv
from fl_lightning.data.text import by_author, shakespeare, text_files

__all__ = [
    "Arrays",
    "FederatedDataModule",
    "Partition",
    "by_author",
    "cifar10",
    "csv",
    "digits",
    "dirichlet_partition",
    "fashion_mnist",
    "from_arrays",
    "from_hugging_face",
    "hugging_face",
    "iid_partition",
    "mnist",
    "natural_partition",
    "quantity_partition",
    "shakespeare",
    "shards_partition",
    "text_files",
]
