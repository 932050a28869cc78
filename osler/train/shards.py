"""The shards that a run learns from: prepared in its folder, taken from the run that it branches from, or given by path.

Shards in its folder belong to the run from its first step on. So a run can be resumed when the source files of the shards are
gone, or when a relative path to them is not valid in the current folder.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from osler.checkpoint import store
from osler.config.schema import decode
from osler.data.config import HUB, AnySource, PreparedData, sets_of
from osler.data.exams import EXAMS_FILE, ExamsInData, read_exams_in_data, refuse_unchecked
from osler.data.prepared import Prepared, open_prepared, tokenizer_of_shards
from osler.data.preparer import Preparer
from osler.data.shard_set import NotPreparedYet, ShardSet, identity_of, is_continuation, is_finished, is_partial, num_evicted
from osler.data.shards import DATA_MANIFEST, SPLITS, read_data_manifest
from osler.data.sources import at_known_commits, check_present, check_sources, is_there, prepare_sources
from osler.data.stream import untended, wait_together
from osler.inference.load import TOKENIZER_FILE, load_start, tokenizer_of
from osler.model.config import ModelConfig
from osler.runs.folder import check_fingerprints, claim, differences, read_config, refuse_another
from osler.runs.resume import ASIDE, CONFIG, config_in
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder, fsync_dir, write_atomic
from osler.runtime.world import World
from osler.tokenizer.bpe import Tokenizer
from osler.train.config import TrainConfig
from osler.train.setup import DATA, check_disk_budget, check_prepared

logger = logging.getLogger(__name__)

PARTIAL = ".data.partial"  # in the run folder, while shards are copied from another run
CHECKED_BYTES = 4 * 2**30  # shards that are larger together are not read at a start; reading takes 1 s for about 0.7 GB


def shards_of(config: TrainConfig, run: RunFolder) -> Path:
    """Return the folder of the shards that the run learns from."""
    return Path(config.data.path) if isinstance(config.data, PreparedData) else run.root / DATA


def prepare_run(
    config: TrainConfig, run: RunFolder, tokenizer: Tokenizer, start: store.Loaded | None, model: ModelConfig
) -> tuple[Prepared, Preparer | None]:
    """Write the shards, ``config.yaml`` and the tokenizer into the run folder, where every rank then reads them.

    ``start`` is the checkpoint that the run continues from. With data.streaming another process may still be writing shards. The
    second result is the Preparer of that process, which the caller closes, or None.
    """
    try:
        prepared, preparer = _open(config, run, tokenizer, start)
    except UserError as error:
        moved = refuse_another(run, config)
        if not moved:
            raise
        raise UserError(f"{', '.join(moved.values())}. {error}") from error
    if start is not None and not config.allow_data_change:  # if allowed, a change is recorded when the run resumes
        tend = untended if preparer is None else preparer.tend
        current = wait_together(lambda: fingerprints_of(prepared, tokenizer, start), World(), "The run", tend)
        check_fingerprints(start, current)
    if prepared.reused:
        _check_bytes(prepared, run)
    if config.allow_data_change or not run.config.exists():  # a run that has begun was checked when it began
        check_prepared(config, prepared, model.max_seq_len)
    claim(run, config)
    kept = run.root / TOKENIZER_FILE
    if not kept.exists() or kept.read_bytes() != tokenizer.to_bytes():
        if kept.exists():
            logger.warning(f"{kept} was not the tokenizer that the model is trained with; it is put back.")
        write_atomic(kept, tokenizer.to_bytes())
    return prepared, preparer


def fingerprints_of(prepared: Prepared, tokenizer: Tokenizer, start: store.Loaded | None) -> dict[str, str]:
    """Return what identifies tokenizer and data of a run. Data that have only grown keep the checkpoint's value."""
    data = prepared.fingerprint
    if start is not None and is_continuation(prepared.train, recorded := str(start.state["fingerprints"].get("data"))):
        data = recorded
    return {"tokenizer": tokenizer.fingerprint, "data": data}


def _open(
    config: TrainConfig, run: RunFolder, tokenizer: Tokenizer, start: store.Loaded | None
) -> tuple[Prepared, Preparer | None]:
    folder = shards_of(config, run)
    data = config.text
    if data is None:
        whose = "of the run" if start is not None or config.init_from is None else f"of {config.init_from}"
        return _open_given(config, tokenizer, whose), None
    at_hand = shards_at_hand(config, run, start)
    shutil.rmtree(run.root / PARTIAL, ignore_errors=True)  # a killed process left it; this process has the lock
    if at_hand is not None and at_hand != folder:
        _take_over(at_hand, folder)
    if at_hand is not None and is_finished(folder) and is_source_gone(config, run):
        if gone := sorted(set(_missing(config)) - {HUB}):
            logger.info(f"There is nothing at {', '.join(gone)} from here; going on with what was prepared from it, in {folder}.")
        if not config.allow_data_change:
            check_present(data, config.validation, folder, "allow_data_change=true")
        return open_prepared(folder, tokenizer), None
    consent = None if config.allow_data_change else "allow_data_change=true"
    # Whether training may begin early: the fingerprint of complete data can only be compared with complete data.
    knows_all = start is not None and not is_partial(str(start.state["fingerprints"].get("data")))
    if not data.streaming or knows_all or is_finished(folder):
        return prepare_sources(data, tokenizer, folder, validation=config.validation, consent=consent), None
    check_disk_budget(config)
    pinned, validation = at_known_commits(data, config.validation, folder)  # this process has asked the hub before
    preparer = Preparer(pinned, tokenizer, folder, consent=consent, validation=validation)
    logger.info(f"The data are being prepared while the run trains; what that process says is in {preparer.log}.")
    return open_prepared(folder, tokenizer, growing=True), preparer


def exams_in_data(config: TrainConfig, shards: Path, start: store.Loaded | None) -> Callable[[], Mapping[str, bytes]]:
    """Return a function that gives the file in which a checkpoint says which exam items are in the data that it learned from.

    The model learns from the data of this run, and may have learned from others before. What is known of the others is in the
    same file of ``start``, the checkpoint that the run continues from, or of ``init_from`` if the run begins. The function gives
    no file while the data of this run are being prepared.
    """
    before = None
    if start is not None and (EXAMS_FILE in start.files or config.allow_data_change):
        before = ExamsInData.from_files(start.files)
    elif config.init_from is not None:
        before = ExamsInData()
        with suppress(UserError):  # a resumed run no longer needs the checkpoint of init_from
            before = ExamsInData.from_files(store.load(store.resolve(config.init_from), names=[]).files)

    @functools.lru_cache(1)
    def read(identity: object) -> Mapping[str, bytes]:
        if identity is None:
            return {}
        known = read_exams_in_data(shards)
        return (known if before is None else known.with_data(before)).as_files()

    return lambda: read(identity_of(shards / EXAMS_FILE))


def _check_bytes(prepared: Prepared, run: RunFolder) -> None:
    """Raise UserError when a shard has rotted on the disk; many gigabytes are left to `osler data inspect`."""
    splits, folder = [*prepared.train, *prepared.validation], prepared.folder
    if sum(split.file_bytes for split in splits) > CHECKED_BYTES:
        logger.info(f"The shards in {folder} are too large to be checked at every start; `osler data inspect {folder}` does it.")
        return
    problems = [problem for split in splits for problem in split.verify()]
    if problems:
        own = folder == run.root / DATA
        remedy = f"delete {folder}, and the same command prepares it again" if own else "prepare the shards again"
        raise UserError(f"{' '.join(problems)} Restore it from a copy, or {remedy}.")


def check_data(config: TrainConfig, run: RunFolder, start: store.Loaded | None) -> None:
    """Raise UserError when the run has no data to learn from."""
    if config.text is None:
        if start is None and config.init_from is not None:
            start = load_start(config.init_from)
        folder = shards_of(config, run)
        tokenizer = tokenizer_of_shards(folder, config.tokenizer.path) if start is None else tokenizer_of(start)
        _open_given(config, tokenizer, "of the run" if start is None else f"of {start.path}")
    elif not (is_source_gone(config, run) and shards_at_hand(config, run, start) is not None):
        check_sources(config.text, config.validation)


def _open_given(config: TrainConfig, tokenizer: Tokenizer, whose: str) -> Prepared:
    """Open the shards that a config names; the message of an error says ``whose`` the tokenizer is."""
    assert isinstance(config.data, PreparedData)
    if config.data.no_benchmark_contamination:
        refuse_unchecked(Path(config.data.path))
    return open_prepared(config.data.path, tokenizer, whose)


def is_source_gone(config: TrainConfig, run: RunFolder) -> bool:
    """Return whether sources of the shards are gone. A source that the config of a started run lacks is wrong and not gone."""
    missing = _missing(config)
    if not missing or not run.config.exists():
        return bool(missing)
    stored = decode(TrainConfig, read_config(run), source=str(run.config))
    return {source.place for source in _sources(stored)}.issuperset(missing)


def shards_at_hand(config: TrainConfig, run: RunFolder, start: store.Loaded | None) -> Path | None:
    """Return the folder of the run's shards: in its own folder, or in that of the run that it branches from; None without one."""
    own = shards_of(config, run)
    if start is None:  # config.yaml is written after the shards, or once their preparation runs beside the training
        return own if run.config.exists() and (own / DATA_MANIFEST).is_file() else None
    candidates = [own]
    if not own.exists():
        changed = differences(config, config_in(start), str(start.path / CONFIG))
        if not any(key.startswith(("data.", "validation")) for key in changed):
            parents = [*start.path.absolute().parents]
            candidates.append(parents[1] / DATA)
            if len(parents) > 3 and parents[2].name == ASIDE:  # then the run is further up
                candidates.append(parents[3] / DATA)
    for folder in candidates:
        if (folder / DATA_MANIFEST).is_file() and _is_data_of(folder, start, whole=folder != own):
            return folder
    return None


def _is_data_of(folder: Path, start: store.Loaded, *, whole: bool) -> bool:
    """Return whether a folder holds the shards of a checkpoint's run; if ``whole``, all of them, none deleted."""
    manifest = read_data_manifest(folder)
    of_start = start.state["fingerprints"]
    shards = [ShardSet.open(folder, source, SPLITS[0], growing=True) for source in manifest["sources"]]
    if manifest["tokenizer_fingerprint"] != of_start.get("tokenizer"):
        return False
    if whole and not (is_finished(folder) and not any(num_evicted(part.folder) for part in shards)):
        return False
    try:
        return is_continuation(shards, str(of_start.get("data")))
    except NotPreparedYet:
        return False


def _missing(config: TrainConfig) -> list[str]:
    """Return the paths of sources at which there is nothing."""
    return [source.place for source in _sources(config) if not is_there(source)]


def _sources(config: TrainConfig) -> list[AnySource]:
    """Return the sources that a run learns from and is evaluated on; none if its data were given as shards."""
    sets = sets_of(config.validation, config.text) if config.text else {}
    return [*config.sources.values(), *sets.values()]


def _take_over(shards: Path, folder: Path) -> None:
    """Link another run's shards into this one, or copy them where the disk has no links; nothing ever changes them."""
    partial = folder.with_name(PARTIAL)
    try:
        shutil.copytree(shards, partial, copy_function=_link_or_copy)
        partial.rename(folder)
        fsync_dir(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)
