"""Kubernetes' manifests as plain mappings: a Job, a JobSet, a TrainJob of Kubeflow's Trainer, and a server of the trained model.

The exit code decides about a restart. A pod is started again without being counted if it was evicted (the condition
DisruptionTarget), or if it saved because it was asked to stop. An error that the user must mend ends the Job. Anything else
counts as a failure (``max_failures``). Where several machines train together, one that lost the others is started again alone, to
meet the one that takes the place of an evicted machine; once it has been ``MOST_LOSSES`` times, all of them start again, which
counts as a failure.
Sources: the API of Kubernetes 1.37, JobSet v1alpha2, Trainer v1alpha1.
"""

from typing import Any

from osler.deploy.workload import MOST_LOSSES, RECIPE_FOLDER, SHUTDOWN_VARIABLE, VOLUME, Meeting, Workload
from osler.runtime.errors import UserError
from osler.runtime.stop import EXIT_STOPPED
from osler.runtime.world import EXIT_LOST

Manifest = dict[str, Any]
CONTAINER = "node"  # the name that Kubeflow's Trainer expects
USER = 1000  # the user of the image
INSTANCE = "app.kubernetes.io/instance"  # the label by which everything of one run is found
TRAINER_GROUP = "trainer.kubeflow.org"
RECIPE_FILE = "recipe.yaml"
SERVER_PORT = 8000


def job(workload: Workload) -> list[Manifest]:
    """Return the manifests for one machine: a Job."""
    if workload.deployment.machines > 1:
        raise UserError("--target k8s-job is one machine; several train together in a jobset or a trainjob.")
    spec = {"backoffLimit": workload.deployment.max_failures, **_job_spec(pod_template(workload))}
    return [*_shared(workload), _manifest(workload, "batch/v1", "Job", spec=spec)]


def jobset(workload: Workload) -> list[Manifest]:
    """Return the manifests for several machines: a JobSet, which starts all of them again when one crashes."""
    meeting = Meeting("$(NODE_RANK)", f"{workload.name}-{CONTAINER}-0-0.{workload.name}")
    spec = _jobset_spec(workload, {"spec": _members(workload, meeting)})
    return [*_shared(workload), _manifest(workload, "jobset.x-k8s.io/v1alpha2", "JobSet", spec=spec)]


def trainjob(workload: Workload) -> list[Manifest]:
    """Return the manifests for several machines by Kubeflow's Trainer, which says where they meet: a TrainJob and its runtime."""
    version = f"{TRAINER_GROUP}/v1alpha1"
    deployment = workload.deployment
    labels = {"labels": {f"{TRAINER_GROUP}/trainjob-ancestor-step": "trainer"}}
    runtime = {
        "mlPolicy": {"numNodes": deployment.machines, "torch": {}},
        "template": {"spec": _jobset_spec(workload, {"metadata": labels, "spec": _members(workload, None)})},
    }
    train = {
        "runtimeRef": {"apiGroup": TRAINER_GROUP, "kind": "TrainingRuntime", "name": workload.name},
        "trainer": {"numNodes": deployment.machines, "numProcPerNode": deployment.processes_per_machine},
    }
    return [
        *_shared(workload),
        _manifest(workload, version, "TrainingRuntime", spec=runtime),
        _manifest(workload, version, "TrainJob", spec=train),
    ]


def server(workload: Workload) -> list[Manifest]:
    """Return the manifests that serve the trained model by OpenAI's API: a Deployment and its Service."""
    name = f"{workload.name}-server"  # a label of its own, because it is applied and deleted by itself
    template = pod_template(workload)
    template["metadata"] = {"labels": {INSTANCE: name}}
    pod, container = template["spec"], template["spec"]["containers"][0]
    del pod["restartPolicy"]  # a Deployment knows only Always
    for part in (pod["volumes"], container["volumeMounts"]):  # the recipe may be gone
        part[:] = [volume for volume in part if volume["name"] != "recipe"]
    pod["terminationGracePeriodSeconds"] = 45  # `osler serve` has 30 seconds to end its requests
    container["command"] = ["osler", "serve", workload.served_folder, "--host", "0.0.0.0", "--port", str(SERVER_PORT)]
    container["ports"] = [{"name": "http", "containerPort": SERVER_PORT, "protocol": "TCP"}]
    health = {"httpGet": {"path": "/health", "port": "http"}}
    container["startupProbe"] = health | {"periodSeconds": 5, "failureThreshold": 120}  # reading a model takes a while
    container["readinessProbe"] = health | {"periodSeconds": 5}
    container["livenessProbe"] = health | {"periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 6}
    chosen = {INSTANCE: name}
    spec = {"replicas": 1, "strategy": {"type": "Recreate"}, "selector": {"matchLabels": chosen}, "template": template}
    service = {"selector": chosen, "ports": [{"name": "http", "port": SERVER_PORT, "targetPort": "http", "protocol": "TCP"}]}
    return [  # the volume is that of the run: a claim may not change, and here nobody knows how many machines it was made for
        _manifest(workload, "apps/v1", "Deployment", name, spec=spec),
        _manifest(workload, "v1", "Service", name, spec=service),
    ]


def secret_template(workload: Workload) -> str:
    """Return the Secret that holds the tokens, as comments and without values; empty without tokens."""
    deployment = workload.deployment
    if not deployment.tokens:
        return ""
    given = " ".join(f'--from-literal={token}="${token}"' for token in deployment.tokens)
    lines = [
        "The pods wait until this secret is there. It is not applied with the rest, so that no file holds its values; make it by",
        f"  kubectl create secret generic {deployment.secret} --namespace {deployment.namespace} {given}",
        "apiVersion: v1",
        "kind: Secret",
        f"metadata: {{name: {deployment.secret}, namespace: {deployment.namespace}}}",
        f"stringData: {{{', '.join(f'{token}: ' + chr(34) * 2 for token in deployment.tokens)}}}",
    ]
    return "".join(f"# {line}\n" for line in lines)


def pod_template(workload: Workload, meeting: Meeting | None = None) -> Manifest:
    """Return the pod of one machine: its command, devices, volumes and rights."""
    deployment = workload.deployment
    variables = {
        "HOME": "/tmp",  # compiled code goes there; it is quickly made again
        "HF_HOME": f"{VOLUME}/huggingface",
        SHUTDOWN_VARIABLE: str(deployment.grace_seconds),
    }
    environment: list[Manifest] = [{"name": name, "value": value} for name, value in variables.items()]
    environment += [
        {"name": token, "valueFrom": {"secretKeyRef": {"name": deployment.secret, "key": token}}} for token in deployment.tokens
    ]
    if meeting is not None:
        index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
        environment.append({"name": "NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": index}}})
    devices = {"nvidia.com/gpu": deployment.gpus} if deployment.gpus else {}
    memory = f"{deployment.memory_gb}G"
    container = {
        "name": CONTAINER,
        "image": deployment.image,
        "command": workload.command(f"{RECIPE_FOLDER}/{RECIPE_FILE}", meeting),
        "workingDir": VOLUME,
        "env": environment,
        "resources": {
            "requests": {"cpu": deployment.cpus, "memory": memory},
            "limits": {"memory": memory, **devices},
        },
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "volume", "mountPath": VOLUME},
            {"name": "recipe", "mountPath": RECIPE_FOLDER, "readOnly": True},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }
    shared_memory = {"medium": "Memory", "sizeLimit": f"{deployment.shm_gb}G"}
    spec = {
        "restartPolicy": "Never",  # a Job's failure policy wants it
        "terminationGracePeriodSeconds": deployment.grace_seconds + 10,
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        **({"tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]} if devices else {}),
        "containers": [container],
        "volumes": [
            {"name": "volume", "persistentVolumeClaim": {"claimName": deployment.volume}},
            {"name": "recipe", "configMap": {"name": workload.name}},
            {"name": "shared-memory", "emptyDir": shared_memory},
            {"name": "tmp", "emptyDir": {}},
        ],
    }
    return {"metadata": {"labels": {INSTANCE: workload.name}}, "spec": spec}


def _job_spec(template: Manifest, *rules: Manifest) -> Manifest:
    """Return the spec of a Job, which says what happens when its pod ends; ``rules`` are tried last."""
    common = [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", **_ended("In", UserError.exit_code)},
        {"action": "Ignore", **_ended("In", EXIT_STOPPED)},
    ]
    return {"podFailurePolicy": {"rules": [*common, *rules]}, "template": template}


def _ended(operator: str, code: int) -> Manifest:
    return {"onExitCodes": {"containerName": CONTAINER, "operator": operator, "values": [code]}}


def _members(workload: Workload, meeting: Meeting | None) -> Manifest:
    """Return the Job within a JobSet: a pod for each machine, numbered. The JobSet counts its failures.

    A machine that crashes fails the Job at once; only one that lost the others is started again within it.
    """
    machines = workload.deployment.machines
    numbered = {"completionMode": "Indexed", "completions": machines, "parallelism": machines}
    limits = {"backoffLimitPerIndex": MOST_LOSSES, "maxFailedIndexes": 0}
    crashed = {"action": "FailIndex", **_ended("NotIn", EXIT_LOST)}
    return numbered | limits | _job_spec(pod_template(workload, meeting), crashed)


def _jobset_spec(workload: Workload, members: Manifest) -> Manifest:
    """Return a JobSet's spec: all machines start again when one crashes, but none when the recipe is wrong."""
    wrong = {"name": "whatHasToBeMended", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "failurePolicy": {"maxRestarts": workload.deployment.max_failures, "rules": [wrong]},
        "replicatedJobs": [{"name": CONTAINER, "replicas": 1, "template": members}],
    }


def _shared(workload: Workload) -> list[Manifest]:
    """Return the volume, and the recipe, which may not change while its run goes on."""
    data = {RECIPE_FILE: workload.recipe_text}
    return [_claim(workload), _manifest(workload, "v1", "ConfigMap", data=data, immutable=True)]


def _claim(workload: Workload) -> Manifest:
    """Return the claim of the volume. It has no label of a run, because it outlives all runs."""
    deployment = workload.deployment
    spec = {
        "accessModes": ["ReadWriteMany" if deployment.machines > 1 else "ReadWriteOnce"],
        "resources": {"requests": {"storage": f"{deployment.disk_gb}G"}},
    }
    metadata = {"name": deployment.volume, "namespace": deployment.namespace}
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec}


def _manifest(workload: Workload, version: str, kind: str, name: str | None = None, **parts: Any) -> Manifest:
    name = name or workload.name
    metadata = {"name": name, "namespace": workload.deployment.namespace, "labels": {INSTANCE: name}}
    return {"apiVersion": version, "kind": kind, "metadata": metadata, **parts}
