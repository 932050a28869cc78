"""The commands `osler checkpoint`: list the checkpoints of a run, verify them byte for byte, delete old ones. Torch-free."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from osler.checkpoint.folders import (
    FOLDER_NAME,
    MANIFEST,
    STATE,
    Entry,
    best_checkpoint,
    by_age,
    is_checkpoint,
    looks_whole,
    remove,
    root_of,
    verify,
)
from osler.records.jsonl import EventLog
from osler.runs.folder import write_damage
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder


def list_checkpoints(path: str) -> int:
    """Print the checkpoints of a run, newest first, with what is known without reading their tensors."""
    root, entries = _found(path)
    best = best_checkpoint(root)
    unread = "bytes are not checked here: `osler checkpoint verify` does"
    print(f"{'step':>12}{'tokens':>18}{'size':>12}   {'saved':<18}remarks ({unread})")
    for number, entry in enumerate(entries):
        remarks = ["newest"] if number == 0 else []
        if best is not None and best.path == entry.path:
            remarks.append(f"best ({best.metric} {best.value:.4g})" if best.value is not None else "best")
        remarks += ["milestone"] if entry.milestone else []
        remarks += [] if looks_whole(entry.path) else ["DAMAGED"]
        size, saved_at = _size_and_time(entry.path)
        saved = "?" if saved_at is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(saved_at))
        print(f"{entry.step:>12,}{_tokens(entry):>18}{size / 1e6:>9,.1f} MB   {saved:<18}{', '.join(remarks)}")
    return 0


def verify_checkpoints(path: str) -> int:
    """Hash every file of a checkpoint, or of all checkpoints of a run; return 1 when one is damaged."""
    folder = Path(path)
    damaged = 0
    for checkpoint in [folder] if folder.is_dir() and is_checkpoint(folder) else [entry.path for entry in _found(path)[1]]:
        problems = verify(checkpoint)
        if problems and not checkpoint.is_dir():
            print(f"{checkpoint.name}: deleted in the meantime, by the run or by hand")
            continue
        damaged += bool(problems)
        print(f"{checkpoint.name}: {'DAMAGED' if problems else 'every file is as it was saved'}")
        print("".join(f"  {problem}\n" for problem in problems), end="")
        if problems:
            with suppress(OSError):  # so that the run that saved it, and verified it then, reads it again
                os.utime(checkpoint)
            record_damage(checkpoint, problems)
    return 1 if damaged else 0


def prune_checkpoints(path: str, *, keep_last: int, keep_best: bool, keep_milestones: bool, dry_run: bool) -> int:
    """Delete all but the last checkpoints that verify, and print what that frees."""
    if keep_last < 1:
        raise UserError(f"--keep-last {keep_last}: at least one checkpoint stays.")
    root, _ = _found(path)
    freed = 0
    for checkpoint, reason in reversed(prunable(root, keep_last, keep_best=keep_best, keep_milestones=keep_milestones)):
        size, _ = _size_and_time(checkpoint)
        freed += size
        line = f"{checkpoint.name}{size / 1e6:>9,.1f} MB   {'would be deleted' if dry_run else 'deleted'}: {reason}"
        if not dry_run:
            try:
                remove(checkpoint)
            except OSError as error:
                raise UserError(f"{checkpoint} cannot be deleted: {error.strerror}.") from error
        print(line)
    print(f"{freed / 1e6:,.1f} MB {'would be' if dry_run else 'are'} free.")
    return 0


def _found(path: str) -> tuple[Path, list[Entry]]:
    """Return the checkpoints folder of a run and the checkpoints in it; raises UserError when there is none."""
    if FOLDER_NAME.fullmatch(Path(path).name):
        raise UserError(f"{path} is one checkpoint: give the run folder that it lies in.")
    root = root_of(path)
    entries = by_age(root)
    if not entries:
        raise UserError(f"There is no checkpoint in {root}.")
    return root, entries


def _tokens(entry: Entry) -> str:
    """Return the tokens seen at a checkpoint, ? when its state cannot be read or does not say."""
    with suppress(OSError, ValueError, AttributeError):
        tokens = json.loads((entry.path / STATE).read_bytes()).get("tokens")
        return f"{tokens:,}" if isinstance(tokens, int) else "?"
    return "?"


def _size_and_time(folder: Path) -> tuple[int, float | None]:
    """Return the bytes of a checkpoint and when it was written; 0 and None when a run has deleted it in the meantime."""
    with suppress(FileNotFoundError):
        files = {file.name: file.stat() for file in folder.iterdir() if file.is_file()}
        written = files[MANIFEST] if MANIFEST in files else folder.stat()
        return sum(stat.st_size for stat in files.values()), written.st_mtime
    return 0, None


def prunable(root: Path, keep_last: int, *, keep_best: bool, keep_milestones: bool) -> list[tuple[Path, str]]:
    """Return what may be deleted, and why, when only the last ``keep_last`` that verify are to stay; newest first.

    Raises UserError when none verifies: then nothing may go, because a person may still mend one of them.
    """
    marked = best_checkpoint(root)
    going, good = [], 0
    for entry in by_age(root):
        is_best = marked is not None and marked.path == entry.path
        if (is_old := good >= keep_last) or verify(entry.path):
            if not (entry.path.is_symlink() or (keep_milestones and entry.milestone) or (keep_best and is_best)):
                reasons = [f"older than the last {keep_last}" if is_old else "damaged"]
                reasons += ["the best, which --keep-best keeps"] if is_best else []
                reasons += ["a milestone, which --keep-milestones keeps"] if entry.milestone else []
                going.append((entry.path, "; ".join(reasons)))
        else:
            good += 1
    if not good:
        raise UserError(f"No checkpoint in {root} is good, so none is deleted; `osler checkpoint verify` names what is damaged.")
    return going


def record_damage(checkpoint: Path, problems: Sequence[str]) -> None:
    """Append that a checkpoint is damaged to the events of the run that it lies in, if it lies in one."""
    root = checkpoint.absolute().parent
    run = RunFolder(root.parent)
    if root == run.checkpoints and run.config.is_file():
        write_damage(EventLog(run.events), checkpoint, problems)
