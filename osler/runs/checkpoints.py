"""The commands `osler checkpoint`: list the checkpoints of a run, verify them byte for byte. Torch-free."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path

from osler.checkpoint import folders
from osler.checkpoint.folders import Entry
from osler.records.jsonl import EventLog
from osler.runs.folder import write_damage
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder


def list_checkpoints(path: str) -> int:
    """Print the checkpoints of a run, newest first, without reading their tensors."""
    root, entries = _found(path)
    best = folders.best_checkpoint(root)
    unread = "bytes are not checked here: `osler checkpoint verify` does"
    print(f"{'step':>12}{'tokens':>18}{'size':>12}   {'saved':<18}remarks ({unread})")
    for number, entry in enumerate(entries):
        remarks = ["newest"] if number == 0 else []
        if best is not None and best.path == entry.path:
            remarks.append(f"best ({best.metric} {best.value:.4g})" if best.value is not None else "best")
        remarks += ["milestone"] if entry.milestone else []
        remarks += [] if folders.looks_whole(entry.path) else ["DAMAGED"]
        tokens = "?"
        with suppress(OSError, ValueError, KeyError, TypeError):
            tokens = f"{json.loads((entry.path / folders.STATE).read_bytes())['tokens']:,}"
        with suppress(FileNotFoundError):  # a run has deleted it in the meantime
            saved = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.path.stat().st_mtime))
            megabytes = sum(file.stat().st_size for file in entry.path.iterdir()) / 1e6
            print(f"{entry.step:>12,}{tokens:>18}{megabytes:>9,.1f} MB   {saved:<18}{', '.join(remarks)}")
    return 0


def verify_checkpoints(path: str) -> int:
    """Hash every file of a checkpoint, or of all checkpoints of a run; return 1 when one is damaged, and record that."""
    folder = Path(path)
    damaged = 0
    is_one = folder.is_dir() and folders.is_checkpoint(folder)
    for checkpoint in [folder] if is_one else [entry.path for entry in _found(path)[1]]:
        problems = folders.verify(checkpoint)
        if problems and not checkpoint.is_dir():
            print(f"{checkpoint.name}: deleted in the meantime, by the run or by hand")
            continue
        damaged += bool(problems)
        print(f"{checkpoint.name}: {'DAMAGED' if problems else 'every file is as it was saved'}")
        print("".join(f"  {problem}\n" for problem in problems), end="")
        run = RunFolder(checkpoint.absolute().parent.parent)
        if problems:
            with suppress(OSError):  # with a new time the run reads the folder again, if it has verified it before
                os.utime(checkpoint)
            if checkpoint.absolute().parent == run.checkpoints and run.config.is_file():
                write_damage(EventLog(run.events), [(checkpoint, problems)])
    return 1 if damaged else 0


def _found(path: str) -> tuple[Path, list[Entry]]:
    """Return the checkpoints folder of a run and the checkpoints in it, newest first; raises UserError when there are none."""
    if folders.FOLDER_NAME.fullmatch(Path(path).name):
        raise UserError(f"{path} is one checkpoint: give the run folder that it is in.")
    root = folders.root_of(path)
    entries = folders.by_age(root)
    if not entries:
        raise UserError(f"There is no checkpoint in {root.resolve()}.")
    return root, entries
