"""Personalised differentially private federated learning on PyTorch Lightning."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fl_lightning.processes import departure as _departure  # noqa: F401 - called last at exit
from fl_lightning.requirements import ESSENTIAL, check_packages, check_system

if TYPE_CHECKING:
    from fl_lightning.data import FederatedDataModule, from_arrays
    from fl_lightning.local.personal import fit_personal_layers
    from fl_lightning.module import FederatedModule
    from fl_lightning.privacy.config import PrivacyConfig
    from fl_lightning.processes.strategy import ClientParallelStrategy

__version__ = "0.1.0"  # that of aadp_kernels, which pyproject.toml takes

check_system()
check_packages(ESSENTIAL)

__all__ = [
    "ClientParallelStrategy",
    "FederatedDataModule",
    "FederatedModule",
    "PrivacyConfig",
    "fit_personal_layers",
    "from_arrays",
]
_HOMES = {
    "ClientParallelStrategy": "fl_lightning.processes.strategy",
    "FederatedDataModule": "fl_lightning.data",
    "FederatedModule": "fl_lightning.module",
    "PrivacyConfig": "fl_lightning.privacy.config",
    "fit_personal_layers": "fl_lightning.local.personal",
    "from_arrays": "fl_lightning.data",
}


def __getattr__(name: str) -> Any:
    """Public names on first use, so that reading a ledger does not import Lightning."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
