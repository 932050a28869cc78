"""``python -m osler.deploy.launch``: torchrun, except that it ends with the exit code of its processes.

torchrun itself ends with 1 whatever happened. So whoever watches it cannot tell an eviction, after which the run goes on, from a
wrong recipe, which never runs. This module takes torchrun's arguments and ``PET_`` variables. ``TORCH_ELASTIC_SHUTDOWN_TIMEOUT``
says how long the processes have to save when a signal comes (torch 2.13; before, it is 30 seconds).
"""

import sys
from collections.abc import Sequence

from osler.runtime.errors import UserError
from osler.runtime.stop import EXIT_STOPPED, REQUESTS, hear_requests
from osler.runtime.world import EXIT_LOST


def main(arguments: Sequence[str]) -> int:
    """Start the processes, wait for them, and return the exit code for all of them: see ``exit_code_of``."""
    hear_requests()  # at once, because process 1 of a container ignores signals that have no handler
    try:
        import torch.distributed as dist
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.run import parse_args, run

        given = parse_args(list(arguments))
        given.signals_to_handle = ",".join(signal.name for signal in REQUESTS)
        try:
            run(given)
        except SignalException:  # the processes got the signal, and have ended
            return EXIT_STOPPED
        except ChildFailedError as error:
            return exit_code_of([failure.exitcode for failure in error.failures.values()])
        except dist.DistError as error:
            print(f"osler: another machine cannot be reached ({str(error).partition(chr(10))[0]})", file=sys.stderr)
            return EXIT_LOST
    except KeyboardInterrupt:
        return EXIT_STOPPED
    return 0


def exit_code_of(codes: Sequence[int]) -> int:
    """Return one exit code for processes that ended with these codes; a negative code is the number of a signal.

    An error that the user must mend comes first, then a crash, then lost processes, which are only the result of a crash.
    """
    order = [UserError.exit_code, *(code for code in codes if code != EXIT_LOST), EXIT_LOST]
    code = next(code for code in order if code in codes)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
