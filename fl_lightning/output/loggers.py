"""Loggers of the command line; the only file that knows how W&B is reached."""

from __future__ import annotations

import netrc
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.utilities import rank_zero_only

_ID = "wandb_id"
_RECORDS = ("ledger.jsonl", "ledger.head", "privacy_statement.md", "summary.json")


class LateWandbLogger(WandbLogger):
    """W&B hears of a run with its first figures, and never of one that was refused."""

    kept_id: tuple[Path, str] | None = None
    _begun = False

    @rank_zero_only
    def begin(self) -> None:
        """Keep W&B's id in the run folder; from here on the logger is W&B's."""
        if self.kept_id is not None and not self._begun:
            path, own = self.kept_id
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(own, encoding="utf-8")
        self._begun = True

    @property
    def experiment(self) -> Any:
        """W&B's run, and nothing before the run begins."""
        return super().experiment if self._begun else DummyLogger().experiment

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Begin where that has not been done."""
        self.begin()
        super().log_metrics(metrics, step)


def default_logger(
    run_path: Path, name: str | None = None, project: str | None = None
) -> LateWandbLogger | None:
    """W&B logger: online where a key is configured, else offline; None under WANDB_MODE=disabled.

    Args:
        run_path: folder of the run; W&B's id is kept there, so that a resumed run goes on with it.
        name: shown name of the run.
        project: W&B's; None: as the environment says, or "aadp-fl".
    """
    mode = os.environ.get("WANDB_MODE", "")
    if mode == "disabled":
        return None
    import wandb

    kept = run_path / _ID
    own = kept.read_text(encoding="utf-8").strip() if kept.exists() else secrets.token_hex(4)
    # Said by argument too: W&B reads the environment once a process.
    mode = mode or ("" if _has_wandb_key() else "offline")
    options: dict[str, Any] = {"mode": mode} if mode else {}
    logger = LateWandbLogger(
        name=name,
        save_dir=run_path,
        project=project or os.environ.get("WANDB_PROJECT", "aadp-fl"),
        id=os.environ.get("WANDB_RUN_ID") or own,
        log_model=False,
        resume="allow",
        settings=wandb.Settings(silent=True, console="off"),
        **options,
    )
    logger.kept_id = kept, own
    # Lightning always passes this option, and W&B warns about it.
    logger._wandb_init.pop("anonymous", None)
    return logger


def tensorboard_logger(run_path: Path) -> TensorBoardLogger:
    """TensorBoard's logger, in the run folder.

    Raises:
        ValueError: the package is missing.
    """
    try:
        return TensorBoardLogger(save_dir=run_path, name="tensorboard", version="")
    except ModuleNotFoundError as error:
        raise ValueError(
            "tensorboard=true needs a package that is not there: pip install 'aadp-fl[tensorboard]'"
        ) from error


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    home = Path.home()
    for path in (os.environ.get("NETRC"), home / ".netrc", home / "_netrc"):
        try:
            if path and netrc.netrc(os.fspath(path)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def hand_over(
    logger: Logger, path: Path, summary: dict[str, Any], pictures: Sequence[Path]
) -> str | None:
    """Give W&B the summary, pictures and named files of a run, and close its run there.

    Returns:
        Where W&B has the run now, in words; None where the logger is another.
    """
    import wandb

    if not isinstance(logger, WandbLogger):
        return None
    if isinstance(logger, LateWandbLogger):
        logger.begin()
    run = logger.experiment
    run.summary.update(summary)
    for picture in pictures:
        logger.log_image(f"plots/{picture.stem}", [str(picture)])
    groups = {
        "run": [path / name for name in _RECORDS] + sorted(path.glob("config*.yaml")) + [*pictures],
        "model": [path / "checkpoints" / "last.ckpt"],
    }
    for kind, files in groups.items():
        present = [file for file in files if file.is_file()]
        if present:
            artifact = wandb.Artifact(f"{kind}-{run.id}", type=kind)
            for file in present:
                artifact.add_file(str(file), name=file.relative_to(path).as_posix())
            run.log_artifact(artifact)
    told = _where(run)
    # Without this, the next run in this process would go on writing into this one.
    run.finish()
    return told


def _where(run: Any) -> str:
    """Whether W&B has a run or only its files, and how it gets them."""
    if getattr(run, "offline", False):
        folder = Path(run.dir).parent
        return f"W&B: offline; its files are in {folder}; `wandb sync {folder}` sends them"
    return f"W&B: online at {run.url}" if getattr(run, "url", None) else "W&B: disabled"
