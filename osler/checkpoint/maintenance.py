"""The commands `osler checkpoint`: list the checkpoints of a run, verify them byte for byte, delete old ones. Torch-free."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path

from osler.checkpoint.manifest import FOLDER_NAME, MANIFEST, STATE, looks_whole, verify
from osler.checkpoint.root import Entry, OnDamage, best_checkpoint, by_age, ignore_damage, is_checkpoint, root_of
from osler.checkpoint.rotation import prunable, remove
from osler.runtime.errors import UserError


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


def verify_checkpoints(path: str, on_damage: OnDamage = ignore_damage) -> int:
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
            on_damage(checkpoint, problems)
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
