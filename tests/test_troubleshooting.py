"""docs/troubleshooting.md: each of its commands is run on a finished run."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from osler.cli.main import main

PAGE = (Path(__file__).parents[1] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
LINES = [line for block in re.findall(r"^```\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL) for line in block.splitlines()]


SLOW = ("osler doctor", "osler bench")  # they compile, or time large matmuls


@pytest.mark.parametrize("line", [pytest.param(line, marks=pytest.mark.slow if line.startswith(SLOW) else ()) for line in LINES])
def test_what_the_page_says_can_be_typed(line, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs.pretrain, "RUN")
    Path("TEXTS").mkdir()
    for name in ("notes.txt", "TEXTS/notes.txt"):
        Path(name).write_text("The liver makes bile. " * 200, encoding="utf-8")
    try:
        code = main(shlex.split(line)[1:])
    except SystemExit as end:  # --help
        code = end.code
    assert code == 0, capsys.readouterr().err


def test_the_page_has_all_commands_of_a_first_look():
    assert {"osler doctor", "osler test", "osler report RUN"} <= set(LINES) and len(LINES) > 12
