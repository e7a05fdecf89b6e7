"""Adapters of a trained network as files of their own, in the format of the package peft."""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

_NAMES = (".lora_A.", ".lora_B.", ".lora_embedding_A.", ".lora_embedding_B.")


def write_adapters(spec: Mapping[str, Any], weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write each adapter of a network to `folder/adapter_NAME`; nothing where there is none.

    `peft.PeftModel.from_pretrained(base, "adapter_NAME")` loads it. The network is made again for
    this, from its class and arguments.

    Args:
        spec: class_path and init_args of the network.
        weights: all of its parameters and buffers by name.
        folder: that exists.

    Guarantees:
        The same bytes for the same arguments.
    """
    if "init_args" not in spec or not any(part in name for name in weights for part in _NAMES):
        return
    network = pkgutil.resolve_name(spec["class_path"])(**spec["init_args"])
    network.load_state_dict(weights)
    for name, adapter in _adapters(network).items():
        own = folder / f"adapter_{name.replace('.', '_') or 'network'}"
        adapter.save_pretrained(str(own))
        (own / "README.md").unlink(missing_ok=True)  # the run has a model card
        config = own / "adapter_config.json"
        known = json.loads(config.read_text(encoding="utf-8"))
        # peft writes sets, in an order that changes from one process to the next.
        ordered = {k: sorted(v) if _is_names(v) else v for k, v in known.items()}
        text = json.dumps(ordered, indent=2, sort_keys=True)
        config.write_text(text + "\n", encoding="utf-8")


def _adapters(network: nn.Module) -> dict[str, Any]:
    return {
        name: module
        for name, module in network.named_modules()
        if hasattr(module, "peft_config") and hasattr(module, "create_or_update_model_card")
    }


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)
