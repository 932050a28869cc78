"""The command line answers at once, says what was wrong, and leaves with the right code."""

from __future__ import annotations

import errno
import inspect
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from osler.cli import commands
from osler.cli import main as cli
from osler.cli.command import function_of
from osler.runtime.errors import UserError
from osler.runtime.stop import REQUESTS

ROOT = Path(__file__).parents[1]


def python(code: str, **options) -> subprocess.CompletedProcess:
    """Run a program, in which ``cli`` is ``osler.cli.main``."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    command = [sys.executable, "-c", f"import os, sys, osler.cli.main as cli\n{code}"]
    return subprocess.run(command, **{"stdout": subprocess.PIPE, **options}, stderr=subprocess.PIPE, text=True, env=environment)


LIGHT = [["--help"], ["pretrain", "--help"], ["recipes"], ["show", "pure-tiny"], ["show", "grpo", "--explain"]]
LIGHT += [["metrics", "rank"]]


@pytest.mark.parametrize("arguments", LIGHT)
def test_light_commands_never_load_torch(arguments):
    result = python(
        f"try: cli.main({arguments!r})\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'tokenizers', 'pyarrow', 'numpy'} & set(sys.modules)\n"
        f"if {arguments!r}[-1] == '--help': heavy |= {{'pydantic', 'yaml'}} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", commands.COMMANDS, ids=lambda command: command.name)
def test_a_command_explains_itself_and_its_example_calls_a_function_that_takes_its_options(command, capsys, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.name.split(), "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and command.line in " ".join(text.split())
    assert f"example:\n  {command.example}" in text and command.example.startswith(f"osler {command.name}")
    called = []
    signature = inspect.signature(function_of(command))
    monkeypatch.setattr("osler.cli.command.function_of", lambda _: lambda **given: called.append(signature.bind(**given)) or 0)
    assert cli.main(shlex.split(command.example)[1:]) == 0 and called


def test_overview_lists_every_command(capsys):
    for arguments in ([], ["--help"], ["help"]):
        assert cli.main(arguments) == 0
        text = capsys.readouterr().out
        assert all(f"  {command.name} " in text for command in cli.COMMANDS)
    assert cli.main(["data", "--help"]) == 0
    text = capsys.readouterr().out
    assert "data prepare" in text and "doctor" not in text
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out.startswith("osler")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shwo"], "did you mean `show`?"),
        (["data"], "`data` is half a command; there are `data prepare`"),
        (["data", "prepar"], "did you mean `data prepare`?"),
        (["show", "pure-tiyn"], "did you mean `pure-tiny`?"),
        (["show", "pure-tiny", "model.num_layer=3"], "model.num_layer: unknown key; did you mean `model.num_layers`?"),
        (["show", "pure-tiny", "model.num_layers="], "has no value"),
        (["show", "pure-tiny", "pure-small"], "one recipe at a time"),
        (["show"], "which recipe?"),
        (["quickstart", "pure-tiny", "a=1"], "takes no recipe"),
        (["report", "no/such/run"], "no/such/run"),
        (["data", "inspect", "no/such/folder"], "no/such/folder"),
        (["tokenizer", "train", "data=3", "--out", "y"], "data: should be a mapping"),
        (["data", "prepare", "model.num_layers=1", "--out", "y"], "is not about text"),
    ],
)
def test_mistakes_are_one_message_and_code_2(arguments, message, capsys):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.startswith("osler: ")
    assert "Traceback" not in captured.err and captured.out == ""


def failing_command(monkeypatch, error: BaseException) -> None:
    def run():
        raise error

    monkeypatch.setattr(cli, "COMMANDS", (cli.Command("fail", "", "osler fail", run),))


REFUSED = PermissionError(errno.EACCES, os.strerror(errno.EACCES), "runs/x/report.html")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "osler: interrupted\n"),
        (UserError("mend this"), 2, "osler: mend this\n"),
        (REFUSED, 2, "osler: runs/x/report.html: Permission denied. Name another place"),
    ],
)
def test_what_ends_a_command_is_told_in_a_line(error, code, said, monkeypatch, capsys):
    failing_command(monkeypatch, error)
    assert cli.main(["fail"]) == code
    err = capsys.readouterr().err
    assert err.startswith(said) and err.count("\n") == 1


@pytest.mark.parametrize(("work", "code"), [("return 0", 0), ("1 / 0", 1), ("raise SystemExit(3)", 3)])
@pytest.mark.parametrize("processes", [1, 2])
def test_ranks_and_what_failed_end_before_the_interpreter_shuts_down(work, code, processes):
    """Threads of gloo, or those that still compute, may want it, which aborts a process whose interpreter is shutting down."""
    result = python(
        "class Trace:\n    def __del__(self, write=os.write): write(1, b'shut down')\n"
        f"sys.trace = Trace()\ndef run():\n    print('done ')\n    {work}\n"
        "cli.COMMANDS = (cli.Command('work', '', '', run),)\nsys.argv = ['osler', 'work']\ncli.program()",
        env={"WORLD_SIZE": str(processes), "RANK": "0"},
    )
    assert result.returncode == code and ("Traceback" in result.stderr) == (code == 1), result.stderr
    assert result.stdout == ("done \nshut down" if processes == 1 and not code else "done \n")


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="needs POSIX pipes")
def test_a_closed_pipe_is_quiet():
    read, write = os.pipe()
    os.close(read)  # nobody will read, as after `| head -0`
    try:
        result = python("sys.exit(cli.main(['recipes']))", stdout=write)
    finally:
        os.close(write)
    assert (result.returncode, result.stderr) == (141, "")


def test_an_ascii_terminal_does_not_break_output():
    result = python(
        "def run(): return '\\u2192 5 \\u00d7'\ncli.COMMANDS = (cli.Command('sign', '', '', run),)\nsys.exit(cli.main(['sign']))",
        env={"PYTHONIOENCODING": "ascii"},
    )
    assert (result.returncode, result.stdout) == (0, "? 5 ?\n")


def test_from_text_to_shards_and_back(tmp_path, capsys):
    notes, shards = tmp_path / "notes", tmp_path / "shards"
    notes.mkdir()
    for number in range(12):
        (notes / f"{number}.txt").write_text(f"Case {number}: fever and a stiff neck suggest meningitis.\n")
    tokenizer, second = str(tmp_path / "new" / "tokenizer.json"), str(tmp_path / "second.json")
    assert cli.main(["tokenizer", "train", str(notes), "tokenizer.vocab_size=300", "--out", tokenizer]) == 0
    assert "300 tokens" in capsys.readouterr().out
    assert cli.main(["tokenizer", "train", f"data.path={notes}", "tokenizer.vocab_size=310", "--out", second]) == 0
    recipe, superwords = tmp_path / "notes.yaml", str(tmp_path / "superwords.json")
    recipe.write_text("tokenizer: {vocab_size: 304}\n")
    assert cli.main(["tokenizer", "train", str(recipe), f"data.path={notes}", "--type", "superbpe", "--out", superwords]) == 0
    assert "304 tokens" in capsys.readouterr().out
    assert cli.main(["tokenizer", "compare", tokenizer, superwords, "--text", str(notes)]) == 0
    assert f"\n{superwords}  " in capsys.readouterr().out
    assert cli.main(["tokenizer", "inspect", tokenizer, "fever|neck"]) == 0
    out = capsys.readouterr().out
    assert "<|answer|> = 3" in out and "for 10 bytes" in out

    prepare = ["data", "prepare", str(notes), "data.holdout_fraction=0.25", f"tokenizer.path={tokenizer}", "--out", str(shards)]
    assert cli.main(prepare) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line}
    assert (rows["train"][1], rows["validation"][1]) == ("10", "2")
    assert cli.main(prepare) == 0
    assert "exists already" in capsys.readouterr().out

    assert cli.main(["data", "inspect", str(shards), "--tokenizer", tokenizer]) == 0
    out = capsys.readouterr().out
    assert "train begins: 'Case" in out and "every file is as it was written" in out
    assert cli.main(["data", "inspect", str(shards), "--tokenizer", second]) == 2
    assert "another tokenizer" in capsys.readouterr().err
    victim = next(shards.glob("*/train/shard-*.bin"))
    content = bytearray(victim.read_bytes())
    content[0] ^= 1
    victim.write_bytes(content)
    assert cli.main(["data", "inspect", str(shards)]) == 1
    assert victim.name in capsys.readouterr().out


@pytest.mark.usefixtures("standard_handlers")
@pytest.mark.parametrize("number", REQUESTS)
def test_sigterm_and_sighup_end_a_command_as_ctrl_c_does(number, capsys, monkeypatch):
    monkeypatch.setattr("osler.cli.main.dispatch", lambda argv: signal.raise_signal(number))
    before = signal.getsignal(number)
    assert cli.main(["eval"]) == 130
    assert "osler: interrupted" in capsys.readouterr().err
    assert signal.getsignal(number) is before


def test_the_command_that_the_quickstart_names_for_a_shorter_one_is_valid(capsys, tmp_path):
    with pytest.raises(SystemExit):
        cli.main(["quickstart", "--help"])
    line = next(line for line in capsys.readouterr().out.splitlines() if "exam.task.limit=" in line)
    words = line.replace("runs/short", str(tmp_path / "run")).split()
    assert words[0] == "osler" and cli.main([*words[1:], "--dry-run"]) == 0
    assert "to come; completions 720 of" in capsys.readouterr().out
