"""Claims a run folder, reads its config, and tells whether a config and a checkpoint belong to the run in it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from osler.checkpoint.folders import FOLDER_NAME, Damaged, newest_good, refuse_checkpoint
from osler.config.recipe import dump_yaml, load_yaml, override
from osler.config.schema import decode, encode
from osler.records.jsonl import EventLog
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder, locked, write_atomic
from osler.runtime.world import World

if TYPE_CHECKING:
    from osler.checkpoint.store import Loaded  # its module loads torch

logger = logging.getLogger(__name__)

T = TypeVar("T")
MOST_NAMED = 5  # how many things, such as differences between two configs, an error names
# These settings may differ from one start to the next, because they change a run's results by rounding at most.
GIVEN_ANEW = (
    "parallel", "loader_workers", "micro_batch_tokens", "recompute", "checkpoint.in_background", "monitor",
    "allow_data_change", "preflight",  # permissions for one start
    "description",  # for the reader
    "data.streaming", "data.disk_budget_gb",  # the batches are the same
    "rollout.urls", "rollout.weights_dir", "rollout.timeout_seconds", "rollout.retry_seconds",  # servers come and go
)  # fmt: skip
# Paths of files may change too. The contents may not: the fingerprints of shards and checkpoints ensure this.
PLACES = re.compile(r"((.*\.)?data(\.sources\[\d+\])?|validation\[\d+\]|teacher)\.(path|root)|tasks\[\d+\]\.task\.path")
WHOLE = ("data.sources", "validation", "tasks")  # lists that an override may give whole
DATA_SECTIONS = ("data", "validation", "tasks")  # a run learns from these and is evaluated on them


@contextmanager
def taken(
    folder: RunFolder,
    world: World = World(),  # noqa: B008 - frozen
    at_end: Callable[[RunFolder], None] = lambda folder: None,
) -> Iterator[None]:
    """Create the folder if it does not exist, and lock it inside the context; all ranks call this, and rank 0 locks.

    Rank 0 calls ``at_end`` with the folder, unless an error ended the work in it. A start that fails leaves no empty folder
    behind. Raises UserError when another process is at work on the folder.
    """
    RunFolder.create(folder.root)
    with locked(folder.root) if world.is_first else nullcontext():
        try:
            yield
        except BaseException:
            with suppress(OSError):  # a folder that holds something is worth keeping
                folder.root.rmdir()
            raise
        if world.is_first:
            at_end(folder)


def claim(folder: RunFolder, config: Any) -> None:
    """Write ``config.yaml``, which makes the folder this run's. A ``config.yaml`` that is there is kept.

    Call this after all checks of what a person may have got wrong, so that a mistake can be corrected in the same folder. A file
    that is kept gets the new paths of files that have moved, and with ``allow_data_change`` the data given now, but no more.
    """
    moved = refuse_another(folder, config)
    wanted = encode(config)
    if not folder.config.exists():
        given_once = {"allow_data_change": False} if "allow_data_change" in wanted else {}  # the permission is for one start
        write_atomic(folder.config, dump_yaml(wanted | given_once))
        return
    if moved:
        logger.info(f"The files that this run learns from have moved: {', '.join(moved.values())}.")
    free = {*_free_sections(config), *(re.split(r"[.\[]", key)[0] for key in moved)} & wanted.keys()
    if free:
        write_atomic(folder.config, dump_yaml(read_config(folder) | {key: wanted[key] for key in free}))


def refuse_another(folder: RunFolder, config: Any) -> dict[str, str]:
    """Raise UserError when the folder holds a run with another config.

    Paths of files may differ, the contents of the files may not. Return the keys of paths that differ, each with a phrase.
    """
    if not folder.config.exists():
        return {}
    stored = read_config(folder)
    changed = differences(config, stored, str(folder.config), leave_out=(*GIVEN_ANEW, *_free_sections(config)))
    moved = {key: words for key, words in changed.items() if PLACES.fullmatch(key)}
    if len(changed) == len(moved):
        return moved
    start = f"osler {stored.get('kind', config.kind)}"
    other = first_of([words for key, words in changed.items() if key not in moved])
    raise UserError(
        f"{folder.root} holds another run: {other}. To go on with that run as it is: `{start} --run {folder.root} "
        f"--resume`. To go on from it with another configuration: `{start} --branch {folder.root} --run NEW_FOLDER key=value`; "
        f"with its weights alone: init_from={folder.root}. For a new run choose another folder with --run, or delete that one."
    )


def _free_sections(config: Any) -> tuple[str, ...]:
    """Return the sections about data if this start may change them."""
    return DATA_SECTIONS if getattr(config, "allow_data_change", False) else ()


def differences(config: Any, stored: Mapping[str, Any], source: str, leave_out: Sequence[str] = GIVEN_ANEW) -> dict[str, str]:
    """Return the differences of a config from a ``stored`` one, read from ``source``: phrases by dotted key, ``kind`` first."""
    wanted, there = encode(config), dict(stored)
    if there.get("kind") == wanted["kind"]:  # a field that the run's Osler did not have yet gets its default
        there = encode(decode(type(config), there, source=source))
    old, new = flat(there), flat(wanted)
    changed = {key for key in {*old, *new} if old.get(key) != new.get(key) and not _is_within(key, leave_out)}

    def shown(value: Any) -> str:
        return "null" if value is None else str(value)

    in_order = sorted(changed, key=lambda key: (key != "kind", key))
    return {key: f"{key} is {shown(new.get(key))} here and {shown(old.get(key))} there" for key in in_order}


def _is_within(key: str, sections: Sequence[str]) -> bool:
    """Return whether a dotted key is one of the sections or inside one."""
    return any(key == section or key.startswith((f"{section}.", f"{section}[")) for section in sections)


def first_of(words: Sequence[str]) -> str:
    """Return the first ``MOST_NAMED`` words in one line, and how many more there are."""
    more = [f"{len(words) - MOST_NAMED} more"] if len(words) > MOST_NAMED else []
    return ", ".join([*words[:MOST_NAMED], *more])


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested config with keys such as ``data.path`` and ``tasks[0].task.path``."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
            out |= flat({f"{key}[{number}]": item for number, item in enumerate(value)}, prefix)
        else:
            out |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out


def stored_config(cls: type[T], run_dir: str | None, overrides: Sequence[str]) -> T:
    """Return the config that a run was started with, for ``--resume``; overrides change only what may differ between starts."""
    if run_dir is None:
        raise UserError("--resume needs --run FOLDER: the run to go on with.")
    refuse_checkpoint(run_dir)
    # A list may be given whole here; ``refuse_another`` checks later what changed in it.
    keys = {given: given.partition("=")[0] for given in overrides}
    may_change = {key for key in keys.values() if key in WHOLE or _is_within(key, GIVEN_ANEW) or PLACES.fullmatch(key)}
    refused = [given for given, key in keys.items() if key not in may_change]
    if refused:
        raise UserError(
            f"--resume continues a run as it was configured; leave out {' '.join(refused)}. A new run that goes on from this one "
            f"may be configured otherwise: --branch {run_dir} --run NEW_FOLDER."
        )
    folder = RunFolder(Path(run_dir))
    if not folder.config.exists():
        raise UserError(f"{run_dir} holds no run to resume: {folder.config} is missing.")
    stored = read_config(folder)
    return decode(cls, override(stored, overrides), source=str(folder.config))


def read_config(folder: RunFolder) -> dict[str, Any]:
    """Return the run's ``config.yaml`` as plain values; raises UserError, with what to do, when it is damaged or no run's."""
    try:
        stored = load_yaml(folder.config.read_text(encoding="utf-8"), str(folder.config))
        problem = "is empty" if stored is None else "is no configuration"
    except (UserError, UnicodeDecodeError) as error:
        stored, problem = None, f"is torn or damaged ({error})"
    if not isinstance(stored, dict):
        good, _ = newest_good(folder.checkpoints)
        remedy = f"Without a checkpoint to take it from, delete {folder.root} to start over"
        if good:
            remedy = f"The run's newest good checkpoint has a copy: `cp {good / folder.config.name} {folder.config}` restores it"
        elif any(folder.root.glob(f"*/{folder.config.name}")):  # a pipeline, whose stages are worth keeping
            remedy = "Its stages have their own: delete this file alone, and `osler pipeline` with the recipe goes on"
        raise UserError(f"{folder.config} {problem}. {remedy}.")
    if made_by := stored.get("made_by"):  # MADE_BY in inference/load.py, which loads torch
        raise UserError(
            f"{folder.root} was made by {made_by} and has weights alone, no training to go on with. Start a new run from them: "
            f"init_from={folder.root} --run NEW_FOLDER."
        )
    return stored


def write_damage(events: EventLog, damaged: Damaged) -> None:
    """Record that checkpoints of a run are no longer as they were saved."""
    for path, problems in damaged:
        match = FOLDER_NAME.fullmatch(path.name)
        message = f"{path.name} is damaged ({'; '.join(problems)}): it does not count among the checkpoints that are kept."
        events.write(int(match[1]) if match else 0, "incident", "damaged-checkpoint", message)


def check_fingerprints(loaded: Loaded, current: Mapping[str, str], *, changes: EventLog | None = None) -> None:
    """Raise UserError for a checkpoint of another tokenizer, teacher or data. With ``changes`` other data are recorded there."""
    for name, value in current.items():
        before = loaded.state["fingerprints"].get(name)
        if before == value:
            continue
        if name == "data" and changes is not None:
            message = f"The data changed: from step {loaded.step} on the run learns from {value}, and before from {before}."
            logger.warning(f"{message} Losses on either side are not comparable (allow_data_change).")
            changes.write(loaded.step, "data-change", name, message, before=before, now=value)
            continue
        remedies = {
            "data": ", allow it with allow_data_change=true,",
            "teacher": ", name the earlier checkpoint (teacher.path=RUN/checkpoints/STEP),",
        }
        raise UserError(
            f"The {name} changed since checkpoint {loaded.path} was written: its fingerprint is {value} and was {before}. "
            f"Restore it{remedies.get(name, '')} or start a new run with --run NEW_FOLDER init_from={loaded.path}."
        )
