"""Data of the simulated clients: sources, partitions and the Lightning data module."""

from .module import FederatedDataModule
from .partition import Partition, dirichlet_partition, iid_partition
from .sources import Arrays, digits, fashion_mnist, from_arrays, mnist

__all__ = [
    "Arrays",
    "FederatedDataModule",
    "Partition",
    "digits",
    "dirichlet_partition",
    "fashion_mnist",
    "from_arrays",
    "iid_partition",
    "mnist",
]
