"""The command line: finds the verb, parses its options, runs it. Nothing heavy is imported before, so help answers at once.

Exit codes: see ``EXIT_CODES``, which `osler --help` prints.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence

from osler.errors import UserError
from osler.runtime.log import complain
from osler.runtime.neighbours import sharing_cpus
from osler.runtime.world import is_teller_unconnected
from osler.verbs import VERBS, Verb

EXIT_CODES = """\
Exit codes: 0 done; 1 an error in Osler, with a traceback, or damage that `checkpoint verify` or `data inspect` found; 2 something
to mend, told in one paragraph (a wrong option, a full disk, a loss that stays NaN, another process of the run that was lost);
130 stopped by Ctrl-C or SIGTERM: training has finished its step and saved, and the same command goes on. A second Ctrl-C leaves
at once; the run then goes on from its last checkpoint."""
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Free some of the disk; the same command then goes on."),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "Name another place, or ask whose it is for the permission."),
}  # what a person can do about an error of the system


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code; exceptions that are not the user's mistake pass through."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # an ASCII terminal shows ? where it cannot show a sign
    try:
        with termination_as_interrupt(), sharing_cpus():
            code = dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except UserError as error:
        complain(f"osler: {error}", is_teller_unconnected(str(error)) if error.teller is None else error.teller)
        return 2
    except KeyboardInterrupt:
        complain("osler: interrupted")
        return 130
    except BrokenPipeError:
        # The reader (`| head`) is gone; without this the interpreter complains when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        complain(f"osler: {what}. {REMEDIES[error.errno]}", True)
        return 2


@contextlib.contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """SIGTERM ends whatever runs as Ctrl-C does, where nothing hears it that knows better, as training does."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def dispatch(argv: list[str]) -> int:
    """Find the verb that ``argv`` names, parse its options and run it."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview(VERBS))
        return 0
    if argv[0] == "--version":
        print(version())
        return 0
    for words in (2, 1):
        name = " ".join(argv[:words])
        verb = next((verb for verb in VERBS if verb.name == name), None)
        if verb:
            return verb.run(parser(verb).parse_intermixed_args(argv[words:]))
    group = [verb for verb in VERBS if verb.name.startswith(f"{argv[0]} ")]
    if group and len(argv) == 1:
        names = " and ".join(f"`{verb.name}`" for verb in group)
        raise UserError(f"`{argv[0]}` is half a verb; there are {names}. See `osler {argv[0]} --help`.")
    if group and argv[1] in ("-h", "--help"):
        print(overview(group))
        return 0
    given = " ".join(argv[:2]) if group else argv[0]
    close = difflib.get_close_matches(given, [verb.name for verb in VERBS], n=1)
    raise UserError(f"there is no verb `{given}`{f'; did you mean `{close[0]}`?' if close else ''} See `osler --help`.")


def overview(verbs: Sequence[Verb]) -> str:
    """List verbs, one line each."""
    lines = [f"  {verb.name:<18} {verb.line}" for verb in verbs]
    return "\n".join(
        [
            "usage: osler VERB [RECIPE] [key.path=value ...] [options]",
            "",
            "Train a small language model from scratch until it answers medical questions.",
            "",
            *lines,
            "",
            "`osler VERB --help` shows options and an example; `osler quickstart` is the place to start.",
            "",
            EXIT_CODES,
        ]
    )


def parser(verb: Verb) -> argparse.ArgumentParser:
    """Return the parser of one verb."""
    made = argparse.ArgumentParser(
        prog=f"osler {verb.name}",
        description=verb.line,
        epilog="\n".join([f"example:\n  {verb.example}", verb.more]).rstrip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for flags, settings in verb.options:
        made.add_argument(*flags, **settings)
    return made


def version() -> str:
    """Return the installed version."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"osler {version('osler')}"
    except PackageNotFoundError:
        return "osler (a source tree that is not installed)"


if __name__ == "__main__":
    sys.exit(main())
