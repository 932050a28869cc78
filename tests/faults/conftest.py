"""Start a run of each kind, break it at a chosen moment, and compare what two runs left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from run_folders import STOPPED, assert_same_run

from osler.cli.main import main


@pytest.fixture
def stopped(launch, tmp_path) -> Path:
    """A pretraining run that was stopped after nine steps, with checkpoints of steps 8 and 9."""
    assert launch("pretrain", tmp_path / "run", fault="train-step:sigterm:9") == STOPPED
    return tmp_path / "run"


@pytest.fixture
def mistake(capsys) -> Callable[..., str]:
    """Run the command line on a mistake and return what it says about it: one paragraph, and no traceback."""

    def run(*words: object) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == 2
        text = capsys.readouterr().err
        assert "Traceback" not in text
        *_, message = text.rpartition("osler: ")
        assert message and "\n\n" not in message
        return " ".join(message.split())

    return run


@pytest.fixture(scope="session")
def whole(commands, tmp_path_factory) -> dict[str, Path]:
    """One uninterrupted run of each kind."""
    root = tmp_path_factory.mktemp("whole")
    for kind, command in commands.items():
        assert main([*command, "--run", str(root / kind)]) == 0
    return {kind: root / kind for kind in commands}


@pytest.fixture
def finish(launch, whole) -> Callable[..., None]:
    """``finish(kind, folder, ..., same_best=True)`` lets a run go on to its end, which is that of one without interruption."""

    def run(kind: str, folder: Path, *overrides: str, same_best: bool = True, **options) -> None:
        assert launch(kind, folder, *overrides, **options) == 0
        assert_same_run(folder, whole[kind], same_best=same_best)

    return run
