"""What machine this is: versions, device, tools. `python -m bench.gpu_environment FOLDER`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from bench import machine

QUERY = (
    "name,driver_version,clocks.max.sm,clocks.max.memory,memory.total,power.limit,mig.mode.current"
)
TOOLS = ("compute-sanitizer", "nvidia-smi", "ptxas", "gcc")
PROPERTIES = (
    "name", "major", "minor", "total_memory", "multi_processor_count", "L2_cache_size",
    "max_threads_per_multi_processor", "regs_per_multiprocessor",
    "shared_memory_per_multiprocessor",
)  # fmt: skip


def asked(*command: str) -> str | None:
    """What a program prints; None if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def facts() -> dict:
    """Machine, device and tools."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = machine.record(device)
    found["tools"] = {name: shutil.which(name) for name in TOOLS}
    found["nvidia-smi"] = asked("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader")
    found["cuda"] = torch.version.cuda
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device_properties"] = {n: getattr(properties, n, None) for n in PROPERTIES}
    return found


def main(folder: Path) -> None:
    """Write the facts and print them."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(facts(), indent=1)
    (folder / "environment.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
