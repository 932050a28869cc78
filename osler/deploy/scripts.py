"""The targets that run a shell script: Slurm, and SkyPilot and dstack, which rent machines.

Each machine writes the recipe beside the run and calls the same command as in Kubernetes, in the folder of the volume.
"""

import shlex
from typing import Any

from osler.deploy.workload import MOST_LOSSES, SHUTDOWN_VARIABLE, VOLUME, Meeting, Workload
from osler.runtime.stop import EXIT_STOPPED
from osler.runtime.world import EXIT_LOST

END = "END_OF_RECIPE"
SLURM_MEETING = Meeting("$SLURM_NODEID", "$MASTER_ADDR")
SKYPILOT_MEETING = Meeting("$SKYPILOT_NODE_RANK", '$(head -n 1 <<< "$SKYPILOT_NODE_IPS")')
DSTACK_MEETING = Meeting("$DSTACK_NODE_RANK", "$DSTACK_MASTER_NODE_IP")


def recipe_file(workload: Workload) -> str:
    """Return where the script writes the recipe."""
    return f"{workload.run_folder}.recipe.yaml"


def script(workload: Workload, meeting: Meeting) -> list[str]:
    """Return the lines that write the recipe, and as the last line the command."""
    words = workload.command(recipe_file(workload), meeting)
    command = " ".join(f'"{word}"' if "$" in word else shlex.quote(word) for word in words)
    written = [f"cat > {recipe_file(workload)} <<'{END}'", *workload.recipe_text.splitlines(), END]
    return ["mkdir -p runs", *written, f"export {SHUTDOWN_VARIABLE}={workload.deployment.grace_seconds}", command]


def repeated(workload: Workload, meeting: Meeting) -> list[str]:
    """Return the lines of ``script``, but that the command is started again where it lost the other machines.

    That is for targets that cannot decide by the exit code, or set no limit. The shell passes on the signal that asks a run to
    stop, and waits until it has saved.
    """
    *preparation, command = script(workload, meeting)
    return [
        *preparation,
        """trap 'stopped=1; kill -TERM "$pid" 2> /dev/null' TERM INT""",
        f"for loss in $(seq 0 {MOST_LOSSES}); do",
        f"  {command} &",
        "  pid=$!",
        '  wait "$pid"; code=$?',
        '  while kill -0 "$pid" 2> /dev/null; do wait "$pid"; code=$?; done',
        f'  if [ "$code" != {EXIT_LOST} ]; then break; fi',
        '  sleep 30 & pid=$!; wait "$pid"',
        '  if [ "$stopped" = 1 ]; then break; fi',
        "done",
        'exit "$code"',
    ]


def slurm(workload: Workload) -> str:
    """Return a batch script for a folder that all machines share; call ``sbatch`` in that folder."""
    deployment = workload.deployment
    *preparation, command = script(workload, SLURM_MEETING)
    options = {
        "job-name": workload.name,
        "nodes": deployment.machines,
        "ntasks-per-node": 1,
        **({"gpus-per-node": deployment.gpus} if deployment.gpus else {}),
        "cpus-per-task": deployment.cpus,
        "mem": f"{deployment.memory_gb}G",
        "output": log_file(workload),
        "open-mode": "append",
        "signal": f"TERM@{deployment.grace_seconds}",  # before the time is up; it goes to the processes, not to this script
    }
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH --{name}={value}" for name, value in options.items()),
            "#SBATCH --requeue",
            *preparation,
            'export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"',
            'export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"',  # srun does not take it over from sbatch
            f"srun --kill-on-bad-exit=0 bash -c {shlex.quote(f'exec {command}')}",
            "code=$?",
            "# The time was up and the run has saved, or a machine lost the others: it goes on when its turn comes again.",
            'case "$code" in',
            f"  {EXIT_STOPPED}) goes_on=1;;",
            f'  {EXIT_LOST}) goes_on=$(( ${{SLURM_RESTART_COUNT:-0}} < {MOST_LOSSES} ));;',
            "  *) goes_on=0;;",
            "esac",
            'state="$(squeue --noheader --format=%T --jobs="$SLURM_JOB_ID")"  # a cancelled job is not RUNNING',
            'if [ "$goes_on" = 1 ] && [ "$state" = RUNNING ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
            'exit "$code"',
            "",
        ]
    )


def log_file(workload: Workload) -> str:
    """Return the file into which Slurm writes the run's output."""
    return f"{workload.name}.log"


def skypilot(workload: Workload) -> dict[str, Any]:
    """Return a managed job on spot machines, with a bucket as its volume."""
    deployment = workload.deployment
    gpus = {"accelerators": f"{deployment.gpu_name}:{deployment.gpus}"} if deployment.gpus else {}
    return {
        "name": workload.name,
        "num_nodes": deployment.machines,
        "resources": {
            **gpus,
            "cpus": f"{deployment.cpus}+",
            "memory": f"{deployment.memory_gb}+",
            "disk_size": deployment.disk_gb,
            "image_id": f"docker:{deployment.image}",
            "use_spot": True,
            "job_recovery": {"recover_on_exit_codes": [EXIT_STOPPED]},  # besides machines that are taken away
        },
        "file_mounts": {VOLUME: {"name": deployment.volume, "mode": "MOUNT_CACHED"}},
        **({"secrets": dict.fromkeys(deployment.tokens)} if deployment.tokens else {}),
        "run": "\n".join([f"cd {VOLUME}", *repeated(workload, SKYPILOT_MEETING), ""]),
    }


def dstack(workload: Workload) -> dict[str, Any]:
    """Return a task on spot machines, with a volume that must exist."""
    deployment = workload.deployment
    gpus = {"gpu": f"{deployment.gpu_name}:{deployment.gpus}"} if deployment.gpus else {}
    return {
        "type": "task",
        "name": workload.name,
        "image": deployment.image,
        "nodes": deployment.machines,
        "volumes": [f"{deployment.volume}:{VOLUME}"],
        "working_dir": VOLUME,
        **({"env": list(deployment.tokens)} if deployment.tokens else {}),
        "commands": ["\n".join(repeated(workload, DSTACK_MEETING))],
        "resources": {
            **gpus,
            "cpu": f"{deployment.cpus}..",
            "memory": f"{deployment.memory_gb}GB..",
            "shm_size": f"{deployment.shm_gb}GB",
        },
        "spot_policy": "spot",
        "stop_duration": deployment.grace_seconds,
        "retry": {"on_events": ["no-capacity", "interruption"], "duration": "3d"},
    }
