"""Saves the checkpoints of a run while it trains. The trainer waits for a copy in memory and not for the disk.

The tensors are copied into buffers that are kept from save to save. One thread then writes, flushes, reads back and rotates;
this takes nearly all of a save's time. Copies from a GPU are only queued: the writer waits for them, and the next step cannot
overtake them, because it is queued after them on the same stream. When the CPU trains, hashing would take cores away from
training, so the writer uses a small share of one core until somebody waits for it. At most one save is in flight, since a second
would need a second set of buffers. The price is host memory for a copy of weights and moments; for a GPU this memory is pinned,
and torch rounds each tensor up to a power of two.

The last save of a process runs in the foreground, because no training is left to overlap with. It writes the tensors themselves
(sharded ones were gathered into the buffers). The bytes on the disk are the same. Call ``wait`` before relying on a checkpoint.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from osler.checkpoint import store
from osler.checkpoint.folders import Damaged, rotate
from osler.runtime.errors import UserError
from osler.runtime.files import fsync_file, no_pause

logger = logging.getLogger(__name__)

CPU_SHARE = 0.03  # share of one core that the writer may use while the CPU trains


class Saver:
    """Owns the checkpoints folder of a run; leaving its context waits for the save in flight.

    ``logs`` are files of the run that a resume needs. Their lines reach the disk before a checkpoint does. After each save
    ``on_damage`` is given the older checkpoints that were found to be damaged, in the thread that called ``save`` or ``wait``.
    """

    def __init__(
        self,
        root: Path,
        *,
        keep_last: int,
        in_background: bool,
        logs: Sequence[Path] = (),
        on_damage: Callable[[Damaged], object] = lambda damaged: None,
    ) -> None:
        self.root = root
        self.logs = logs
        self.keep_last = keep_last
        self.in_background = in_background
        self.on_damage = on_damage
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._writer = ThreadPoolExecutor(max_workers=1)
        self._in_flight: Future[Damaged] | None = None
        self._gpu: torch.device | None = None  # the GPU that tensors came from
        self._hurry = threading.Event()  # set while somebody waits for the writer
        self._given_up = False

    def to_host(self, part: str, name: str, tensor: Tensor) -> Tensor:
        """Copy a tensor into its buffer on the host, without waiting for a GPU, and return the buffer.

        ``part`` names the tensor's file in the checkpoint. ``save`` copies all tensors that are not in their buffers yet. Call
        this between ``wait`` and ``save`` for tensors that were gathered for the checkpoint, to free the device of them.
        """
        buffer = self._buffers.get((part, name))
        if buffer is tensor:
            return buffer
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = self._buffers[part, name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        if tensor.is_cuda:
            self._gpu = tensor.device
        return buffer.copy_(tensor.detach(), non_blocking=True)

    def save(
        self,
        step: int,
        *,
        tensors: Mapping[str, Mapping[str, Tensor]],
        good_step: int | None = None,
        last: bool = False,
        **contents: Any,
    ) -> None:
        """Save a checkpoint; ``contents`` are further arguments of ``store.save``. Then rotate; see ``rotate`` for ``good_step``.

        The tensors may change after this returns, the contents may not. If the disk refuses, this warns; a save in the background
        warns with the next ``wait``. Raises UserError instead when the save is the ``last`` of this process.
        """
        self.wait()
        write = partial(self._write, step, good_step, **contents)
        if last or not self.in_background:
            if self._gpu is not None:
                torch.cuda.current_stream(self._gpu).synchronize()  # waits for the copies that ``to_host`` has queued
            self._finish(partial(write, tensors=tensors), needed=last)
            return
        copies = {part: {name: self.to_host(part, name, own) for name, own in named.items()} for part, named in tensors.items()}
        copied = None if self._gpu is None else torch.cuda.current_stream(self._gpu).record_event()

        def work() -> Damaged:
            if copied is not None:
                copied.synchronize()
            return write(tensors=copies, pause=self._pause(CPU_SHARE if copied is None else 1.0))

        self._hurry.clear()
        self._in_flight = self._writer.submit(work)

    def _write(self, step: int, good_step: int | None, *, pause: Callable[[], None] = no_pause, **contents: Any) -> Damaged:
        for log in self.logs:
            with suppress(OSError):  # the log may not exist, and a disk that fails will refuse the checkpoint too
                fsync_file(log)
        saved = store.save(self.root, step, pause=pause, **contents)
        return rotate(self.root, saved, self.keep_last, good_step, pause=pause)

    @property
    def is_saving(self) -> bool:
        """Whether a save is in flight."""
        return self._in_flight is not None and not self._in_flight.done()

    def hurry(self) -> None:
        """Let the save in flight use a whole core from now on."""
        self._hurry.set()

    def wait(self, *, needed: bool = False) -> None:
        """Wait for the save in flight, if any, and warn when it failed; raises UserError instead when it is ``needed``."""
        in_flight, self._in_flight = self._in_flight, None
        if in_flight is not None:
            self.hurry()
            self._finish(in_flight.result, needed)

    def _finish(self, saving: Callable[[], Damaged], needed: bool) -> None:
        try:
            self.on_damage(saving())
        except store.CheckpointSaveError as error:
            if needed:
                raise UserError(
                    f"{error} Earlier checkpoints are untouched: mend the disk, and the same command goes on from the newest."
                ) from error
            logger.warning(f"{error} The run goes on; earlier checkpoints are untouched.")

    def _pause(self, cpu_share: float) -> Callable[[], None]:
        """Return a function for the writer to call after each block. It sleeps to hold the writer to its share of a core."""
        used = time.thread_time()

        def pause() -> None:
            nonlocal used
            self._hurry.wait((time.thread_time() - used) * (1 / cpu_share - 1))
            if self._given_up:
                raise RuntimeError("the save was given up")
            used = time.thread_time()

        return pause

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Wait for the save in flight, whatever ends the run.

        At a second Ctrl-C the save stops after its current block and leaves a hidden folder, which the next save removes.
        """
        if kind is None or not issubclass(kind, KeyboardInterrupt):
            self.wait()
        else:
            self._given_up = True
            self.hurry()
