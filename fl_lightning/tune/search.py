"""A search whose choice is charged: candidates one after another, of which the best is shown.

The folder of a search is private, all but its folder `chosen`. What decides a search follows from
its secret: how many candidates there are, and their options. So a search that was stopped goes on
with the same ones, and none is drawn again.

| file | what | who may see it |
|---|---|---|
| secret.key | key of the search | nobody |
| search.jsonl | plan; each candidate, written before it begins; its score | nobody |
| trials/ | a run folder for each candidate | nobody |
| chosen/ | model, ledger, statement and figures of the best one | anybody |
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aadp_kernels import NoiseKey
from fl_lightning.keys import run_key
from fl_lightning.ledger import Ledger, LedgerError, chain
from fl_lightning.ledger.search_checks import SearchLossError
from fl_lightning.ledger.statement import privacy_statement
from fl_lightning.output.checkpoint import CHECKPOINT
from fl_lightning.plots import read_rows
from fl_lightning.tune.plan import SearchPlan

FILE, TRIALS, CHOSEN = "search.jsonl", "trials", "chosen"
_SHRINK, _LEAST = 0.97, 0.2
_SHOWN = ("ledger.jsonl", "ledger.head", "attacks.csv")
_HIDDEN = ("sim_only", "seconds")
Run = Callable[[Mapping[str, Any], Path, dict[str, Any]], None]


@dataclass
class Search:
    """A search in its folder.

    Args:
        plan: what it promises and tries.
        folder: of the search.
        clients: of each candidate's run.
        seed: public seed of a simulated search, which protects nobody; None: a secret.
        run: trains one candidate in a folder, with options and the search's facts; goes on where
            the folder has a checkpoint.

    Raises:
        ValueError: the folder is of another search.
        LedgerError: its file was changed.
    """

    plan: SearchPlan
    folder: Path
    clients: int
    seed: int | None
    run: Run

    def __post_init__(self) -> None:
        path = self.folder / FILE
        self.folder.mkdir(parents=True, exist_ok=True)
        os.chmod(self.folder, 0o700)
        known = path.exists() and path.stat().st_size > 0
        self.key = run_key.run_key(self.folder, seed=self.seed, rng="chacha20", resume=known)
        self.facts = self.plan.facts(self.clients)
        self._descriptor = chain.open_locked(path, os.O_CREAT)
        os.chmod(path, 0o600)
        self._entries, self._hash = self._read(path)
        name = run_key.public_name(self.key.derive("search"))
        fixed = {"fixed": dict(self.plan.fixed)} if self.plan.fixed else {}
        common = {"config": list(self.plan.config), **fixed}
        first = {"kind": "plan", "search": name, **common, **self.facts}
        if not self._entries:
            self._write(first)
        elif _plain(self._entries[0]) != _plain(first):
            self.close()
            raise ValueError(
                f"run_dir={self.folder}: the search there has another plan; what it promises and "
                "tries cannot be changed: choose another folder"
            )

    def _read(self, path: Path) -> tuple[list[dict[str, Any]], str | None]:
        """The lines of the file; what a crash tore is cut off."""
        data = path.read_bytes()
        whole, _, torn = data.rpartition(b"\n")
        if torn:
            os.ftruncate(self._descriptor, len(whole) + 1 if whole else 0)
        found, digest = [], None
        for number, text in enumerate(whole.splitlines(), 1):
            entry = json.loads(text)
            plain = {k: v for k, v in entry.items() if k not in ("prev", "hash")}
            line, digest = chain.seal(plain, digest)
            if line.rstrip(b"\n") != text:
                raise LedgerError(f"{path}: line {number} was changed")
            found.append(plain)
        return found, digest

    def _write(self, entry: dict[str, Any]) -> None:
        """Durable before it returns."""
        line, self._hash = chain.seal(entry, self._hash)
        os.lseek(self._descriptor, 0, os.SEEK_END)
        chain.write_all(self._descriptor, line)
        os.fsync(self._descriptor)
        self._entries.append(json.loads(json.dumps(entry)))

    def close(self) -> None:
        """Give up the lock on the folder."""
        os.close(self._descriptor)

    def number(self) -> int:
        """How many candidates there are: secret, and the same whenever it is asked for."""
        return self.plan.number.draw(_uniform(self.key.derive("number of candidates")))

    def options(self, index: int) -> dict[str, Any]:
        """What a candidate tries."""
        key = self.key.derive("candidate", index)
        generator = np.random.default_rng(int(run_key.public_name(key), 16))
        drawn = self.plan.space.draw(generator)
        if self.seed is not None:  # else all candidates would have the same noise
            drawn["privacy.seed"] = int(run_key.public_name(key.derive("seed"))[:7], 16)
        return drawn

    def score(self, index: int) -> float:
        """The private score of a candidate, which is trained if it was not."""
        done = [e for e in self._entries if e["kind"] == "score" and e["candidate"] == index]
        if done:
            return float(done[0]["score"])
        folder, options = self.folder / TRIALS / f"{index:05d}", self.options(index)
        if not any(e["kind"] == "candidate" and e["candidate"] == index for e in self._entries):
            self._write({"kind": "candidate", "candidate": index, "options": options})
        shrink = 1.0
        while True:
            given = {**self.plan.options(shrink, self.clients), **options}
            try:
                self.run(given, folder, self.facts)
                break
            except SearchLossError:
                shutil.rmtree(folder)  # it has released nothing
                shrink *= _SHRINK
                if shrink < _LEAST:
                    raise
        found = float(read_rows(folder / "private_evaluation.csv")[-1]["accuracy"])
        with Ledger.open(folder) as ledger:
            head = ledger.head_hash
        self._write({"kind": "score", "candidate": index, "score": found, "ledger_head": head})
        return found

    def best(self, told: Callable[[str], None] = print) -> int | None:
        """Train all candidates; the index of the best one, which is secret too; None: none was."""
        scores = []
        for index in range(self.number()):
            scores.append(self.score(index))
            told("a candidate is done")
        return scores.index(max(scores)) if scores else None

    def show(self, index: int) -> Path:
        """Copy what may be seen of the best candidate; the folder of it.

        Args:
            index: of the candidate, whose run has been finished.
        """
        source, target = self.folder / TRIALS / f"{index:05d}", self.folder / CHOSEN
        partial = target.with_name(f"{CHOSEN}.partial")
        for folder in (partial, target):
            shutil.rmtree(folder, ignore_errors=True)
        (partial / CHECKPOINT.parent).mkdir(parents=True)
        shutil.copyfile(source / CHECKPOINT, partial / CHECKPOINT)
        for name in _SHOWN:
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(source / name, partial / name)
        with Ledger.open(source) as ledger:
            text = privacy_statement(ledger)
        (partial / "privacy_statement.md").write_text(text, encoding="utf-8")
        options = json.dumps(self.options(index), indent=1) + "\n"
        (partial / "options.json").write_text(options, encoding="utf-8")
        summary = source / "summary.json"
        if summary.is_file():
            found = json.loads(summary.read_text(encoding="utf-8"))
            kept = {k: v for k, v in found.items() if not k.startswith(_HIDDEN)}
            text = json.dumps(kept, indent=2) + "\n"
            (partial / "summary.json").write_text(text, encoding="utf-8")
        os.replace(partial, target)
        return target


def _uniform(key: NoiseKey) -> float:
    """A number in [0, 1), of 52 bits of a derived key."""
    return int(run_key.public_name(key)[:13], 16) / 2**52


def _plain(entry: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(entry))
