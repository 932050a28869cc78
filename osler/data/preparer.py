"""The process that prepares the data of a run while the run trains on what is prepared already.

It does the same preparation as `osler data prepare`: it writes the same bytes, resumes after a kill, and reads nothing again when
everything is there. It ignores Ctrl-C. It ends when its standard input closes, which happens when its parent ends for any
reason. Its output goes to a log beside the folder; when it fails, the error quotes the last line of this log.

With a disk budget it pauses while the folder has no room for another shard. The file `paused` in the folder asks the run to
delete first the shards that the run has finished with and then this file (`stream.py`).
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from osler.data.config import AnySource, TextData
from osler.data.shard_set import identity_of, is_finished
from osler.data.shards import DATA_MANIFEST
from osler.data.sources import prepare_sources
from osler.runtime.child import end_with_parent, start
from osler.runtime.errors import UserError
from osler.runtime.log import complain, flush_or_silence, log_to_terminal
from osler.tokenizer.bpe import Tokenizer

PAUSED = "paused"
POLL_SECONDS = 0.05
END_SECONDS = 10.0  # how long the process may take to end by itself
GIGABYTE = 10**9
BLOCK_BYTES = 4096  # size of a block of a disk
SHARDS_SHARE = 15 / 16  # the share of a budget; the rest is for indices, journals and the files that describe the data


class Preparer:
    """The process that prepares data into a folder; raises UserError when it cannot begin."""

    def __init__(
        self, data: TextData, tokenizer: Tokenizer, folder: Path, *, consent: str | None, validation: Sequence[AnySource]
    ) -> None:
        self.folder = folder
        self.log = folder.with_name(f"{folder.name}.log")
        before = identity_of(folder / DATA_MANIFEST)
        (folder / PAUSED).unlink(missing_ok=True)  # left by a process that ended while it waited; this one may have more room
        with open(self.log, "wb") as log:
            self.process = start("osler.data.preparer", stdout=log, stderr=log)
        assert self.process.stdin is not None
        self.pipe = self.process.stdin
        try:
            self.pipe.write(pickle.dumps((data, validation, tokenizer.to_bytes(), folder, consent)))
            self.pipe.flush()
            # The process writes a new manifest as soon as it knows that the folder is empty or holds a part of these data.
            while identity_of(folder / DATA_MANIFEST) in (None, before) and self.process.poll() is None:
                time.sleep(POLL_SECONDS)
            self.tend(0.0)
        except BaseException as error:
            self.close()
            if isinstance(error, BrokenPipeError):
                self.tend(0.0)
            raise

    def tend(self, waited: float) -> None:
        """Raise UserError when the process ended before everything was prepared; `stream.wait_together` takes it as `tend`."""
        code = self.process.poll()
        if code is None or (code == 0 and is_finished(self.folder)):
            return
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        said = next((line.removeprefix("osler: ") for line in reversed(lines) if line.strip()), "")
        if code == 2:
            raise UserError(said)
        how = "was killed" if code < 0 else f"ended with exit code {code}"
        last = f' Its last line in {self.log} is "{said}".' if said else ""
        raise UserError(f"The process that prepares {self.folder} {how}.{last} The same command continues from what is written.")

    def close(self) -> None:
        """End the process; the next one continues where this one stopped."""
        try:
            self.pipe.close()
            self.process.wait(END_SECONDS)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self.process.kill()
            self.process.wait()


def disk_bytes(folder: Path) -> int:
    """Return what a folder takes on the disk, as `du` counts it: whole blocks, folders included."""
    size = 0
    for place, _, names in os.walk(folder):
        for path in (place, *(os.path.join(place, name) for name in names)):
            with contextlib.suppress(FileNotFoundError):  # it has just been deleted
                status = os.lstat(path)
                size += 512 * status.st_blocks if hasattr(status, "st_blocks") else status.st_size
    return size


def wait_for_room(folder: Path, budget_bytes: float, num_bytes: int) -> None:
    """Wait until a folder has room in the budget for a shard of `num_bytes`; meanwhile the file `PAUSED` asks for room."""
    while disk_bytes(folder) + num_bytes + BLOCK_BYTES > SHARDS_SHARE * budget_bytes:
        (folder / PAUSED).touch()
        while (folder / PAUSED).exists():
            time.sleep(POLL_SECONDS)
    (folder / PAUSED).unlink(missing_ok=True)


def serve() -> int:
    """Prepare the data that standard input describes, and end when it closes; return the exit code, 2 for a user's error."""
    data, validation, tokenizer_bytes, folder, consent = pickle.load(sys.stdin.buffer)
    end_with_parent()
    log_to_terminal()
    options: dict[str, Any] = {"validation": validation, "consent": consent}
    if data.disk_budget_gb is not None:
        options["before_shard"] = functools.partial(wait_for_room, folder, data.disk_budget_gb * GIGABYTE)
    try:
        prepare_sources(data, Tokenizer.from_bytes(tokenizer_bytes), folder, **options)
    except UserError as error:
        complain(f"osler: {error}")
        return 2
    return 0


if __name__ == "__main__":
    code = 1
    try:
        code = serve()
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        flush_or_silence()
        os._exit(code)  # threads of libraries can abort a process whose interpreter shuts down
