"""A command whose standard streams are closed, full or unreadable says so in a line, or nothing; never with a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOST = {
    ">&-": (0, ""),
    ">/dev/full": (2, "osler: No space left on device. Free some of the disk; the same command then goes on.\n"),
    "1</dev/null": (2, "osler: Bad file descriptor. Send the output to a place that can be written.\n"),
}

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs POSIX file descriptors")


def osler(tmp_path: Path, arguments: str, redirection: str) -> tuple[int, str, str]:
    """The exit code and what reached standard output and error, each a file unless the ``redirection`` says otherwise."""
    if "/dev/full" in redirection and not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    out, err = tmp_path / "out", tmp_path / "err"
    command = f"exec {sys.executable} -m osler.cli {arguments} >{out} 2>{err} {redirection}"
    # Without a buffer argparse hides that its help could not be written.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    done = subprocess.run(["sh", "-c", command], stdin=subprocess.DEVNULL, check=False, env=environment)
    return done.returncode, out.read_text(), err.read_text()


@pytest.mark.parametrize("arguments", ["recipes", "show --help"])
@pytest.mark.parametrize("redirection", LOST)
def test_standard_output(tmp_path, arguments, redirection):
    code, _, err = osler(tmp_path, arguments, redirection)
    assert (code, err) == LOST[redirection]


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "2</dev/null", "<&-", "0>/dev/null"])
@pytest.mark.parametrize(("arguments", "code"), [("recipes", 0), ("show no-such-recipe", 2)])
def test_standard_error_and_input(tmp_path, arguments, code, redirection):
    found, out, err = osler(tmp_path, arguments, redirection)
    assert found == code and ("pure-tiny" in out) == (code == 0)
    assert err == "" if "2" in redirection or code == 0 else err.startswith("osler: ") and "Traceback" not in err


def test_no_file_takes_the_number_of_a_closed_stream(tmp_path):
    """What a library prints would go into it."""
    code = (
        "import os, sys; from osler.runtime.log import open_streams; open_streams()\n"
        f"file = open({str(tmp_path / 'metrics')!r}, 'w'); os._exit(file.fileno())"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, code], check=False, env=environment)
    assert done.returncode > 2


def test_a_chat_whose_questions_cannot_be_read_says_so(runs, tmp_path, monkeypatch, capsys):
    from osler.cli.main import main

    with (tmp_path / "written").open("w") as unreadable, open(unreadable.fileno(), closefd=False) as stream:
        monkeypatch.setattr("sys.stdin", stream)
        assert main(["chat", str(runs.pretrain)]) == 2
    assert "Standard input cannot be read: Bad file descriptor" in capsys.readouterr().err
