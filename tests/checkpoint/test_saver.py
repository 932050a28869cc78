"""Saving in the background: what was copied is what is written, the run never waits in vain, and failures are told."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading

import pytest
import torch

from osler.checkpoint import folders, store
from osler.checkpoint.saver import CPU_SHARE, Saver
from osler.runtime.errors import UserError
from tests.checkpoint.conftest import folder, steps

PATIENCE_SECONDS = 300


@pytest.fixture
def slow_disk(monkeypatch):
    """While the returned event is not set, whoever flushes a file waits; the test then looks at a save in its middle."""
    goes_on, flush = threading.Event(), os.fsync

    def slow_flush(descriptor: int) -> None:
        assert goes_on.wait(PATIENCE_SECONDS)
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", slow_flush)
    yield goes_on
    goes_on.set()


def content(value: float) -> dict[str, dict[str, torch.Tensor]]:
    weight = torch.nn.Parameter(torch.full((50, 40), value))
    return {"model": {"weight": weight, "tied": weight, "view": weight.T}, "optimizer": {"weight/step": torch.tensor(value)}}


def save(saver: Saver, step: int, tensors=None, **options) -> None:
    saver.save(step, tensors=tensors or content(float(step)), state={"step": step}, files={"config.yaml": b"seed: 1"}, **options)


@pytest.fixture
def saver(tmp_path) -> Saver:
    return Saver(tmp_path, keep_last=9, in_background=True)


def test_background_and_foreground_write_the_same_bytes(tmp_path):
    for name, in_background in (("front", False), ("back", True)):
        saver = Saver(tmp_path / name, keep_last=2, in_background=in_background)
        for step in range(1, 5):
            save(saver, step, milestone=step == 1, last=step == 4)
    files = [path.relative_to(tmp_path / "front") for path in sorted((tmp_path / "front").rglob("*")) if path.is_file()]
    assert steps(tmp_path / "back") == [1, 3, 4] and len(files) == 3 * 5
    assert files == [path.relative_to(tmp_path / "back") for path in sorted((tmp_path / "back").rglob("*")) if path.is_file()]
    assert all((tmp_path / "front" / file).read_bytes() == (tmp_path / "back" / file).read_bytes() for file in files)


def test_what_changes_while_it_is_written_does_not_reach_the_disk(saver, slow_disk, tmp_path):
    tensors = content(1.0)
    with saver:
        save(saver, 1, tensors)
        for named in tensors.values():
            for tensor in named.values():
                tensor.detach().fill_(-1.0)
        slow_disk.set()
    loaded = store.load(folder(tmp_path, 1)).tensors
    assert all(torch.equal(loaded[part][name], value) for part, named in content(1.0).items() for name, value in named.items())


def test_the_next_save_waits_for_the_one_before_and_takes_its_buffers(saver, slow_disk, tmp_path):
    save(saver, 1)
    buffers = {key: buffer.data_ptr() for key, buffer in saver._buffers.items()}
    threading.Timer(0.2, slow_disk.set).start()
    save(saver, 2)
    assert slow_disk.is_set() and 1 in steps(tmp_path)
    saver.wait()
    assert {key: buffer.data_ptr() for key, buffer in saver._buffers.items()} == buffers
    assert [store.load(path).tensors["model"]["weight"][0, 0].item() for path in sorted(tmp_path.glob("step-*"))] == [1.0, 2.0]


def test_tensors_that_were_held_before_are_not_copied_again(saver, tmp_path):
    own = content(3.0)
    held = {part: {name: saver.to_host(part, name, tensor) for name, tensor in named.items()} for part, named in own.items()}
    own["model"]["weight"].detach().fill_(-1.0)
    save(saver, 3, held)
    saver.wait()
    assert torch.equal(store.load(folder(tmp_path, 3)).tensors["model"]["weight"], content(3.0)["model"]["weight"])


def test_the_writer_spares_the_cpu_until_somebody_waits(saver, monkeypatch, tmp_path):
    """By a clock on which each block takes one second of the CPU, it waits after each until its share allows the next."""
    ticks, waits, waiting, wait = itertools.count(), [], threading.Event(), saver._hurry.wait

    def patient(seconds: float) -> bool:
        waits.append(seconds)
        waiting.set()
        return wait(PATIENCE_SECONDS)

    monkeypatch.setattr("osler.checkpoint.saver.time.thread_time", lambda: next(ticks))
    monkeypatch.setattr(saver._hurry, "wait", patient)
    save(saver, 1, {"model": {"weight": torch.zeros(3_000_000)}})
    assert waiting.wait(PATIENCE_SECONDS) and saver.is_saving and steps(tmp_path) == [] and len(waits) == 1
    saver.wait()
    assert steps(tmp_path) == [1]
    assert len(waits) >= 12 and waits == pytest.approx([1 / CPU_SHARE - 1] * len(waits))


def test_a_disk_that_fails_is_told_at_the_next_save_and_the_run_goes_on(saver, fault, capsys, tmp_path):
    fault("save-state:enospc")
    save(saver, 1)
    save(saver, 2)
    text = capsys.readouterr().err
    assert "step-000000001 could not be saved: No space left" in text and "The run goes on" in text
    saver.wait(needed=True)
    assert steps(tmp_path) == [2] and capsys.readouterr().err == ""


def test_a_save_that_is_needed_and_fails_is_an_error(saver, fault, tmp_path):
    fault("save-state:ioerror")
    save(saver, 1)
    with pytest.raises(UserError, match=r"step-000000001 could not be saved.*the same command goes on"):
        saver.wait(needed=True)
    fault("save-state:enospc")
    with pytest.raises(UserError, match="step-000000002 could not be saved"):
        save(saver, 2, last=True)
    assert steps(tmp_path) == []
    saver.wait(needed=True)  # each failure is told once


def test_a_mistake_in_the_writer_is_not_swallowed(saver):
    saver.save(1, tensors={}, state={"a": torch.ones(1)}, files={})
    with pytest.raises(TypeError, match="not JSON serializable"):
        saver.wait()


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_what_ends_the_run_does_not_end_the_save(saver, slow_disk, error, tmp_path):
    threading.Timer(0.2, slow_disk.set).start()
    with pytest.raises(error), saver:
        save(saver, 1)
        raise error
    assert steps(tmp_path) == [1] and folders.newest_good(tmp_path)[1] == []


def test_a_second_ctrl_c_ends_the_writer(saver, tmp_path):
    with contextlib.suppress(KeyboardInterrupt), saver:
        save(saver, 1, {"model": {"weight": torch.zeros(12_000_000)}})
        raise KeyboardInterrupt
    with pytest.raises(RuntimeError, match="given up"):
        saver.wait()
    assert steps(tmp_path) == []
    save(Saver(tmp_path, keep_last=1, in_background=False), 2)
    assert os.listdir(tmp_path) == [folders.folder_name(2)]


def test_a_second_ctrl_c_leaves_at_once_and_harms_nothing(saver, slow_disk, tmp_path):
    with saver:
        slow_disk.set()
        save(saver, 1)
    slow_disk.clear()
    with contextlib.suppress(KeyboardInterrupt), saver:
        save(saver, 2)
        raise KeyboardInterrupt
    assert saver.is_saving
    assert folders.newest_good(tmp_path) == (folder(tmp_path, 1), [])
