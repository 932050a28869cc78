"""The start and the end of each process of a run, as events: a run that failed must not look like one that was killed.

A process that is killed writes no end; its silence tells, and on its own host the lock of the folder. Only a failure also goes to
the trackers, because a person knows of the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from socket import gethostname

from osler.monitor.alerts import Alert
from osler.records.events import Event, EventLog
from osler.records.values import as_dicts, as_text
from osler.runtime.errors import UserError

logger = logging.getLogger(__name__)

START, END = LIFETIME = ("start", "end")  # kinds of event
FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"  # names of an end


@contextmanager
def recorded(
    events: EventLog, step: Callable[[], int], is_done: Callable[[], bool], unresolved: Callable[[], Sequence[Alert]]
) -> Iterator[None]:
    """Write the start and the end of the work inside; work that ends early without an error was asked to stop, and has saved.

    A run that is complete says what is still wrong with it: ``unresolved`` returns that.
    """
    first, host = step(), gethostname()
    if first:
        events.write(first, START, "resumed", f"Going on from step {first:,}.", tell=False, host=host)
    else:
        events.write(first, START, "begun", "The run begins.", tell=False, host=host)
    try:
        yield
    except KeyboardInterrupt:
        events.write(step(), END, STOPPED, "Stopped at once by a second signal, without saving.", tell=False, saved=False)
        raise
    except BaseException as error:
        events.write(step(), END, FAILED, in_a_line(error), severity="critical")
        raise
    if is_done():
        alerts = unresolved()
        if alerts:
            lines = [f"The run is complete, but {still_wrong(len(alerts))}:", *(alert.in_words for alert in alerts)]
            logger.warning("\n  ".join(lines))
        message = f"The run is complete, but {still_wrong(len(alerts))}." if alerts else "The run is complete."
        events.write(step(), END, FINISHED, message, tell=False, unresolved=[asdict(alert) for alert in alerts])
    else:
        events.write(step(), END, STOPPED, "Stopped by Ctrl-C or a signal, and saved.", tell=False, saved=True)


def still_wrong(count: int) -> str:
    """Return in words how many alerts hold at the end of a run."""
    return "1 alert still holds" if count == 1 else f"{count} alerts still hold"


def unresolved_at_end(events: Sequence[Event]) -> list[str]:
    """Return the names of the alerts that held at the end of a complete run, by its newest start or end."""
    newest = next((event for event in reversed(events) if event.kind in LIFETIME), None)
    return [as_text(alert.get("name")) for alert in as_dicts(newest.details.get("unresolved"))] if newest else []


def in_a_line(error: BaseException) -> str:
    """Return the first line of an exception's message, with its type unless it was written for the user."""
    said = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, UserError):
        return said
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
