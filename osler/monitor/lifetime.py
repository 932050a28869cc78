"""When a process began to work on a run and how it ended, as events: a run that failed must not look like one that was killed.

A process that is killed writes no end; its silence tells. Only a failure is told outside the run: of the rest a person knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from osler.errors import UserError
from osler.monitor.events import EventLog

START, END = LIFETIME = ("start", "end")  # kinds of event
FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"  # names of an end


@contextmanager
def recorded(events: EventLog, step: Callable[[], int], is_done: Callable[[], bool]) -> Iterator[None]:
    """Write the start and the end of the work inside; who leaves early without an exception was asked to stop, and has saved."""
    first = step()
    if first:
        events.write(first, START, "resumed", f"Going on from step {first:,}.", tell=False)
    else:
        events.write(first, START, "begun", "The run begins.", tell=False)
    try:
        yield
    except KeyboardInterrupt:
        events.write(step(), END, STOPPED, "Stopped at once by a second signal, without saving.", tell=False, saved=False)
        raise
    except BaseException as error:
        events.write(step(), END, FAILED, in_a_line(error), severity="critical")
        raise
    if is_done():
        events.write(step(), END, FINISHED, "The run is complete.", tell=False)
    else:
        events.write(step(), END, STOPPED, "Stopped by Ctrl-C or SIGTERM, and saved.", tell=False, saved=True)


def in_a_line(error: BaseException) -> str:
    """What an exception says in its first line; its type as well, unless it was written for the user."""
    said = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, UserError):
        return said
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
