"""What the benchmarks share: a measurement in a process of its own, and the one JSON object that a script gives.

Every result says on what machine it was measured (``describe_machine``).

A fresh process starts with its own allocator, caches and threads, so that no contestant finds what another left.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def in_fresh_python(arguments: Sequence[str], *, threads: int | None = None, **environment: str) -> str:
    """What Python prints when it is started anew with these arguments and this source tree; ends the script if it fails."""
    given = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    if threads is not None:
        given["OMP_NUM_THREADS"] = str(threads)
    done = subprocess.run([sys.executable, *arguments], env=given, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def measured(arguments: Sequence[str], *, threads: int | None = None, **environment: str) -> dict[str, Any]:
    """The JSON object in the last line that a fresh Python prints."""
    result: dict[str, Any] = json.loads(in_fresh_python(arguments, threads=threads, **environment).strip().splitlines()[-1])
    return result


def publish(result: Mapping[str, Any], out: Path | None) -> None:
    """Print the result of a script with the machine it ran on, and keep it in a file if one is given.

    ``threads`` of the result, where it is there, is what the measured processes had.
    """
    from osler.runtime.device import describe_machine  # imports torch, which a process that only starts others can do without

    threads = {"threads": result["threads"]} if "threads" in result else {}
    text = json.dumps({**result, "machine": describe_machine() | threads | result.get("machine", {})}, indent=2)
    print(text)
    if out:
        out.write_text(text + "\n")


def commit_of(checkout: Path) -> str:
    """Return the commit of a checkout, where files were changed with a digest of the changes; "" where it is no repository."""

    def said(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True, text=True).stdout.strip()

    changes = said("diff", "HEAD")
    digest = hashlib.blake2b(changes.encode(), digest_size=4).hexdigest()
    return said("describe", "--always") + (f"-dirty-{digest}" if changes else "")
