"""Files that are either whole or absent: atomic writes, hashes, and the layout and the lock of a run folder.

A file is written beside its place, flushed to the disk, and renamed over the old one, so a crash leaves one of them whole.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import json
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from osler.runtime.errors import UserError
from osler.runtime.faults import fault

logger = logging.getLogger(__name__)
fcntl: Any = None if os.name == "nt" else importlib.import_module("fcntl")

DATA_MANIFEST = "manifest.json"  # in a folder of shards; says what they are made of
_HASH_BLOCK_BYTES = 1 << 20


def write_atomic(path: str | os.PathLike[str], data: bytes | str | Iterable[bytes]) -> None:
    """Replace ``path`` by ``data`` (text as UTF-8, or several bytes objects in turn) in one step, durable when this returns.

    Raises OSError and leaves the old file as it was when the disk is full or fails. A kill may leave a hidden ``.<name>.*.tmp``.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with open_durable(temporary) as file:
            # The name of a file in the text may not be UTF-8; it is written escaped, as JSON would.
            data = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data
            file.writelines([data] if isinstance(data, bytes) else data)
        fault("write-atomic")
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    fsync_dir(path.parent)


def new_path(path: str | os.PathLike[str], option: str = "--out") -> Path:
    """Return a path to write at and make the folder above it; for a link, return the path that it points to.

    Raises UserError when a file or a folder that is not empty is there already, or when nothing can be written there.
    """
    path = Path(path)
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path} is there already: name a new one with {option}.")
        path = path.resolve() if path.is_symlink() else path
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): name another place with {option}.") from error
    return path


@contextlib.contextmanager
def appearing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a hidden place beside ``path`` to write a file or folder at, which gets its name when the block ends well.

    After an exception nothing is left; a kill may leave a hidden ``.<name>.*.tmp``. Raises UserError as ``new_path`` does, and
    an OSError that names no file, as of a full disk, names ``path`` from here on.
    """
    path = new_path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        for file in [temporary] if temporary.is_file() else [*temporary.rglob("*")]:
            if file.is_file():
                fsync_file(file)
        if path.is_dir() and temporary.is_file():
            path.rmdir()
        os.replace(temporary, path)
    except BaseException as error:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)
        raise
    fsync_dir(path.parent)


def write_or_warn(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write a file that a run can do without; log a warning when the disk refuses it."""
    try:
        write_atomic(path, data)
    except OSError as error:
        logger.warning(f"{path} could not be written: {error.strerror}.")


@contextlib.contextmanager
def locked(folder: Path, option: str | None = "--run") -> Iterator[None]:
    """Lock a folder that is written to; raises UserError when another process of this machine has locked it.

    The message names the ``option`` that chooses another folder, if there is one.

    The lock is the system's, on the folder itself, so it ends with the process. A lock file would remain when a run is
    killed and keep it from being resumed. Where the system has no such locks (Windows, some network disks) nothing is locked.
    """
    if fcntl is None:
        yield
        return
    with _opened(folder) as descriptor:
        while _try_lock(descriptor, fcntl.LOCK_EX) is False:
            if is_locked(folder):
                raise UserError(
                    f"Another process is at work on {folder}. Wait until it is done, stop it with Ctrl-C, or choose another "
                    f"folder{f' with {option}' if option else ''}."
                )
            time.sleep(0.01)  # another process only asks whether the folder is locked
        yield


def is_locked(folder: Path) -> bool | None:
    """Return whether a process has locked the folder; None where that cannot be found out, as on some network disks."""
    if fcntl is None:
        return None
    with contextlib.suppress(OSError), _opened(folder) as descriptor:
        is_free = _try_lock(descriptor, fcntl.LOCK_SH)  # shared, and only for a moment
        return None if is_free is None else not is_free
    return None


def _try_lock(descriptor: int, kind: int) -> bool | None:
    """Take a lock of the system and return True, or False if another process holds it; None where there are no locks."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextlib.contextmanager
def _opened(folder: str | os.PathLike[str]) -> Iterator[int]:
    """Open a folder; Windows cannot do that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def open_durable(path: str | os.PathLike[str], mode: Literal["wb", "ab"] = "wb") -> Iterator[BinaryIO]:
    """Open ``path`` for writing or appending and flush it down to the disk before closing it."""
    with open(path, mode) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def fsync_file(path: str | os.PathLike[str]) -> None:
    """Flush a file to the disk, whichever handle wrote it; raises OSError when there is no such file, or the disk fails."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def fsync_dir(path: str | os.PathLike[str]) -> None:
    """Make the names inside a folder durable: a rename is safe only once its folder is on the disk."""
    if os.name == "nt":  # Windows needs no such flush
        return
    with _opened(path) as descriptor:
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network disks cannot flush a folder
                raise


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write ``obj`` as indented JSON, atomically."""
    write_atomic(path, indented(obj))


def indented(obj: Any) -> str:
    """Return JSON for people: indented, with every character as itself, and null for a number that is not finite."""
    return json.dumps(plain(obj), indent=2, ensure_ascii=False) + "\n"


def plain(obj: Any) -> Any:
    """Return an object for JSON, which has neither NaN nor infinity: null stands for them."""
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else None
    if isinstance(obj, Mapping):
        return {key: plain(value) for key, value in obj.items()}
    return [plain(value) for value in obj] if isinstance(obj, (list, tuple)) else obj


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file; raises UserError that names the file when it is missing, unreadable or torn."""
    try:
        return json.loads(Path(path).read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise UserError(f"{path} is not valid JSON, it may be torn or damaged: {error}.") from error


def no_pause(num_bytes: int = 0) -> None:
    """Do nothing: the default where a caller may pass a function that lets others work, or makes room for ``num_bytes``."""


def sha256_file(path: str | os.PathLike[str], pause: Callable[[], None] = no_pause) -> str:
    """Return the SHA-256 of a file's bytes in hex, calling ``pause`` after each block."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
            pause()
    return digest.hexdigest()


def canonical_json(obj: Any) -> bytes:
    """Return JSON with sorted keys and no spaces, equal for equal objects. Raises ValueError on NaN and infinity."""
    return json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode("utf-8")


def fingerprint(obj: Any) -> str:
    """Return 16 hex digits that name an object of JSON: the start of the SHA-256 of its canonical form."""
    return hashlib.sha256(canonical_json(obj)).hexdigest()[:16]


class _Entry:
    """A path inside a run folder."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, run: RunFolder, owner: type[RunFolder]) -> Path:
        return run.root / self.name


@dataclass(frozen=True)
class RunFolder:
    """The layout of one run: the files that several modules know. All names are relative, so the folder can be moved."""

    root: Path

    config = _Entry("config.yaml")  # the resolved configuration
    model = _Entry("model.json")  # the config of the model that is trained, as in every checkpoint
    metrics = _Entry("metrics.jsonl")  # a JSON object for each logged step, one per line
    events = _Entry("events.jsonl")  # starts, ends, alerts, incidents and so on, one JSON object per line
    samples = _Entry("samples.jsonl")  # what the model wrote along the way, one JSON object per line
    trackers = _Entry("trackers")  # what TensorBoard, Weights & Biases and ClearML keep
    checkpoints = _Entry("checkpoints")  # folders named step-XXXXXXXXX
    report = _Entry("report.html")  # the self-contained page about the run
    exams = _Entry("exams.json")  # what the run's checkpoints scored
    answers = _Entry("answers")  # the checkpoints' answers, a file for each exam
    evaluations = _Entry("evaluations.json")  # what the run's checkpoints scored on the validation sets
    comparison = _Entry("comparison.json")  # pairs of checkpoints on the same questions
    notes = _Entry("notes.json")  # sentences that a reader of the run should know
    stages = _Entry("stages.json")  # the finished stages of a pipeline

    @classmethod
    def create(cls, path: str | os.PathLike[str]) -> RunFolder:
        """Make the folder, or take the one that is there; raises UserError when that is impossible."""
        root = Path(path)
        try:
            str(root).encode("utf-8")
            root.mkdir(parents=True, exist_ok=True)
        except UnicodeEncodeError:  # a checkpoint there could not be read: safetensors takes no such name
            raise UserError(f"The name of the run folder {str(root)!r} is not UTF-8; choose another with --run.") from None
        except OSError as error:
            raise UserError(f"The run folder {root} cannot be created: {error.strerror}.") from error
        return cls(root)
