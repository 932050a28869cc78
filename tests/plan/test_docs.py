"""docs/planning.md: each of its commands is run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from osler.cli.main import main

PAGE = (Path(__file__).parents[2] / "docs" / "planning.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [line for language, block in BLOCKS if not language for line in block.splitlines()]
(DEVICE,) = (block for language, block in BLOCKS if language == "yaml")


def test_the_page_has_commands_of_the_planner_alone() -> None:
    assert len(COMMANDS) > 10 and all(line.startswith("osler plan ") for line in COMMANDS)


@pytest.mark.parametrize("line", COMMANDS)
def test_what_the_page_plans(line, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my-card.yaml").write_text(DEVICE, encoding="utf-8")
    assert main(shlex.split(line)[1:]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    if "--table" not in line and "plan --budget" not in line:
        assert "Largest micro-batch that surely fits" in said and " to " in said
