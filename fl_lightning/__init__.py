"""Personalised differentially private federated learning on PyTorch Lightning."""

from fl_lightning.data import FederatedDataModule, from_arrays
from fl_lightning.module import FederatedModule
from fl_lightning.privacy.config import PrivacyConfig

__all__ = ["FederatedDataModule", "FederatedModule", "PrivacyConfig", "from_arrays"]
