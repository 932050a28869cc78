"""What Kubernetes does with the pod of a Job, here: mounts are folders, and the failure policy judges how a process ended."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def decided(job: dict[str, Any], code: int, *, disrupted: bool = False) -> str:
    """What becomes of a pod that ended like this, by the spec of its Job: the action of the first rule that matches."""
    for rule in job["podFailurePolicy"]["rules"]:
        if disrupted and rule.get("onPodConditions") == [{"type": "DisruptionTarget", "status": "True"}]:
            return rule["action"]
        if (codes := rule.get("onExitCodes")) and (code in codes["values"]) == (codes["operator"] == "In"):
            return rule["action"]
    return "Count"


def start(pod: dict[str, Any], sources: dict[str, Path], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    """Start the container of a pod with exactly its command, but that what it mounts is a folder of ``sources``, by volume."""
    (container,) = pod["containers"]
    mounted = {mount["mountPath"]: str(sources[mount["name"]]) for mount in container["volumeMounts"] if mount["name"] in sources}

    def placed(text: str) -> str:
        return next((text.replace(path, folder) for path, folder in mounted.items() if text.startswith(path)), text)

    given = {variable["name"]: placed(variable["value"]) for variable in container["env"]}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with log.open("ab") as said:
        return subprocess.Popen(
            list(map(placed, container["command"])),
            cwd=placed(container["workingDir"]),
            env={**os.environ, "PATH": path, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1", **given, **environment},
            stdout=said,
            stderr=said,
        )
