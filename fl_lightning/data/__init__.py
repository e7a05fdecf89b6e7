"""Data of the simulated clients: sources, partitions and the Lightning data module."""

from .arrays import Arrays, from_arrays
from .cifar import cifar10
from .hub import from_hugging_face, hugging_face
from .idx import fashion_mnist, mnist
from .module import FederatedDataModule
from .partition import (
    Partition,
    dirichlet_partition,
    iid_partition,
    natural_partition,
    quantity_partition,
    shards_partition,
)
from .sources import digits
from .tabular import csv
from .text import by_author, shakespeare, text_files

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
