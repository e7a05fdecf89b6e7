"""The secret of a run.

The 32-byte key lies in one private file of the run folder and nowhere else: never in a
checkpoint, a log or an artifact.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from aadp_kernels import NoiseKey

KEY_FILE = "secret.key"


def run_key(run_dir: Path, *, seed: int | None, rng: str, resume: bool) -> NoiseKey:
    """Key of noise and coins: from the run's private file, or from a public seed.

    Args:
        run_dir: folder of the run.
        seed: public seed of a simulated run, or None.
        rng: generator, see `aadp_kernels.NoiseKey`.
        resume: whether the file must exist already.

    Raises:
        ValueError: if the file is missing on resume, has the wrong size, or can be read by others.
    """
    if seed is not None:
        return NoiseKey.from_seed(seed, rng=rng)
    path = run_dir / KEY_FILE
    if not path.exists():
        if resume:
            raise ValueError(
                f"{path} is missing: the run cannot go on without its secret, since no other key "
                "gives the noise that was already released"
            )
        # Written whole before it has its name: a crash leaves no half of a key.
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.write(handle, os.urandom(32))
            os.fsync(handle)
        finally:
            os.close(handle)
        try:
            os.link(partial, path)
        except FileExistsError as error:
            raise ValueError(f"{path} was just made by another run in the same folder") from error
        finally:
            partial.unlink()
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ValueError(f"{path} has mode {mode:o}: others can read the secret; chmod 600 it")
    secret = path.read_bytes()
    if len(secret) != 32:
        raise ValueError(f"{path} holds {len(secret)} bytes instead of 32")
    return NoiseKey.from_bytes(secret, rng=rng)


def public_name(key: NoiseKey) -> str:
    """Hex name of a derived key, which tells nothing of the key nor of what it was derived from.

    What a key is bound to includes records; a plain digest of it would let anyone test guesses.
    """
    return "".join(f"{word:08x}" for word in key.derive("public name").words)
