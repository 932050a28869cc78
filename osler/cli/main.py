"""The command line: find the command, run it, end with its exit code. Imports nothing heavy, so help answers at once."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

from osler.cli.command import Command, run
from osler.cli.commands import COMMANDS
from osler.runtime.errors import UserError
from osler.runtime.log import complain, flush_or_silence, log_to_terminal, open_streams, silence
from osler.runtime.neighbours import sharing_cpus
from osler.runtime.stop import REQUESTS, hear_requests, ignore_requests, interruptible
from osler.runtime.world import is_distributed, is_reporter, is_silent

OVERVIEW = """\
usage: osler COMMAND [RECIPE] [key.path=value ...] [options]

Train a small language model from scratch until it answers medical questions.

{commands}

`osler COMMAND --help` shows options and an example; `osler quickstart` is the place to start.

Exit codes:
  0    done
  1    an error in Osler, with a traceback, or damage that `checkpoint verify` or `data inspect` found
  2    something to mend, told in one paragraph: a wrong option, a full disk, a loss that stays NaN
  75   another process of the run was lost; the same command goes on from the newest checkpoint
  130  stopped by Ctrl-C, SIGTERM, SIGUSR1 or a terminal that closes (SIGHUP): training finishes its step and saves, and the
       same command goes on. A second Ctrl-C leaves at once; the run then goes on from its last checkpoint."""
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Free some of the disk; the same command then goes on."),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "Name another place, or ask its owner for the permission."),
    errno.EFBIG: "Name a place that takes files of this size.",
    errno.EBADF: "Send the output to a place that can be written.",
}  # advice for errors of the operating system, by their number


def program() -> NoReturn:
    """Run the command that ``sys.argv`` names, and end the process."""
    open_streams()
    hear_requests()  # for the rest of the process: once asked to stop, it takes no second request
    code: int | str | None = 1
    try:
        code = main()
    except SystemExit as exit_:
        code = exit_.code
    finally:
        end(code)


def end(code: int | str | None) -> NoReturn:
    """Print the traceback of the current exception, if any, and end the process without further output."""
    if sys.exc_info()[0] is not None:
        sys.excepthook(*sys.exc_info())
    for request in REQUESTS:
        signal.signal(request, signal.SIG_IGN)  # this stays in force when Python's own handlers are gone
    flush_or_silence()
    if isinstance(code, int) and (code or is_distributed()):
        # A thread of torch that returns to the interpreter during its shutdown is ended on the spot, which aborts the process.
        # Threads of gloo return at any time, and are joined only when nothing holds their group any more. After an interruption
        # or an error other threads may still compute, and joining them could mean waiting for a rank that is gone.
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors in Osler's code pass through."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # an ASCII terminal shows ? where it cannot show a character
    try:
        log_to_terminal()
        with interruptible(), sharing_cpus(), written_out():
            return dispatch(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        complain(f"osler: {error}", is_reporter(str(error)) if error.is_reporter is None else error.is_reporter)
        return error.exit_code
    except KeyboardInterrupt:
        complain("osler: interrupted", not is_silent("LOCAL_RANK"))
        return 130
    except BrokenPipeError:
        silence(sys.stdout)  # the reader (`| head`) is gone, and the interpreter would complain when it flushes stdout at exit
        return 141
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        complain(f"osler: {what}. {REMEDIES[error.errno]}")
        return 2


@contextlib.contextmanager
def written_out() -> Iterator[None]:
    """Flush standard output after a command or argparse's help, and from then on ignore signals that ask to stop."""
    try:
        yield
    except SystemExit:
        sys.stdout.flush()
        raise
    else:
        sys.stdout.flush()
    finally:
        ignore_requests()


def dispatch(argv: list[str]) -> int:
    """Find the command that ``argv`` names, and run it."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview(COMMANDS))
        return 0
    if argv[0] == "--version":
        from osler.doctor import osler_version

        print(f"osler {osler_version()}")
        return 0
    for words in (2, 1):
        for command in COMMANDS:
            if command.name == " ".join(argv[:words]):
                return run(command, argv[words:])
    group = [command for command in COMMANDS if command.name.startswith(f"{argv[0]} ")]
    if group and len(argv) == 1:
        names = " and ".join(f"`{command.name}`" for command in group)
        raise UserError(f"`{argv[0]}` is half a command; there are {names}. See `osler {argv[0]} --help`.")
    if group and argv[1] in ("-h", "--help"):
        print(overview(group))
        return 0
    given = " ".join(argv[:2]) if group else argv[0]
    close = difflib.get_close_matches(given, [command.name for command in COMMANDS], n=1)
    raise UserError(f"there is no command `{given}`{f'; did you mean `{close[0]}`?' if close else '.'} See `osler --help`.")


def overview(commands: Sequence[Command]) -> str:
    """Return the list of commands, one line each."""
    return OVERVIEW.format(commands="\n".join(f"  {command.name:<18} {command.line}" for command in commands))
