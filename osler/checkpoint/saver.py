"""Saves the checkpoints of a run while the run goes on: the trainer waits for a copy in memory and not for the disk.

The idea: a copy of the tensors is taken into buffers that are kept from save to save, and one thread then writes, flushes,
reads back and rotates (``store.save``), which is nearly all of a save's time. From a GPU the copies are only queued: the writer
waits for them, and the next step cannot overtake them, because it is queued behind them on the same stream. Where the CPU
trains, hashing would take cores away from it, so the writer uses a small share of one until somebody waits for it. One save is in
flight at most, since a second would need a second set of buffers: the next one waits for it.

The price is memory on the host for a copy of weights and moments, from the first such save on (pinned beside a GPU, where torch
rounds each tensor up to a power of two). What reaches the disk is the same to the byte as without the thread.

The last save of a process is made in the foreground, from the tensors themselves (those that were cut over ranks take the same
buffers): nothing is left to overlap with. Whoever promises that something is on the disk calls ``wait`` before.
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
from osler.checkpoint.root import OnDamage, Skipped, ignore_damage
from osler.errors import UserError
from osler.runtime.files import fsync_file

logger = logging.getLogger(__name__)

CPU_SHARE = 0.03  # of one core, for the writer beside a CPU that trains


class Saver:
    """Owns the checkpoints folder of a run; a context that ends only when the save in flight has.

    ``logs`` are files of the run that a resume counts on: what they hold by then is on the disk before a checkpoint is.
    ``on_damage`` is told, by the thread that saves and waits, of older checkpoints that the writer found to be damaged.
    """

    def __init__(
        self,
        root: Path,
        *,
        keep_last: int,
        in_background: bool,
        logs: Sequence[Path] = (),
        on_damage: OnDamage = ignore_damage,
    ) -> None:
        self.root = root
        self.logs = logs
        self.keep_last = keep_last
        self.in_background = in_background
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._writer = ThreadPoolExecutor(max_workers=1)
        self._in_flight: Future[None] | None = None
        self._gpu: torch.device | None = None  # that tensors came from
        self._hurry = threading.Event()  # set while somebody waits for the writer
        self._given_up = False
        self._on_damage = on_damage
        self._damaged: Skipped = []  # found by the writer and not told yet

    def to_host(self, part: str, name: str, tensor: Tensor) -> Tensor:
        """Copy a tensor into the buffer of its names, from a GPU without waiting for it; one that lies there already is left.

        ``save`` does this with all tensors. Called before it, between ``wait`` and ``save``, it frees a device from tensors that
        were put together for the checkpoint only.
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
        state: Mapping[str, Any],
        files: Mapping[str, bytes],
        milestone: bool = False,
        good_step: int | None = None,
        last: bool = False,
    ) -> None:
        """Save a checkpoint as ``store.save`` does; the tensors may change when this returns, ``state`` and ``files`` may not.

        A disk that refuses is warned about, in the background with the next ``wait``. Raises UserError instead when the save is
        the ``last`` of this process, because what it would hold is lost.
        """
        self.wait()
        write = partial(
            self._write,
            step,
            state=state,
            files=files,
            keep_last=self.keep_last,
            milestone=milestone,
            good_step=good_step,
        )
        if last or not self.in_background:
            if self._gpu is not None:
                torch.cuda.current_stream(self._gpu).synchronize()  # what ``hold`` has queued
            self._finish(partial(write, tensors=tensors), needed=last)
            return
        held = {part: {name: self.to_host(part, name, own) for name, own in named.items()} for part, named in tensors.items()}
        copied = None if self._gpu is None else torch.cuda.current_stream(self._gpu).record_event()

        def work() -> None:
            if copied is not None:
                copied.synchronize()
            write(tensors=held, pause=self._pause(1.0 if copied is not None else CPU_SHARE))

        self._hurry.clear()
        self._in_flight = self._writer.submit(work)

    def _write(self, step: int, **contents: Any) -> None:
        for log in self.logs:
            with suppress(OSError):  # it is not there, or the disk refuses it, which the checkpoint will tell
                fsync_file(log)
        store.save(self.root, step, **contents, on_damage=lambda *found: self._damaged.append(found))

    @property
    def is_saving(self) -> bool:
        """Whether a save is in flight."""
        return self._in_flight is not None and not self._in_flight.done()

    def hurry(self) -> None:
        """Let the save in flight use the CPU as it likes from now on."""
        self._hurry.set()

    def wait(self, *, needed: bool = False) -> None:
        """Wait for the save in flight, if there is one, and warn when it failed; UserError instead when it is ``needed``."""
        in_flight, self._in_flight = self._in_flight, None
        if in_flight is not None:
            self.hurry()
            self._finish(in_flight.result, needed)

    def _finish(self, saving: Callable[[], object], needed: bool) -> None:
        try:
            saving()
        except store.CheckpointSaveError as error:
            if needed:
                raise UserError(
                    f"{error} Earlier checkpoints are untouched: mend the disk, and the same command goes on from the newest."
                ) from error
            logger.warning(f"{error} The run goes on; earlier checkpoints are untouched.")
        finally:
            while self._damaged:
                self._on_damage(*self._damaged.pop(0))

    def _pause(self, cpu_share: float) -> Callable[[], None]:
        """What the writer calls after each block of its work: it sleeps for as long as its share of a core demands."""
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
        """Let the save in flight end whatever ends the run, an evaluation that crashed say.

        At a second Ctrl-C it stops after its block and leaves a hidden folder, which the next save removes.
        """
        if kind is None or not issubclass(kind, KeyboardInterrupt):
            self.wait()
        else:
            self._given_up = True
            self.hurry()
