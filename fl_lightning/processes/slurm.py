"""What a run does under SLURM: a folder that a requeued job finds again, and the requeue."""

from __future__ import annotations

import os
import subprocess

_WAIT = 30.0  # seconds for an answer of the scheduler


def job() -> str | None:
    """Number of the job, with that of its task in an array; None outside of SLURM."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID") or None


def in_batch() -> bool:
    """Whether this is part of a job that runs unattended, by `sbatch`."""
    return job() is not None and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def restarted() -> bool:
    """Whether SLURM put this job back into its queue and has started it again."""
    return job() is not None and os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")


def requeue() -> str | None:
    """Put this job back into the queue.

    Returns:
        Why that failed, in words; None: it did not.
    """
    name = job() or ""
    try:
        subprocess.run(
            ["scontrol", "requeue", name], capture_output=True, text=True, timeout=_WAIT, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        said = " ".join((getattr(error, "stderr", None) or str(error)).split())
        return f"job {name} could not be requeued ({said[:200]})"
    return None
