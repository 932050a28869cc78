"""Files that are either whole or absent: atomic writes, hashes, and the layout of a run folder.

A file is written beside its place under another name, flushed to the disk, and renamed over the old one; a crash at any
moment leaves the old file or the new one. Nothing here knows about tensors.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from osler.errors import UserError
from osler.runtime.faults import fault

logger = logging.getLogger(__name__)

_HASH_BLOCK_BYTES = 1 << 20


def write_atomic(path: str | os.PathLike[str], data: bytes | str | Iterable[bytes]) -> None:
    """Replace ``path`` by ``data`` (text as UTF-8, or pieces in turn) in one step, durable when this returns.

    Raises OSError and leaves the old file as it was when the disk is full or fails. Two writers at once are harmless:
    the last one wins. A kill may leave a hidden ``.<name>.*.tmp`` beside the file.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with open_durable(temporary) as file:
            # A name that is not UTF-8 is written escaped, as JSON would.
            data = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data
            file.writelines([data] if isinstance(data, bytes) else data)
        fault("write-atomic")
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    fsync_dir(path.parent)


def write_or_warn(path: str | os.PathLike[str], data: bytes | str) -> None:
    """``write_atomic`` for a file that a run can do without: a disk that refuses it costs a warning."""
    try:
        write_atomic(path, data)
    except OSError as error:
        logger.warning(f"{path} could not be written: {error.strerror}.")


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes of this machine out of a folder that is written to; UserError when one is in it.

    The lock is the system's and ends with the process, whatever ends it. Where there is none (Windows, some network disks)
    nothing is kept out.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a disk without locks
            while not _locked(descriptor, fcntl.LOCK_EX):
                if is_held(folder):
                    raise UserError(
                        f"Another process is at work on {folder}. Wait until it is done, stop it with Ctrl-C, or name another "
                        "folder with --run."
                    )
                time.sleep(0.01)  # somebody looks whether the folder is held
        yield
    finally:
        os.close(descriptor)


def is_held(folder: Path) -> bool | None:
    """Whether a process is in ``held`` with this folder; None where there are no locks to tell, as on some network disks."""
    try:
        import fcntl
    except ImportError:
        return None
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            return not _locked(descriptor, fcntl.LOCK_SH)  # shared, and for this moment
        finally:
            os.close(descriptor)
    return None


def _locked(descriptor: int, kind: int) -> bool:
    """Take a lock of the system unless another process has one in the way; OSError where there are none."""
    import fcntl

    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def open_durable(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open ``path`` for writing and flush it down to the disk before closing it."""
    with open(path, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def fsync_file(path: str | os.PathLike[str]) -> None:
    """Bring to the disk what this or another handle has written to a file; OSError when there is none, or the disk fails."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def fsync_dir(path: str | os.PathLike[str]) -> None:
    """Make the names inside a folder durable: a rename is safe only once its folder is on the disk."""
    if os.name == "nt":  # Windows cannot open a folder and needs no such flush
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network disks cannot flush a folder
            raise
    finally:
        os.close(descriptor)


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write ``obj`` as indented JSON, atomically."""
    write_atomic(path, indented(obj))


def indented(obj: Any) -> str:
    """JSON for people: indented, with every sign as itself."""
    return json.dumps(obj, indent=2, ensure_ascii=False) + "\n"


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


def no_pause() -> None:
    """What long work on files calls after each block unless it is told to make room for others."""


def sha256_file(path: str | os.PathLike[str], pause: Callable[[], None] = no_pause) -> str:
    """Hex SHA-256 of a file's bytes; ``pause`` is called after each block of them."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
            pause()
    return digest.hexdigest()


def canonical_json(obj: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal objects give equal bytes. Raises ValueError on NaN or infinity."""
    return json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode("utf-8")


def fingerprint(obj: Any) -> str:
    """16 hex digits that name a JSON-able object: the start of the SHA-256 of its canonical JSON."""
    return hashlib.sha256(canonical_json(obj)).hexdigest()[:16]


@dataclass(frozen=True)
class RunFolder:
    """The layout of one run: every file of a run has its name here and is relative, so the folder can be moved."""

    root: Path

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

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object per line and logged step."""
        return self.root / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """The diary: alerts, incidents, rollbacks, one JSON object per line."""
        return self.root / "events.jsonl"

    @property
    def trackers(self) -> Path:
        """What TensorBoard, Weights & Biases and ClearML keep here."""
        return self.root / "trackers"

    @property
    def checkpoints(self) -> Path:
        """The folder of ``step-XXXXXXXXX`` folders."""
        return self.root / "checkpoints"

    @property
    def report(self) -> Path:
        """The self-contained page about the run."""
        return self.root / "report.html"

    @property
    def samples(self) -> Path:
        """What the model wrote along the way, one JSON object per line."""
        return self.root / "samples.jsonl"

    @property
    def stages(self) -> Path:
        """Which stages of a longer story are finished."""
        return self.root / "stages.json"
