"""Strict checks of manifests by the published models of Kubeflow's Trainer, which have those of Kubernetes in them."""

from __future__ import annotations

import functools
from typing import Any

MODELS = {
    "ConfigMap": "IoK8sApiCoreV1ConfigMap",
    "Job": "IoK8sApiBatchV1Job",
    "JobSet": "JobsetV1alpha2JobSet",
    "PersistentVolumeClaim": "IoK8sApiCoreV1PersistentVolumeClaim",
    "Secret": "IoK8sApiCoreV1Secret",
    "Service": "IoK8sApiCoreV1Service",
    "TrainingRuntime": "TrainerV1alpha1TrainingRuntime",
    "TrainJob": "TrainerV1alpha1TrainJob",
}
DEPLOYMENT = {"apiVersion", "kind", "metadata", "spec"}, {"replicas", "strategy", "selector", "template"}


@functools.cache
def model(name: str) -> Any:
    import kubeflow_trainer_api.models

    return getattr(kubeflow_trainer_api.models, name)


def check(manifest: dict[str, Any]) -> None:
    """Raise ValueError for a key that its kind does not have, or a value of another type; the models leave unknown keys out."""
    if manifest["kind"] == "Deployment":  # the one kind that they do not have
        keys, of_spec = DEPLOYMENT
        parts = {"V1PodTemplateSpec": manifest["spec"]["template"]}
        known = manifest.keys() <= keys and manifest["spec"].keys() <= of_spec
        if not known or manifest["spec"]["selector"] != {"matchLabels": parts["V1PodTemplateSpec"]["metadata"]["labels"]}:
            raise ValueError(f"unknown keys in {manifest}")
        name, manifest = "IoK8sApiCoreV1PodTemplateSpec", parts["V1PodTemplateSpec"]
    else:
        name = MODELS[manifest["kind"]]
    read = model(name).from_dict(manifest).to_dict()
    if read != manifest:
        raise ValueError(f"{name} reads {read} from {manifest}")
