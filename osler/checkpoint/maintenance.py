"""What `osler checkpoint` does: list the checkpoints of a run, verify them byte for byte, delete those that are not wanted.

Only ``prune`` changes anything, and what it deletes goes by the rules of ``root.prunable``: the last good one never. Torch-free.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path

from osler.checkpoint.manifest import FOLDER_NAME, MANIFEST, STATE, looks_whole, verify
from osler.checkpoint.root import (
    Entry,
    OnDamage,
    best_checkpoint,
    by_age,
    ignore_damage,
    prunable,
    remove,
    root_of,
)
from osler.errors import UserError


def list_checkpoints(path: str) -> int:
    """Print the checkpoints of a run, newest first, with what can be told without reading their tensors."""
    root, entries = found(path)
    best = best_checkpoint(root)
    unread = "bytes are not checked here: `osler checkpoint verify` does"
    print(f"{'step':>12}{'tokens':>18}{'size':>12}   {'saved':<18}remarks ({unread})")
    for number, entry in enumerate(entries):
        remarks = ["newest"] if number == 0 else []
        if best is not None and best.path == entry.path:
            remarks.append(f"best ({best.metric} {best.value:.4g})" if best.value is not None else "best")
        remarks += ["milestone"] if entry.milestone else []
        remarks += [] if looks_whole(entry.path) else ["DAMAGED"]
        tokens = tokens_of(entry)
        shown = "?" if tokens is None else f"{tokens:,}"
        print(f"{entry.step:>12,}{shown:>18}{megabytes(entry.path):>12}   {saved_at(entry.path):<18}{', '.join(remarks)}")
    return 0


def verify_checkpoints(path: str, on_damage: OnDamage = ignore_damage) -> int:
    """Hash every file of a checkpoint, or of all checkpoints of a run, and tell ``on_damage``; 1 when one is damaged."""
    folder = Path(path)
    one = folder.is_dir() and ((folder / MANIFEST).exists() or FOLDER_NAME.fullmatch(folder.name) is not None)
    damaged = 0
    for checkpoint in [folder] if one else [entry.path for entry in found(path)[1]]:
        problems = verify(checkpoint)
        if problems and not checkpoint.is_dir():
            print(f"{checkpoint.name}: deleted meanwhile, by the run or by hand")
            continue
        damaged += bool(problems)
        print(f"{checkpoint.name}: {'DAMAGED' if problems else 'every file is as it was saved'}")
        print("".join(f"  {problem}\n" for problem in problems), end="")
        if problems:
            with suppress(OSError):  # whoever has read it before, as the run that saved it, reads it again before it counts on it
                os.utime(checkpoint)
            on_damage(checkpoint, problems)
    return 1 if damaged else 0


def prune_checkpoints(path: str, *, keep_last: int, keep_best: bool, keep_milestones: bool, dry_run: bool) -> int:
    """Delete all but the last checkpoints that verify, and say what that frees."""
    if keep_last < 1:
        raise UserError(f"--keep-last {keep_last}: at least one checkpoint stays.")
    root, _ = found(path)
    freed = 0
    for checkpoint, reason in reversed(prunable(root, keep_last, keep_best=keep_best, keep_milestones=keep_milestones)):
        freed += size_of(checkpoint)
        line = f"{checkpoint.name}{megabytes(checkpoint):>12}   {'would be deleted' if dry_run else 'deleted'}: {reason}"
        if not dry_run:
            try:
                remove(checkpoint)
            except OSError as error:
                raise UserError(f"{checkpoint} cannot be deleted: {error.strerror}.") from error
        print(line)
    print(f"{freed / 1e6:,.1f} MB {'would be' if dry_run else 'are'} free.")
    return 0


def found(path: str) -> tuple[Path, list[Entry]]:
    """The checkpoints folder of a run and what lies in it; raises UserError when there is none."""
    if FOLDER_NAME.fullmatch(Path(path).name):
        raise UserError(f"{path} is one checkpoint: give the run folder that it lies in.")
    root = root_of(path)
    entries = by_age(root)
    if not entries:
        raise UserError(f"There is no checkpoint in {root}.")
    return root, entries


def tokens_of(entry: Entry) -> int | None:
    """The tokens that had been seen, when the state says so and can be read."""
    with suppress(OSError, ValueError, AttributeError):
        tokens = json.loads((entry.path / STATE).read_bytes()).get("tokens")
        return tokens if isinstance(tokens, int) else None
    return None


def size_of(folder: Path) -> int:
    """Bytes of the files in a checkpoint; 0 when a run has deleted it meanwhile."""
    with suppress(FileNotFoundError):
        return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    return 0


def megabytes(folder: Path) -> str:
    """The size of a checkpoint for a person."""
    return f"{size_of(folder) / 1e6:,.1f} MB"


def saved_at(folder: Path) -> str:
    """When a checkpoint was written, in local time; ? when a run has deleted it meanwhile."""
    manifest = folder / MANIFEST
    with suppress(FileNotFoundError):
        written = (manifest if manifest.exists() else folder).stat().st_mtime
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(written))
    return "?"
